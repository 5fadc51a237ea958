"""Moments of a batch, exact at any offset, and their exact pooling over parts of it.

What is measured here carries no derivative: the rule in ``_normalize`` owns all of it.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._checks_axes import as_stack_axis
from jbn._named_axes import Groups, all_gather, axis_total, gather_group, psum, select, separate, sum_after
from jbn._pytrees import BNStats, map_nodes

__all__ = ["Moments", "as_stats", "bn_merge_stats", "measure", "pool", "pool_over_devices"]

# How much larger than σ² a mean square may be before the digits that cancel are missed: four bits.
_CANCELLATION = 16
# One value in so many is in the sample.
_SPARSITY = 128
# Below it XLA:CPU adds in the order of the rows, and a second read of x costs next to nothing.
_SMALL = 2**12
# From so many rows on, and where nothing is to be converted, two sums over x in turn are faster than side by side.
_TALL = 2**11
# Up to so many shards one all-gather of their moments is the quicker way, above two all-reduces.
_GATHERED = 16
_TINY = 2.0**-64


class Moments(NamedTuple):
    """Moments of a batch; the mean in two parts, since one float32 is too coarse at a large offset."""

    mean: jax.Array  # (C,) a number near the mean, against the standard deviation
    delta: jax.Array  # (C,) what it leaves out: μ = mean + delta
    var: jax.Array  # (C,) biased
    count: jax.Array  # type: ignore[assignment]  # (C,) how many values, as a float


def measure(x: jax.Array, mask: jax.Array | None, reduce_axes: tuple[int, ...], dtype: Any) -> Moments:
    """Moments over ``reduce_axes`` of the values that count, in ``dtype``, as accurate as two passes.

    All of it is one formula: with a shift s, μ = s + mean(x−s) and σ² = mean((x−s)²) − mean(x−s)². The
    difference loses log2(mean((x−s)²)/σ²) bits, so s must be near μ, and the question is how to find it in
    less than a read of x. A small x is read twice. For a large one a CPU takes s = 0, which makes its sums
    twice as fast as any other s, looks at what was lost, and reads again if it matters. On a GPU such a
    branch makes the host wait, and on a TPU as well its operand is paid for; there s is the mean of a sample.
    """
    x = lax.stop_gradient(x)
    count = _count(x, mask, reduce_axes, dtype)
    share = 1 / jnp.maximum(count, 1)
    if _sums_are_rough(x, reduce_axes):
        sums = _about_mean(reduce_axes, x, mask, share)
    else:
        ways = (_about_zero_or_mean, _about_sample if mask is None else _about_mean)  # a mask may empty a sample
        cpu, default = (partial(way, reduce_axes) for way in ways)
        sums = lax.platform_dependent(x, mask, share, cpu=cpu, default=default)
    shift, delta, squares = sums
    return Moments(shift, delta, _variance(share, delta, squares), count)


def _sums_are_rough(x, reduce_axes):
    """Whether XLA:CPU may add in the order of the rows, which is no basis for a difference of sums."""
    if not all(isinstance(n, int) for n in x.shape):  # an exported size may be open
        return True
    kept = [a for a in range(x.ndim) if a not in reduce_axes]
    return x.size < _SMALL or kept != list(range(min(kept), max(kept) + 1))


def _about_mean(reduce_axes, x, mask, share):
    """Two reads: the mean, and sums about it."""
    mean = jnp.sum(_shown(x.astype(share.dtype), mask), reduce_axes) * share
    return _about(reduce_axes, x, mask, share, _finite(mean))


def _about_sample(reduce_axes, x, mask, share):
    """One read, and the sample's.

    The mean of a fraction f of the values, *whichever they are*, is never further from μ than
    σ·√((1−f)/f) (Cauchy–Schwarz, on the indicator of the sample): log2(1/f) = 7 bits are lost on the worst
    data there is (all of the sample here, all of the rest there), and none on data not made for it.
    """
    return _about(reduce_axes, x, mask, share, _finite(_sample_mean(x, reduce_axes, share.dtype)))


def _about_zero_or_mean(reduce_axes, x, mask, share):
    """Raw sums; where some channel lost more than four bits (or is not finite) two reads more.

    Both branches end in sums about a shift. What follows them is the same, so that it is compiled once, in the
    kernels that use it.

    A mask multiplies, since XLA:CPU writes a selection to memory before it sums it; a masked value that
    is not finite then shows in the sum, as any other does.
    """
    first, second = (_shown(part.astype(share.dtype), kept) for part, kept in separate(((x, _weight(mask)),) * 2))
    total = jnp.sum(first, reduce_axes)
    in_turn = share.dtype == x.dtype and math.prod(x.shape[a] for a in reduce_axes) >= _TALL
    squares = lax.square(second)
    squares = sum_after(total, squares, reduce_axes) if in_turn else jnp.sum(squares, reduce_axes)
    mean, square = _finite(total * share), squares * share
    lost = square - _CANCELLATION * (square - lax.square(mean))
    harmless = jnp.max(lost, initial=-jnp.inf) <= 0  # False for NaN and inf, too
    return lax.cond(harmless, _as_it_is, partial(_again, reduce_axes), x, mask, share, mean, squares)


def _as_it_is(x, mask, share, mean, squares):
    return jnp.zeros_like(mean), mean, squares


def _again(reduce_axes, x, mask, share, mean, squares):
    if mask is not None:  # the raw sums may have met what it hides: select, then multiply
        x = select(mask, x, jnp.zeros((), share.dtype))
        return _about_mean(reduce_axes, x, _weight(mask), share)
    return _about(reduce_axes, x, mask, share, mean)


def _about(reduce_axes, x, mask, share, shift):
    """Sums about ``shift``: it, the mean of x − shift, and the sum of its squares."""
    (x1, mask1, shift1), (x2, mask2, shift2) = separate(((x, mask, shift),) * 2)
    first = (x1.astype(share.dtype) - lax.expand_dims(shift1, reduce_axes)) * lax.expand_dims(share, reduce_axes)
    second = x2.astype(share.dtype) - lax.expand_dims(shift2, reduce_axes)
    delta = jnp.sum(_shown(first, mask1), reduce_axes)  # scaled first, so that it does not overflow
    return shift, delta, jnp.sum(lax.square(_shown(second, mask2)), reduce_axes)


def _finite(shift):
    return lax.select(lax.is_finite(shift), shift, jnp.zeros_like(shift))


def _variance(share, delta, squares):
    """σ², never negative, from sums about a shift; inf where they overflow."""
    square = squares * share
    return lax.select(square < jnp.inf, lax.max(square - lax.square(delta), jnp.zeros_like(square)), square)


def _weight(mask):
    """The mask as a factor, in bytes: their conversion XLA:CPU pulls into a sum, that of bools it does not."""
    return None if mask is None else mask.astype(jnp.uint8)


def _shown(values, mask):
    """The values that count, and 0 in the place of others; NaN where a factor meets one that is not finite."""
    if mask is None:
        return values
    return jnp.where(mask, values, 0) if mask.dtype == bool else values * mask.astype(values.dtype)


def _sample_mean(x, reduce_axes, dtype):
    """The mean of about one in 128 of the values of each channel, evenly spread.

    Slices of the axes between the first and the last are whole tiles and contiguous reads, and leave a
    sharded batch alone; the batch comes next, where small strides stay on their shards, and the last axis,
    where slices cost the most, only if the others are too short.
    """
    first, last = [a for a in reduce_axes if a == 0], [a for a in reduce_axes if 0 < a == x.ndim - 1]
    between = [a for a in reduce_axes if a not in (*first, *last)]
    strides = [1] * x.ndim
    for axes in (between, first, last):
        while axes and math.prod(strides) < _SPARSITY:
            axis = max(axes, key=lambda a: x.shape[a] // strides[a])
            if x.shape[axis] < 2 * strides[axis]:
                break
            strides[axis] *= 2
    x = lax.slice(x, [0] * x.ndim, x.shape, strides)
    return jnp.sum(x.astype(dtype), reduce_axes) / math.prod(x.shape[a] for a in reduce_axes)


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
    part_mean, part_delta, part_var, part_count = (jnp.where(seen, v, 0) for v in parts)
    count = jnp.sum(part_count, 0, keepdims=True)
    share = part_count / jnp.where(count > 0, count, 1)

    def over_parts(values):
        return jnp.sum(share * values, 0, keepdims=True)

    centre = over_parts(part_mean)
    shift = over_parts((part_mean - centre) + part_delta)
    mean = centre + shift
    delta = shift - (mean - centre)
    between = (part_mean - mean) + (part_delta - delta)
    var = over_parts(part_var + lax.square(between))
    return Moments(*(v[0] for v in (mean, delta, var, count)))


def pool_over_devices(
    moments: Moments, names: tuple[Any, ...], groups: Groups | None = None, equal: bool = False
) -> Moments:
    """Moments of all shards along the named axes, or of those in one group; ``equal`` says all have one count.

    Few shards are gathered: one collective, exact. A gather delivers D·3·C numbers (4 with counts) to every
    device, so many are summed instead: the mean, then the moments about it, two all-reduces of 2·C numbers.
    """
    if groups is None and axis_total(names) > _GATHERED:
        return _pool_by_sums(moments, names)
    sent = jnp.stack(moments[:3] if equal else moments)
    if groups is None:
        received = all_gather(sent, names)
    else:
        received, mine = gather_group(sent, names, groups)
    mean, delta, var, *counts = jnp.moveaxis(received, 1, 0)
    count = counts[0] if counts else jnp.broadcast_to(moments.count[None], mean.shape)
    if groups is not None:
        count = jnp.where(lax.expand_dims(mine, range(1, count.ndim)), count, 0)
    return pool(Moments(mean, delta, var, count))


def _pool_by_sums(moments: Moments, names: tuple[Any, ...]) -> Moments:
    mean, delta, var, count = moments
    # The first mean may be rough, since the second sum makes it good; scaled so, it does not overflow.
    weight, weighted = psum(jnp.stack((count, count * (mean * _TINY))), names, None)
    share = count / jnp.where(weight > 0, weight, 1)
    centre = weighted / jnp.where(weight > 0, weight, 1) / _TINY
    apart = (mean - centre) + delta
    shift, square = psum(jnp.stack((share * apart, share * (var + lax.square(apart)))), names, None)
    mean = centre + shift
    var = jnp.maximum(square - lax.square(shift), 0)  # shift is no more than the rounding of the first sum
    return Moments(mean, shift - (mean - centre), var, weight)


def as_stats(moments: Moments) -> BNStats:
    """The public form of moments."""
    return BNStats(moments.mean + moments.delta, moments.var, moments.count.astype(jnp.float32))


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
    mean, var, count = (jnp.concatenate(column) for column in zip(*parts, strict=True))
    return as_stats(pool(Moments(mean, jnp.zeros_like(mean), var, count.astype(mean.dtype))))


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
