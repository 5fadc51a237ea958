"""The moments of a batch, and their exact pooling over parts of it, devices and layers."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._checks_axes import as_stack_axis
from jbn._collectives import Groups, Names, axis_total, gather, gather_group, sum_over
from jbn._pytrees import BNStats, map_nodes
from jbn._shardings import filled_like, spec_of, with_spec

__all__ = ["Moments", "as_stats", "bn_merge_stats", "pool", "pool_over_devices", "unbiased_factor"]

# Up to so many shards one all-gather of their moments is the quicker way, above it two all-reduces.
_MOST_GATHERED = 16
# A weight that keeps a sum over many devices of counts times means from overflowing; a power of 2 rounds nothing.
_WEIGHTED_SCALE = 2.0**-64


class Moments(NamedTuple):
    """Moments of a batch, for each channel; the mean in two parts, since one float32 is too coarse far from 0."""

    mean_hi: Any  # (C,) a number near the mean, as seen against the standard deviation
    mean_lo: Any  # (C,) what it leaves out: μ = mean_hi + mean_lo
    var: Any  # (C,) biased
    count: Any  # (C,) how many values, as a float; it hides tuple.count


def pool(parts: Moments, numpy: ModuleType = jnp) -> Moments:
    """Moments of disjoint parts, stacked along axis 0, as those of their union: exact for unequal counts.

    With m = Σ mᵢ: μ = Σ mᵢ·μᵢ / m and σ² = Σ mᵢ·(σᵢ² + (μᵢ−μ)²) / m. Parts that saw nothing change nothing.
    ``numpy`` is `jax.numpy`, or `numpy` to pool on the host in the precision of the parts.

    References:
        Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", equation 2.1.
    """
    seen = parts.count > 0
    hi, lo, var, count = (numpy.where(seen, v, 0) for v in parts)
    total = numpy.sum(count, 0, keepdims=True)
    share = count / numpy.where(total > 0, total, 1)

    def over_parts(values):
        return numpy.sum(share * values, 0, keepdims=True)

    centre = over_parts(hi)
    shift = over_parts((hi - centre) + lo)
    mean_hi = centre + shift
    mean_lo = shift - (mean_hi - centre)
    between = (hi - mean_hi) + (lo - mean_lo)
    pooled_var = over_parts(var + numpy.square(between))
    return Moments(*(v[0] for v in (mean_hi, mean_lo, pooled_var, total)))


def pool_over_devices(moments: Moments, names: Names, groups: Groups | None = None, equal: bool = False) -> Moments:
    """Moments of all shards along the named axes, or of those in one group; ``equal`` says all have one count.

    Few shards are gathered: one collective, exact. A gather delivers D·3·C numbers (4 with counts) to every
    device, so many are summed instead: the mean, then the moments about it, two all-reduces of 2·C numbers.
    """
    if not names:
        return moments
    if groups is None and axis_total(names) > _MOST_GATHERED:
        return _pool_by_sums(moments, names)
    sent = jnp.stack(moments[:3] if equal else moments)
    if groups is None:
        received = gather(sent, names)
    else:
        received, mine = gather_group(sent, names, groups)
    hi, lo, var, *counts = jnp.moveaxis(received, 1, 0)
    count = counts[0] if counts else jnp.broadcast_to(moments.count[None], hi.shape)
    if groups is not None:
        count = jnp.where(lax.expand_dims(mine, range(1, count.ndim)), count, 0)
    return pool(Moments(hi, lo, var, count))


def _pool_by_sums(moments: Moments, names: Names) -> Moments:
    hi, lo, var, count = moments
    # The first mean may be rough, since the second sum makes it good.
    total, weighted = sum_over(jnp.stack((count, count * (hi * _WEIGHTED_SCALE))), names)
    share = count / jnp.where(total > 0, total, 1)
    centre = weighted / jnp.where(total > 0, total, 1) / _WEIGHTED_SCALE
    apart = (hi - centre) + lo
    shift, square = sum_over(jnp.stack((share * apart, share * (var + lax.square(apart)))), names)
    mean_hi = centre + shift
    var = jnp.maximum(square - lax.square(shift), 0)  # shift is no more than the rounding of the first sum
    return Moments(mean_hi, shift - (mean_hi - centre), var, total)


def unbiased_factor(count: Any, numpy: ModuleType = jnp) -> Any:
    """m/(m−1), by which a variance is unbiased; 1 where m ≤ 1."""
    return numpy.where(count > 1, count / numpy.maximum(count - 1, 1), 1)


def as_stats(moments: Moments) -> BNStats:
    """The public form of moments."""
    return BNStats(moments.mean_hi + moments.mean_lo, moments.var, moments.count.astype(jnp.float32))


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

    axis = as_stack_axis(axis)

    def merge(*nodes, path):
        for node in nodes:
            _of_one_shape(path, map(jnp.shape, node))
        fields = [_stacked(node, axis, path) for node in nodes]
        _of_one_shape(path, (node.mean.shape[1:] for node in fields))
        return _merged(fields)

    return map_nodes(merge, tuple(("stats", BNStats) for _ in stats), *stats)


@jax.jit
def _merged(parts: list[BNStats]) -> BNStats:
    first = parts[0].mean
    spec = (None, *spec_of(first)[1:])
    columns = ([with_spec(v, spec, mesh_of=first) for v in column] for column in zip(*parts, strict=True))
    mean, var, count = map(jnp.concatenate, columns)
    return as_stats(pool(Moments(mean, filled_like(mean, 0), var, count.astype(mean.dtype))))


def _of_one_shape(path: str, shapes: Iterable[tuple[int, ...]]) -> None:
    distinct = sorted(set(shapes))
    if len(distinct) > 1:
        raise ValueError(f"stats{path}: got shapes {distinct}; expected one; merge statistics of the same layer.")


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
