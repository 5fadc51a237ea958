"""What several doors to other frameworks need, and the little arithmetic that their conventions ask for."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jbn._pytrees import BNStats

__all__ = [
    "as_floating",
    "correction",
    "exchanged",
    "missing",
    "undebiased",
    "usable_channels",
    "widened",
]


def missing(door: str, package: str, extra: str) -> ModuleNotFoundError:
    """The error of a door whose framework is not installed."""
    return ModuleNotFoundError(
        f"jbn.{door}: got no package {package}; expected it to be installed; run pip install 'jbn[{extra}]'."
    )


def correction(count: jax.Array, decay: Any, dtype: Any) -> jax.Array:
    """1 − dᵗ, by which an average that started at 0 is divided when it is read; 1 before its first update."""
    return jnp.where(count == 0, 1, 1 - jnp.power(jnp.asarray(decay, dtype), count))


def undebiased(
    hidden: jax.Array, count: jax.Array, batch: jax.Array, usable: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array]:
    """An average that is corrected only when it is read: hidden ← d·hidden + (1−d)·batch, and t ← t + 1.

    All channels share one t. So a channel that is not ``usable`` is averaged as though the batch had shown what is
    read of it already, which leaves the reading where it is; if no channel is usable, nothing moves.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    old = hidden.astype(wide)
    shown = jnp.where(usable, batch.astype(wide), old / correction(count, decay, wide))
    moves = jnp.any(usable)
    new = jnp.where(moves, old * decay + shown * (1 - decay), old)
    return new.astype(hidden.dtype), count + jnp.where(moves, 1, 0)  # weakly typed: the count keeps its type


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
def exchanged(cls: type, door: type) -> type:
    """A subclass ``cls`` of a framework's layer as one of the ``door``; one class, however often it is asked for."""
    bases = (door,) if issubclass(door, cls) else (cls, door)
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, bases, names)
