"""The plain formula in jax.numpy, to be differentiated and transformed by JAX itself; imports no jbn."""

import jax.numpy as jnp
from jax import lax


def axes_of(axis, ndim):
    """(feature axes ascending, the other axes)."""
    axes = sorted(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
    return axes, tuple(a for a in range(ndim) if a not in axes)


def moments(x, mask=None, *, axis=-1):
    """(mean, biased variance, count) of the values that count, in two passes."""
    _, others = axes_of(axis, x.ndim)
    ones = jnp.ones_like(x) if mask is None else jnp.where(mask, jnp.ones_like(x), 0)
    total = lambda v: jnp.sum(jnp.where(ones > 0, v, 0), others, keepdims=True)  # noqa: E731
    m = jnp.sum(ones, others, keepdims=True)
    mean = total(x) / jnp.maximum(m, 1)
    var = total((x - mean) ** 2) / jnp.maximum(m, 1)
    return tuple(lax.squeeze(v, others) for v in (mean, var, m))


def normalize(x, gamma, beta, mean, var, eps, *, axis=-1):
    """γ·(x−μ)/√(σ²+ε) + β."""
    _, others = axes_of(axis, x.ndim)
    gamma, beta, mean, var = (lax.expand_dims(v, others) for v in (gamma, beta, mean, var))
    return gamma * (x - mean) / jnp.sqrt(var + eps) + beta


def train(x, gamma, beta, eps, mask=None, *, axis=-1):
    """(y, mean, var) of batch normalization in training."""
    mean, var, _ = moments(x, mask, axis=axis)
    return normalize(x, gamma, beta, mean, var, eps, axis=axis), mean, var
