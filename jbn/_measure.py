"""x and mask in, `Moments` out: the ways to measure a batch, and which is taken when.

What is measured here carries no derivative: the rule in ``_normalize`` owns all of it.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._collectives import Groups, Names, as_varying, axis_total, is_common, sum_over, varying_axes
from jbn._pool import Moments, pool_over_devices
from jbn._shardings import filled_like, laid_out_like, parts_along, spec_of, with_spec
from jbn._xla import narrow_select, raw_sums, raw_sums_are_rough, unshared, way_by_platform, weighted

__all__ = ["measure"]

# How much larger than σ² a mean square about a shift may be before the digits that cancel are missed: four bits.
_MOST_CANCELLED = 16
# One value in so many is in a sample. The mean of a fraction f of the values is within σ·√((1−f)/f) of μ whichever
# they are (Cauchy–Schwarz), so that no more than log2(1/f) bits cancel: four, on the worst data there is.
_SPARSITY = 16
# About a sample's mean the sum of squares may be 16 times as large as m·σ², and shall not overflow before that does: so
# values are scaled by this power of 2 before they are squared.
_SQUARES_SCALE = 2.0**-3
# Below so many values a second read costs next to nothing.
_SMALL = 2**12


class _Extent(NamedTuple):
    """What is measured over; static."""

    axes: tuple[int, ...]
    names: Names
    groups: Groups | None


class _Sums(NamedTuple):
    """The first two moments about a shift of all values that count."""

    shift: jax.Array  # (C,)
    mean: jax.Array  # (C,) of x − shift
    square: jax.Array  # (C,) mean of (x − shift)²


def measure(
    x: jax.Array,
    mask: jax.Array | None,
    reduce_axes: tuple[int, ...],
    dtype: Any,
    *,
    names: Names = (),
    groups: Groups | None = None,
    known: jax.Array | None = None,
) -> Moments:
    """Moments over ``reduce_axes`` and the named axes of the values that count, as accurate as two passes.

    All of it is one formula: with a shift s, μ = s + mean(x−s) and σ² = mean((x−s)²) − mean(x−s)². The difference
    loses log2(mean((x−s)²)/σ²) bits, so s must be near μ, and the question is how to find it in less than a read of
    x. There are three ways:

    - s is known before x is: 0, or the running mean (``known``). One read; then what was lost is looked at, and where
      it was more than four bits in some channel, x is read again, about the mean just found. Devices that have one s
      simply add their sums: one all-reduce of 2·C numbers (3·C with a mask), however many they are.
    - s is the mean of a sample: one read, and the sample's. It never loses more than four bits.
    - s is the mean: two reads. So a small batch is measured, and where there is no other way one with a mask, which
      might leave nothing in a sample.

    Under `jax.vmap` a branch runs both of its sides, so there x is read twice to begin with. Where devices cannot
    add their sums, each pools its moments with those of the others. The named axes are those of a mesh.
    """
    x, known = lax.stop_gradient((x, known))
    over = _Extent(reduce_axes, names, groups)
    count = _count(x, mask, reduce_axes, dtype)
    two_reads = partial(_pooled_over_shards, over, _two_reads)
    about_zero = about_known = about_sample = two_reads
    if all(isinstance(n, int) for n in x.shape):  # an exported size may be open
        if x.size >= _SMALL:
            about_sample = two_reads if mask is not None else partial(_pooled_over_shards, over, _about_sample)
            about_zero = two_reads if raw_sums_are_rough(x, reduce_axes) else partial(_known_shift, over, _from_zero)
        about_known = about_sample
        if known is not None:
            known = _finite(laid_out_like(jnp.broadcast_to(known.astype(dtype), count.shape), count))
            about_known = partial(_known_shift, over, _from_known)
    return way_by_platform(x, mask, count, known, zero=about_zero, known=about_known, sample=about_sample)


def _count(x, mask, reduce_axes, dtype):
    """(C,) how many values count in each channel."""
    kept = [a for a in range(x.ndim) if a not in reduce_axes]
    shape, spec = [x.shape[a] for a in kept], [spec_of(x)[a] for a in kept]
    if mask is None:
        return with_spec(jnp.full(shape, math.prod(x.shape[a] for a in reduce_axes), dtype), spec, mesh_of=x)
    copies = math.prod(x.shape[a] for a in reduce_axes if mask.shape[a] == 1)
    shown = jnp.sum(mask, reduce_axes, dtype=jnp.uint32).astype(dtype)
    return with_spec(jnp.broadcast_to(shown * copies, shape), spec, mesh_of=x)


def _as_moments(sums, count):
    """The variance is never negative, and inf where its sum overflows."""
    shift, mean, square = sums
    var = lax.select(square < jnp.inf, jnp.maximum(square - lax.square(mean), 0), square)
    return Moments(shift, mean, var, count)


def _pooled_over_shards(over, way, x, mask, count, _):
    """The moments of all shards, from those of each."""
    local = way(over.axes, x, mask, 1 / jnp.maximum(count, 1))
    return pool_over_devices(_as_moments(local, count), over.names, over.groups, equal=mask is None)


def _two_reads(axes, x, mask, share):
    shift = _finite(jnp.sum(_selected(x.astype(share.dtype), mask), axes) * share)
    mean, squares = _about(axes, _selected, x, mask, share, shift)
    return _Sums(shift, mean, squares * share)


def _about_sample(axes, x, mask, share):
    shift = _finite(_sample_mean(x, axes, share.dtype))
    mean, squares = _about(axes, _selected, x, mask, share, shift, down=_SQUARES_SCALE)
    return _Sums(shift, mean, squares * (share / _SQUARES_SCALE**2))


def _about(axes, shown, x, mask, share, shift, down=None):
    """The mean of x − shift, each value weighted by ``share``, and the sum of squares of (x − shift)·down."""
    (x1, mask1, shift1), (x2, mask2, shift2) = unshared(((x, mask, shift),) * 2)
    # Scaled before they are added up, values do not overflow.
    first = (x1.astype(share.dtype) - lax.expand_dims(shift1, axes)) * lax.expand_dims(share, axes)
    second = x2.astype(share.dtype) - lax.expand_dims(shift2, axes)
    second = second if down is None else second * down
    return jnp.sum(shown(first, mask1), axes), jnp.sum(lax.square(shown(second, mask2)), axes)


def _known_shift(over, way, x, mask, count, known):
    """Sums about a shift that is there before x is, added up over the devices where all have the same one."""
    one_shift = way is _from_zero or is_common(known, over.names)
    if over.names and one_shift and over.groups is None:
        return _one_read(over, way)(x, mask, count, known)
    alone = _one_read(over._replace(names=(), groups=None), way)(x, mask, count, known)
    # The count is the one that went in; what comes out of a function with a rule for vmap differs between members.
    return pool_over_devices(alone._replace(count=count), over.names, over.groups, equal=mask is None)


@cache
def _one_read(over, way):
    """The way as a function, and what becomes of it under `jax.vmap`: two reads.

    There a branch becomes a selection, for which both sides are run, and which jax 0.10 to 0.12 refuse on an
    explicit mesh (a predicate that differs between members would have to be split as the values are).
    """

    @jax.custom_batching.custom_vmap
    def one_read(x, mask, count, known):
        return way(over, x, mask, count, known)

    @one_read.def_vmap
    def batched(size, is_batched, x, mask, count, known):
        differ = is_batched[0] or bool(is_batched[1])  # else the shift alone differs between members: x decides
        if not differ:
            return _pooled_over_shards(over, _two_reads, x, mask, count, known), _for_each_moment(False)
        x, count = (
            v if here else jnp.broadcast_to(v[None], (size, *v.shape))
            for v, here in ((x, is_batched[0]), (count, is_batched[2]))
        )
        if mask is not None and not is_batched[1]:
            mask = mask[None]
        inner = over._replace(axes=tuple(a + 1 for a in over.axes))
        return _pooled_over_shards(inner, _two_reads, x, mask, count, known), _for_each_moment(True)

    return one_read


def _for_each_moment(value: Any) -> Moments:
    return Moments(value, value, value, value)


def _from_zero(over, x, mask, count, _):
    total, squares = raw_sums(over.axes, x, mask, count.dtype)
    return _again_if_cancelled(over, _again_from_zero, x, mask, count, None, total, squares)


def _from_known(over, x, mask, count, known):
    """Sums about the running mean."""
    apart = _selected(x.astype(count.dtype) - lax.expand_dims(known, over.axes), mask)
    total, squares = jnp.sum(apart, over.axes), jnp.sum(lax.square(apart), over.axes)
    return _again_if_cancelled(over, _again_from_known, x, mask, count, known, total, squares)


def _again_if_cancelled(over, again, x, mask, count, known, total, squares):
    """Moments from sums about a shift, or where more than four bits cancelled from a second read, about the mean.

    What follows the branch is the same for both of its sides, so that it is compiled once, together with what uses it.
    """
    if over.names:
        sent = (total, squares) if mask is None else (total, squares, count)
        total, squares, *counted = sum_over(jnp.stack(sent), over.names)
        count = counted[0] if counted else count * axis_total(over.names)
    share = 1 / jnp.maximum(count, 1)
    mean, square = _finite(total * share), squares * share
    shift = filled_like(mean, 0) if known is None else as_varying(known, varying_axes(mean))
    lost = square - _MOST_CANCELLED * (square - lax.square(mean))
    harmless = jnp.max(lost, initial=-jnp.inf) <= 0  # False for NaN and inf, too
    sums = lax.cond(harmless, _as_it_is, partial(again, over), x, mask, share, shift, mean, squares)
    shift, mean, squares = sums
    return _as_moments(_Sums(shift, mean, squares * share), count)


def _as_it_is(x, mask, share, shift, mean, squares):
    return shift, mean, squares


def _again_from_known(over, x, mask, share, shift, mean, squares):
    shift = shift + mean
    return shift, *_over_devices(over, *_about(over.axes, _selected, x, mask, share, shift))


def _again_from_zero(over, x, mask, share, shift, mean, squares):
    if mask is None:
        return mean, *_over_devices(over, *_about(over.axes, _selected, x, None, share, mean))
    # The raw sums may have met values that the mask hides and that are not finite.
    x = narrow_select(mask, x, jnp.zeros((), share.dtype))
    (mean,) = _over_devices(over, jnp.sum(weighted(x.astype(share.dtype), mask), over.axes) * share)
    mean = _finite(mean)
    return mean, *_over_devices(over, *_about(over.axes, weighted, x, mask, share, mean))


def _over_devices(over, *sums):
    """Sums over all devices, from those of each."""
    return sum_over(jnp.stack(sums), over.names) if over.names else sums


def _selected(values, mask):
    """The values that count, and 0 in the place of others."""
    return values if mask is None else jnp.where(mask, values, 0)


def _finite(shift):
    return lax.select(lax.is_finite(shift), shift, filled_like(shift, 0))


def _sample_mean(x, axes, dtype):
    """The mean of one in 16 of the values of each channel, evenly spread, or of more where axes are short.

    Slices of the axes between the first and the last are contiguous reads, and leave a batch that is split over
    devices alone; the first axis comes next, where small strides stay on their shards, and the last, where slices
    cost the most, only if the others are too short. An axis of an explicit mesh is cut only within its parts.
    """
    first, last = [a for a in axes if a == 0], [a for a in axes if 0 < a == x.ndim - 1]
    between = [a for a in axes if a not in (*first, *last)]
    strides = [1] * x.ndim

    def halved(axis):
        parts = parts_along(x, axis)
        return x.shape[axis] >= 2 * strides[axis] * parts and (
            parts == 1 or x.shape[axis] % (2 * strides[axis] * parts) == 0
        )

    for group in (between, first, last):
        while math.prod(strides) < _SPARSITY and (cut := [a for a in group if halved(a)]):
            strides[max(cut, key=lambda a: x.shape[a] // strides[a])] *= 2
    x = lax.slice(x, [0] * x.ndim, x.shape, strides)
    return jnp.sum(x.astype(dtype), axes) / math.prod(x.shape[a] for a in axes)
