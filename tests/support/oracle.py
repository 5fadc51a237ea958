"""The plain formula and its gradients in NumPy float64.

Imports neither jax nor jbn, and shares no algebra with them: moments by two passes, gradients by the
chain rule from y to μ and σ² to x, term by term.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray


class Gradients(NamedTuple):
    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eps: np.ndarray


def float64(x):
    return np.asarray(x).astype(np.float64)


def feature_axes(axis, ndim):
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(sorted(a % ndim for a in axes))


def reduce_axes(axis, ndim):
    return tuple(a for a in range(ndim) if a not in feature_axes(axis, ndim))


def over(vector, x, axis):
    """A vector of the feature shape, laid out to broadcast against x."""
    return np.expand_dims(float64(vector), reduce_axes(axis, np.ndim(x)))


def moments(x, axis=-1, mask=None):
    """Mean, biased variance and count of the values that count; 0 where nothing does."""
    x = float64(x)
    reduced = reduce_axes(axis, x.ndim)
    counts = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    m = counts.sum(reduced)
    mean = np.where(counts, x, 0).sum(reduced) / np.maximum(m, 1)
    squares = np.square(np.where(counts, x - over(mean, x, axis), 0))
    return Moments(mean, squares.sum(reduced) / np.maximum(m, 1), float64(m))


def normalize(x, gamma, beta, mean, var, eps=1e-5, axis=-1):
    """γ·(x−μ)/√(σ²+ε) + β, with γ and β of None as 1 and 0."""
    x = float64(x)
    gamma = np.ones_like(mean) if gamma is None else gamma
    beta = np.zeros_like(mean) if beta is None else beta
    mean, var, gamma, beta = (over(v, x, axis) for v in (mean, var, gamma, beta))
    return gamma * (x - mean) / np.sqrt(var + eps) + beta


def batch_norm(x, gamma=None, beta=None, eps=1e-5, axis=-1, mask=None):
    """Training: normalized by the moments of x."""
    mean, var, _ = moments(x, axis, mask)
    return normalize(x, gamma, beta, mean, var, eps, axis)


def gradients(x, g, gamma=None, eps=1e-5, axis=-1, mask=None, g_mean=0.0, g_var=0.0):
    """Of Σ g·y + Σ g_mean·μ + Σ g_var·σ² in training, for values that are all finite."""
    x, g = float64(x), float64(g)
    reduced = reduce_axes(axis, x.ndim)
    mean, var, m = moments(x, axis, mask)
    counts = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    gamma = np.ones_like(mean) if gamma is None else float64(gamma)
    centred = x - over(mean, x, axis)
    r = 1 / np.sqrt(var + eps)
    to_var = (g * centred).sum(reduced) * gamma * -0.5 * r**3
    to_mean = -gamma * r * g.sum(reduced)
    through_var = 2 * over(to_var + g_var, x, axis) * centred
    through_mean = over(to_mean + g_mean, x, axis)
    moved = np.where(counts, through_var + through_mean, 0) / over(np.maximum(m, 1), x, axis)
    return Gradients(
        x=g * over(gamma * r, x, axis) + moved,
        gamma=(g * centred).sum(reduced) * r,
        beta=g.sum(reduced),
        eps=to_var.sum(),
    )


def merge(parts):
    """Moments of the union, by weighting raw second moments about the common mean."""
    mean, var, count = (np.stack([float64(p[i]) for p in parts]) for i in range(3))
    total = count.sum(0)
    share = count / np.where(total > 0, total, 1)
    pooled = (share * mean).sum(0)
    return Moments(pooled, (share * (var + np.square(mean - pooled))).sum(0), total)


def weight(t, momentum, debias=True):
    """The share w of the batch at update t: the loop behind (1−d)/(1−dᵗ), which d = 1 does not break."""
    return 1 / sum(momentum**k for k in range(t)) if debias else 1 - momentum
