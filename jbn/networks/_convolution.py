"""Convolution and pooling of images (N, H, W, C), padded as PyTorch pads, on explicit meshes too."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from jbn._shardings import Spec, for_product, is_copied, parts_along, sharding_of, spec_of, with_spec
from jbn._xla import pool_by_platform

__all__ = ["conv", "max_pool"]


def conv(a: jax.Array, W: jax.Array, stride: int) -> jax.Array:
    """a∗W, NHWC and HWIO, padded so that a stride of 1 keeps the size."""
    a, W, (batch, *_, outputs) = for_product(a, W.astype(a.dtype))
    places = _places_left(a, stride)
    out_sharding = sharding_of(a, (batch, *places, outputs))
    a = with_spec(a, (batch, *places, spec_of(a)[-1]))
    padding = [(size // 2, size // 2) for size in W.shape[:2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        a, W, (stride, stride), padding, dimension_numbers=numbers, out_sharding=out_sharding
    )


def max_pool(a: jax.Array) -> jax.Array:
    """The largest of each 3×3 values, with stride 2 and one pixel of padding on each side.

    For the backward pass it keeps its argument alone.
    """
    batch, *_, features = spec_of(a)
    places = _places_left(a, 2)
    # Windows reach over the edges of parts, which neither way allows: each device pools whole images.
    whole = with_spec(a, (batch, None, None, features))
    pool = partial(pool_by_platform, window=_by_window, slices=_by_slices)
    return with_spec(jax.checkpoint(pool, prevent_cse=False)(whole), (batch, *places, features))


def _places_left(a: jax.Array, stride: int) -> Spec:
    """How height and width may stay split over an explicit mesh: where what is left of them can be.

    Not at all where devices hold copies of ``a``: XLA (seen with jax 0.10 and 0.12) adds up the gradient of the kernel
    over the copies as well, so that it comes out as many times too large (tests/networks/test_imagenet_transforms.py
    notices).
    """
    if is_copied(a):
        return None, None
    spec = spec_of(a)
    return tuple(spec[i] if -(-a.shape[i] // stride) % parts_along(a, i) == 0 else None for i in (1, 2))


def _by_window(a: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(a, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _by_slices(a: jax.Array) -> jax.Array:
    """Of rows first, then of columns."""
    for axis in (1, 2):
        padding = [(1, 1, 0) if i == axis else (0, 0, 0) for i in range(4)]
        padded = lax.pad(a, jnp.asarray(-jnp.inf, a.dtype), padding)
        last = 2 * ((a.shape[axis] + 1) // 2) - 1
        a, *others = (lax.slice_in_dim(padded, i, i + last, 2, axis) for i in range(3))
        a = reduce(jnp.maximum, others, a)
    return a
