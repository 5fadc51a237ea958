"""Variants by composition: ghost batches are another shape of x, renormalization another γ and β."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._moments import Moments
from jbn._normalize import Layout
from jbn._pytrees import BNState

__all__ = ["in_blocks", "renormalized"]


def in_blocks(layout: Layout, x: jax.Array, mask: jax.Array | None) -> tuple[Layout, jax.Array, jax.Array | None]:
    """x and mask with the leading axis cut into blocks, and a layout in which each block has features of its own.

    References:
        Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", section 4.
    """
    assert layout.ghost_size is not None
    blocks = (x.shape[0] // layout.ghost_size, layout.ghost_size)
    if mask is not None:
        mask = mask.reshape(((1, 1) if mask.shape[0] == 1 else blocks) + mask.shape[1:])
    reduce_axes = tuple(a + 1 for a in layout.reduce_axes)
    return (
        layout._replace(reduce_axes=reduce_axes, names=(), groups=None, ghost_size=None),
        x.reshape(blocks + x.shape[1:]),
        mask,
    )


def renormalized(
    gamma: jax.Array, beta: jax.Array, eps: jax.Array, moments: Moments, state: BNState, limits: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """γ·r and γ·d + β, with which normalizing by the batch is normalizing by the running statistics, to a limit.

    r = σ_B/σ within [1/r_max, r_max] and d = (μ_B−μ)/σ within ±d_max, for σ = √(var+ε) on both sides, carry no
    gradient. Where nothing has been averaged yet r = 1 and d = 0.

    References:
        Ioffe 2017, "Batch Renormalization", Algorithm 1.
    """
    mean, var, count = (jnp.broadcast_to(v, moments.mean.shape) for v in lax.stop_gradient(state))
    dtype = moments.mean.dtype
    r_max, d_max = (jnp.asarray(limit, dtype) for limit in limits)
    scale = lax.rsqrt(var.astype(dtype) + eps)
    r = jnp.clip(jnp.sqrt(moments.var + eps) * scale, 1 / r_max, r_max)
    d = jnp.clip(((moments.mean - mean.astype(dtype)) + moments.delta) * scale, -d_max, d_max)
    r, d = lax.stop_gradient((jnp.where(count > 0, r, 1), jnp.where(count > 0, d, 0)))
    return gamma * r, gamma * d + beta
