"""What several doors to other frameworks need, and the little arithmetic that their conventions ask for."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core import apply_unchecked
from jbn._normalize import Layout
from jbn._pytrees import BNParams, BNState, BNStats

__all__ = [
    "apply_pooled",
    "as_floating",
    "exchanged",
    "missing",
    "reading",
    "undebiased",
    "usable_channels",
    "widened",
]


def missing(door: str, package: str, extra: str) -> ModuleNotFoundError:
    """The error of a door whose framework is not installed."""
    return ModuleNotFoundError(
        f"jbn.{door}: got no package {package}; expected it to be installed; run pip install 'jbn[{extra}]'."
    )


def reading(hidden: jax.Array, count: jax.Array, decay: Any) -> jax.Array:
    """An average that started at 0, as it is read: hidden/(1−dᵗ), in float32 or more; hidden where t = 0."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return hidden.astype(wide) / jnp.where(count == 0, 1, 1 - jnp.power(jnp.asarray(decay, wide), count))


def undebiased(
    hidden: jax.Array, count: jax.Array, batch: jax.Array, usable: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array]:
    """An average that is corrected only when it is read: hidden ← d·hidden + (1−d)·batch, and t ← t + 1.

    All channels share one t. So a channel that is not ``usable`` is averaged as though the batch had shown what is
    read of it already, which leaves the reading where it is; if no channel is usable, nothing moves.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    old = hidden.astype(wide)
    shown = jnp.where(usable, batch.astype(wide), reading(hidden, count, decay))
    moves = jnp.any(usable)
    new = jnp.where(moves, old * decay + shown * (1 - decay), old)
    # In `lax`, where t keeps its dtype also in 64 bit, and stays weakly typed if it is: Equinox compares that too.
    return new.astype(hidden.dtype), lax.select(moves, lax.add(count, lax.full_like(count, 1)), count)


def usable_channels(stats: BNStats, dtype: Any) -> jax.Array:
    """(C,) whether a batch showed anything, and what it showed is finite in the dtype in which it is kept."""
    mean, var = (jnp.isfinite(v.astype(dtype)) for v in (stats.mean, stats.var))
    return (stats.count > 0) & mean & var


def as_floating(x: Any) -> jax.Array:
    """x as an array; integers and booleans in the floating dtype that JAX gives to their mean."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jax.eval_shape(jnp.mean, x).dtype)


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """x in float64 if the output is: the layer then computes in it. Otherwise x as it is."""
    return x.astype(dtype) if dtype == jnp.float64 else x


def apply_pooled(layout: Layout, params: BNParams, x: jax.Array, eps: Any) -> tuple[jax.Array, BNStats]:
    """Training with the moments of all members along ``layout.names``, all of them with equally many values.

    It is `apply_unchecked` with every collective outside of the hand-written rule. Where `jax.jit` stands between
    `jax.vmap` and `jax.grad`, JAX runs the rule of a `jax.custom_jvp` when the name that vmap bound is gone
    (seen with 0.10 and 0.12; tests/doors/test_equinox.py notices). So the rule sees the values of one member alone.
    Their moments are pooled (Chan's formula for equal counts) by code that JAX differentiates itself, and x is
    normalized with what comes out as in evaluation, with gradients to mean and variance.
    """
    if not layout.names:
        return apply_unchecked(layout, params, None, x, eps)
    alone = layout._replace(names=(), groups=None)
    over_members = partial(_mean_over, layout.names, layout.groups)
    shift = jnp.zeros([n for a, n in enumerate(x.shape) if a not in layout.reduce_axes], x.dtype)
    if x.size and x.dtype.itemsize >= 4:
        # One float32 is too coarse for a mean that is large against the deviation. So most of it is taken away first.
        one = x[tuple(0 if a in layout.reduce_axes else slice(None) for a in range(x.ndim))]
        shift = lax.stop_gradient(over_members(one))
        shift = jnp.where(jnp.isfinite(shift), shift, 0)
        x = x - lax.expand_dims(shift, layout.reduce_axes)
    _, local = apply_unchecked(alone, BNParams(None, None), None, x, eps)
    mean = over_members(local.mean)
    var = over_members(local.var + lax.square(local.mean - mean))
    pooled = BNState(mean, var, jnp.ones(mean.shape, jnp.int32))
    y, _ = apply_unchecked(alone._replace(train=False), params, pooled, x, eps)
    return y, BNStats(mean + shift.astype(mean.dtype), var, local.count)


def _mean_over(names, groups, x):
    """The mean over all members along the named axes, or over those in one group with this one."""
    if groups is None:
        return lax.pmean(x, names)
    # JAX's own collectives refuse groups under vmap and shard_map; rows can be selected anywhere.
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    number = jnp.array([group_of[index] for index in range(len(group_of))])
    mine = number == number[lax.axis_index(names)]
    rows = lax.all_gather(x, names)
    return jnp.mean(rows, 0, where=lax.expand_dims(mine, range(1, rows.ndim)))


@cache
def exchanged(cls: Any, door: Any) -> Any:
    """A subclass ``cls`` of a framework's layer as one of the ``door``; one class, however often it is asked for."""
    bases = (door,) if issubclass(door, cls) else (cls, door)
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, bases, names)
