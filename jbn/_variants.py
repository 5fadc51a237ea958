"""Variants by composition: ghost batches are another shape of x, renormalization another γ and β."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._normalize import Layout
from jbn._pool import Moments
from jbn._pytrees import BNState
from jbn._shardings import cut, laid_out_like, reshaped, spec_of

__all__ = ["in_blocks", "out_of_blocks", "renormalized"]


def in_blocks(layout: Layout, x: jax.Array, mask: jax.Array | None) -> tuple[Layout, jax.Array, jax.Array | None]:
    """x and mask with the leading axis cut into blocks, and a layout in which each block has features of its own.

    References:
        Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", section 4.
    """
    reduce_axes = tuple(a + 1 for a in layout.reduce_axes)
    inner = layout._replace(reduce_axes=reduce_axes, names=(), groups=None, ghost_size=None)
    size: Any = layout.ghost_size
    blocks = (x.shape[0] // size, size)
    if mask is not None:
        mask = cut(mask, *((1, 1) if mask.shape[0] == 1 else blocks), between=True)
    return inner, cut(x, *blocks, between=True), mask


def out_of_blocks(y: jax.Array, like: jax.Array) -> jax.Array:
    """The blocks put together again, in the shape and the layout of ``like``."""
    return reshaped(y, like.shape, spec_of(like))


def renormalized(
    gamma: jax.Array, beta: jax.Array, eps: jax.Array, moments: Moments, state: BNState, limits: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """γ·r and γ·d + β, with which normalizing by the batch is normalizing by the running statistics, to a limit.

    r = σ_B/σ within [1/r_max, r_max] and d = (μ_B−μ)/σ within ±d_max, for σ = √(var+ε) on both sides, carry no
    gradient. Where nothing has been averaged yet r = 1 and d = 0.

    References:
        Ioffe 2017, "Batch Renormalization", Algorithm 1.
    """
    like = moments.mean_hi
    mean, var, count = (laid_out_like(jnp.broadcast_to(v, like.shape), like) for v in lax.stop_gradient(state))
    dtype = like.dtype
    r_max, d_max = (jnp.asarray(limit, dtype) for limit in limits)
    scale = lax.rsqrt(var.astype(dtype) + eps)
    r = jnp.clip(jnp.sqrt(moments.var + eps) * scale, 1 / r_max, r_max)
    d = jnp.clip(((moments.mean_hi - mean.astype(dtype)) + moments.mean_lo) * scale, -d_max, d_max)
    r, d = lax.stop_gradient((jnp.where(count > 0, r, 1), jnp.where(count > 0, d, 0)))
    return gamma * r, gamma * d + beta
