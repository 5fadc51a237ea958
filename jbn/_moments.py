"""Moments of a batch, exact at any offset, and their exact pooling over parts of it.

What is measured here carries no derivative: the rule in ``_normalize`` owns all of it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._named_axes import all_gather, separate
from jbn._pytrees import BNStats, map_nodes

__all__ = ["Moments", "as_stats", "bn_merge_stats", "measure", "pool", "pool_over_devices"]

# Raw sums lose log2(E[x²]/σ²) bits of the variance: four are let go, beyond that a second pass is made.
_CANCELLATION = 16.0


class Moments(NamedTuple):
    """Moments of a batch; the mean in two parts, since one float32 is too coarse at a large offset."""

    mean: jax.Array  # (C,) the mean, rounded
    delta: jax.Array  # (C,) what the rounding left out: μ = mean + delta
    var: jax.Array  # (C,) biased
    count: jax.Array  # (C,) how many values, as a float


def measure(x: jax.Array, mask: jax.Array | None, reduce_axes: tuple[int, ...], dtype: Any) -> Moments:
    """Moments over ``reduce_axes`` of the values that count, in ``dtype``, as accurate as two passes.

    Raw sums come first: they are one read, and where E[x²] ≤ 16·σ² they are as good as two passes.
    Where some channel cancels (or is not finite), a second pass sums x − mean and its square.
    """
    x = lax.stop_gradient(x)
    count = _count(x, mask, reduce_axes, dtype)
    share = 1 / jnp.maximum(count, 1)

    def total(values, mask):
        return jnp.sum(values if mask is None else jnp.where(mask, values, 0), reduce_axes)

    def one_pass(x, mask, mean, var):
        return mean, jnp.zeros_like(mean), var

    def second_pass(x, mask, mean, var):
        shift = jnp.where(jnp.isfinite(mean), mean, 0)  # a sum may overflow where the mean does not
        (x1, mask1, shift1), (x2, mask2, shift2) = separate(((x, mask, shift), (x, mask, shift)))
        first = x1.astype(dtype) - lax.expand_dims(shift1, reduce_axes)
        second = x2.astype(dtype) - lax.expand_dims(shift2, reduce_axes)
        delta = total(first * lax.expand_dims(share, reduce_axes), mask1)
        square = total(lax.square(second), mask2) * share
        mean = shift + delta
        return mean, delta - (mean - shift), jnp.maximum(square - lax.square(delta), 0)

    (x1, mask1), (x2, mask2) = separate(((x, mask), (x, mask)))
    mean = total(x1.astype(dtype), mask1) * share
    square = total(lax.square(x2.astype(dtype)), mask2) * share
    var = jnp.maximum(square - lax.square(mean), 0)
    harmless = jnp.all(square <= _CANCELLATION * var)  # False for a NaN and an overflow, too
    return Moments(*lax.cond(harmless, one_pass, second_pass, x, mask, mean, var), count)


def _count(x: jax.Array, mask: jax.Array | None, reduce_axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """(C,) how many values count in each channel."""
    shape = tuple(n for a, n in enumerate(x.shape) if a not in reduce_axes)
    if mask is None:
        return jnp.full(shape, math.prod(x.shape[a] for a in reduce_axes), dtype)
    copies = math.prod(x.shape[a] for a in reduce_axes if mask.shape[a] == 1)
    shown = jnp.sum(mask, reduce_axes, dtype=jnp.uint32).astype(dtype)
    return jnp.broadcast_to(shown * copies, shape)


def pool(parts: Moments) -> Moments:
    """Moments of disjoint parts, stacked along axis 0, as those of their union: exact for unequal counts.

    References:
        Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", equation 2.1.
    """
    seen = parts.count > 0
    count = jnp.sum(jnp.where(seen, parts.count, 0), 0)
    share = jnp.where(seen, parts.count, 0) / jnp.where(count > 0, count, 1)
    part_mean, part_delta, part_var = (jnp.where(seen, v, 0) for v in parts[:3])
    centre = jnp.sum(share * part_mean, 0)
    shift = jnp.sum(share * ((part_mean - centre) + part_delta), 0)
    mean = centre + shift
    delta = shift - (mean - centre)
    between = (part_mean - mean) + (part_delta - delta)
    return Moments(mean, delta, jnp.sum(share * (part_var + lax.square(between)), 0), count)


def pool_over_devices(moments: Moments, names: tuple[Any, ...]) -> Moments:
    """Moments of all shards along the named axes, the same on each: one all-gather of 4·C numbers."""
    return pool(Moments(*jnp.moveaxis(all_gather(jnp.stack(moments), names), 1, 0)))


def as_stats(mean: jax.Array, var: jax.Array, count: jax.Array) -> BNStats:
    """The public form of moments."""
    return BNStats(mean, var, count.astype(jnp.float32))


def bn_merge_stats(*stats: Any, axis: int | None = None) -> Any:
    """Merges statistics of disjoint batches into those of their union, exactly.

    With m = Σ mᵢ: μ = Σ mᵢ·μᵢ / m and σ² = Σ mᵢ·(σᵢ² + (μᵢ−μ)²) / m, for each channel alone. It is
    associative and exact for unequal counts: the tool for gradient accumulation, devices, data sets.

    Args:
        *stats: one or more `BNStats` with fields of shape (C,), or pytrees with `BNStats` at matching
            places (a None stays None).
        axis: None to merge the arguments with each other; 0 when each argument is a stack, with
            fields of shape (k, C), to be merged along that axis (from `scan`, `vmap`, an all-gather).

    Returns:
        One `BNStats`, or pytree of them: mean and var (C,) float32 (float64 if given so), count (C,)
        float32. Parts with count 0 change nothing; a channel that saw nothing has count 0, mean 0,
        var 0. A part that is not finite makes its channel so: `bn_update_stats` then skips it.

    Raises:
        TypeError: an argument that is no `BNStats` and no pytree of them.
        ValueError: no arguments, structures or shapes that do not match, no such axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import BNStats, bn_merge_stats
        >>> a = BNStats(jnp.array([1.0]), jnp.array([0.0]), jnp.array([3.0]))
        >>> b = BNStats(jnp.array([5.0]), jnp.array([4.0]), jnp.array([1.0]))
        >>> bn_merge_stats(a, b)
        BNStats(mean=Array([2.], dtype=float32), var=Array([4.], dtype=float32), count=Array([4.], dtype=float32))

    Flax, PyTorch and Keras average the moments of devices; that is wrong for unequal counts.

    References:
        Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", equation 2.1.
    """
    if not stats:
        raise ValueError("stats: got no arguments; expected at least one BNStats; pass what bn_apply returned.")

    def merge(*nodes, path):
        fields = [_stacked(node, axis, path) for node in nodes]
        shapes = {jnp.shape(leaf)[1:] for node in fields for leaf in node}
        if len(shapes) > 1:
            raise ValueError(
                f"stats{path}: got shapes {sorted(shapes)}; expected one; merge statistics of the same layer."
            )
        mean, var, count = (jnp.concatenate(column) for column in zip(*fields, strict=True))
        merged = pool(Moments(mean, jnp.zeros_like(mean), var, count.astype(mean.dtype)))
        return as_stats(merged.mean + merged.delta, merged.var, merged.count)

    return map_nodes(merge, tuple(("stats", BNStats) for _ in stats), *stats)


def _stacked(node: BNStats, axis: int | None, path: str) -> BNStats:
    """Fields with the parts to be merged along axis 0."""
    if axis is None:
        return BNStats(*(jnp.asarray(leaf)[None] for leaf in node))
    if any(not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf) for leaf in node):
        raise ValueError(
            f"axis: got {axis} for stats{path} with fields of shape {jnp.shape(node.mean)}; expected an axis of "
            f"theirs; pass axis=None to merge the arguments with each other."
        )
    return BNStats(*(jnp.moveaxis(jnp.asarray(leaf), axis, 0) for leaf in node))
