"""What several doors to other frameworks need, and the little arithmetic that their conventions ask for."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core import apply_unchecked
from jbn._normalize import Layout
from jbn._pytrees import BNParams, BNState, BNStats
from jbn._shardings import laid_out_like

__all__ = [
    "any_complex",
    "as_floating",
    "blended",
    "exchanged",
    "feature_axes",
    "keras_renorm",
    "missing",
    "normalized",
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


def keras_renorm(
    stats: BNStats, mean: jax.Array, std: jax.Array, eps: float, clipping: dict[str, Any]
) -> tuple[jax.Array, jax.Array, BNStats]:
    """Keras's batch renormalization against the averages ``mean`` and ``std``, each (C,), of μ_B and σ_B = √(var_B+ε).

    Returns r = σ_B/σ within [rmin, rmax] and d = (μ_B−μ)/σ within ±dmax, for σ = max(std, √ε), without gradient; and
    the statistics with σ_B in the place of the variance, which is what Keras averages.

    References:
        Ioffe 2017, "Batch Renormalization", Algorithm 1, where rmin = 1/rmax.
    """
    mean, std = mean.astype(stats.mean.dtype), std.astype(stats.mean.dtype)
    spread = jnp.sqrt(stats.var + eps)
    std = jnp.maximum(std, eps**0.5)
    dmax = clipping.get("dmax")
    r = jnp.clip(spread / std, clipping.get("rmin"), clipping.get("rmax"))
    d = jnp.clip((stats.mean - mean) / std, None if dmax is None else -dmax, dmax)
    return lax.stop_gradient(r), lax.stop_gradient(d), BNStats(stats.mean, spread, stats.count)


def any_complex(*values: Any) -> bool:
    """Whether an array or dtype among them is complex, which jbn leaves to the framework; a None is not."""
    return any(jnp.issubdtype(jnp.result_type(v), jnp.complexfloating) for v in values if v is not None)


def feature_axes(axis: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    """One feature axis or several of ``ndim`` axes, negative ones counted from the end, in ascending order."""
    axes = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({a + ndim if a < 0 else a for a in axes}))


def normalized(
    params: BNParams,
    moments: tuple[jax.Array, jax.Array],
    x: jax.Array,
    *,
    train: bool,
    axes: tuple[int, ...],
    eps: Any,
    dtype: Any,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, BNStats]:
    """``(y, stats)`` of `bn_apply`, for what frameworks allow beyond it.

    Args:
        params: γ and β, each of the sizes of x along ``axes``, or None.
        moments: running mean and variance, of those sizes.
        x: real numbers, integers included.
        train: whether to normalize with the statistics of x.
        axes: the feature axes, ascending and not negative.
        eps: ε.
        dtype: of y. The arithmetic is float32 whatever it is, or float64 where x or y is.
        mask: bools or numbers that broadcast against x; a value counts where they are not 0.
        axis_name: a name, or several, of axes along which the statistics are synchronized in training.
        axis_index_groups: lists of indices along ``axis_name``, each synchronized by itself.

    Raises:
        ValueError: a mask that does not broadcast against x.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64 or not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"mask: got shape {mask.shape}; expected one that broadcasts against {x.shape}, the shape of x; "
                f"add axes of size 1 or remove some."
            )
    names: tuple[Any, ...] = ()
    if train and axis_name is not None:
        names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    groups = tuple(map(tuple, axis_index_groups)) if names and axis_index_groups is not None else None
    reduce_axes = tuple(a for a in range(x.ndim) if a not in axes)
    mean, var = moments
    many = jnp.full(mean.shape, jnp.iinfo(jnp.int32).max, jnp.int32)  # how many updates they hold is not recorded
    layout = Layout(reduce_axes, names, groups, train, dtype=dtype)
    return apply_unchecked(layout, params, BNState(mean, var, many), x, eps, mask)


def blended(moments: tuple[jax.Array, jax.Array], stats: BNStats, momentum: Any) -> tuple[jax.Array, jax.Array]:
    """Running mean and variance after a batch: d·running + (1−d)·batch, d the momentum; biased and not debiased.

    A channel that saw nothing, or whose result is not finite, keeps what it had, and dtypes and shardings stay:
    as in `bn_update_stats`, but for the arithmetic, which is float32 also for narrow moments, and for gradients,
    which flow.
    """
    wide = [jnp.promote_types(old.dtype, jnp.float32) for old in moments]
    batch = (laid_out_like(new, old) for old, new in zip(moments, (stats.mean, stats.var), strict=True))
    moved = [
        (momentum * old.astype(dtype) + (1 - momentum) * new.astype(dtype)).astype(old.dtype)
        for old, new, dtype in zip(moments, batch, wide, strict=True)
    ]
    usable = (laid_out_like(stats.count, moments[0]) > 0) & jnp.isfinite(moved[0]) & jnp.isfinite(moved[1])
    mean, var = (jnp.where(usable, new, old) for old, new in zip(moments, moved, strict=True))
    return mean, var


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


@cache
def exchanged(cls: Any, door: Any) -> Any:
    """A subclass ``cls`` of a framework's layer as one of the ``door``; one class, however often it is asked for."""
    bases = (door,) if issubclass(door, cls) else (cls, door)
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, bases, names)
