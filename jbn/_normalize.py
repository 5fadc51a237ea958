"""The kernel: normalize by given moments, and its one derivative rule.

Forward, for each channel, with r = 1/√(σ²+ε) and x̂ = (x−μ)·r:

    y = γ·x̂ + β

In training μ and σ² are the moments of x, so that ẋ moves them too: μ̇ = mean(ẋ) and
½·(σ²)˙ = mean((x−μ)·ẋ). Put in, and grouped per channel *before* anything meets x̂:

    ẏ = x̂·(γ̇ − γr·A) + (β̇ − γr·B) + γr·ẋ,     A = ½·r·((σ²)˙ + ε̇),  B = μ̇

The order is the cost. Transposed, this has two reductions, Σg·x̂ and Σg: they are the gradients of γ
and β, and all that A and B need as well; one residual of the size of x, which is x; and under
``axis_name`` one collective, because the two vectors travel together. In the textbook order the same
mathematics costs four reductions and two collectives. In evaluation A and B come from the tangents
of the running statistics, and the rest is the same.

One ``custom_jvp`` gives forward mode, reverse mode and all higher orders: the rule calls the kernel,
whose outputs include μ and σ², so what it computes from them is differentiated right again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jbn._collectives import Groups, Names, as_varying, sum_over, varying_axes
from jbn._pool import Moments
from jbn._shardings import broadcast_like, filled_like
from jbn._xla import narrow_select, sum_of_terms, unshared

__all__ = ["Layout", "normalize"]

# Only the arguments of such a piece are kept for backward: x in its own dtype and vectors of size C.
# Its intermediates, x − μ in float32 above all, are made again inside the fusion that needs them.
_recomputed = partial(
    jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable, static_argnums=(0,)
)


class Layout(NamedTuple):
    """What is static about a call."""

    reduce_axes: tuple[int, ...]
    names: Names = ()  # named axes over which the moments are pooled
    groups: Groups | None = None  # indices along them that are pooled with each other; None for all
    train: bool = True  # whether the moments are those of x
    ghost_size: int | None = None  # examples in each block that is normalized by itself; None for all
    dtype: Any = None  # of y; None for that of x


class _Known(NamedTuple):
    """What both pieces of the rule read, and differentiation does not move."""

    x: jax.Array
    mean_hi: jax.Array
    mean_lo: jax.Array
    r: jax.Array
    mask: jax.Array | None


def normalize(
    layout: Layout,
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    eps: jax.Array,
    moments: Moments,
    mask: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    """Returns y, in ``layout.dtype``, and the moments with the derivative that they have as those of x."""
    if layout.train:
        moments = lax.stop_gradient(moments)
    y, mean_hi, var = _kernel(layout, x, gamma, beta, eps, moments, mask)
    if layout.train:
        moments = Moments(mean_hi, moments.mean_lo, var, moments.count)
    return y, moments


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kernel(layout, x, gamma, beta, eps, moments, mask):
    mean_hi, mean_lo, var, _ = moments
    r = lax.rsqrt(var + eps)
    present = _present(layout, _Known(x, mean_hi, mean_lo, r, mask))
    # The rounding of the mean is made good once for each channel, in what is added.
    scale, shift, beta = _over(layout, gamma * r, beta - mean_lo * (gamma * r), beta)
    y = _apart(layout, x, mean_hi) * scale + shift
    y = y if present is None else jnp.where(present, y, beta)
    return y.astype(_dtype_of_y(layout, x)), mean_hi, var


def _dtype_of_y(layout, x):
    return x.dtype if layout.dtype is None else layout.dtype


@partial(_kernel.defjvp, symbolic_zeros=True)
def _rule(layout, primals, tangents):
    x, gamma, _, eps, moments, mask = primals
    x_dot, *vectors_dot = tangents[:5]
    y, mean_hi, var = _kernel(layout, *primals)
    r = lax.rsqrt(var + eps)
    known = _Known(x, mean_hi, moments.mean_lo, r, mask)
    # What does not move is left out, so that nothing of its size is made or kept.
    x_moves = _moves(x_dot)
    vectors_move = _moves(vectors_dot) or (layout.train and x_moves)
    gamma_dot, beta_dot, eps_dot, moments_dot = _with_zeros(vectors_dot, primals[1:5])
    if x_moves:
        x_dot = x_dot.astype(r.dtype)  # once: transposed, both parts of dx are added before they are rounded
    if not layout.train:
        half_var_dot, mean_dot = moments_dot.var / 2, moments_dot.mean_hi + moments_dot.mean_lo
    elif x_moves:
        sums = _tangent_sums(layout, known, x_dot)
        if layout.names:  # stacked for a collective only: apart they are fewer kernels
            sums = sum_over(jnp.stack(sums), layout.names, layout.groups)
        count = jnp.maximum(moments.count, 1)
        half_var_dot, mean_dot = (v / count for v in sums)
    else:
        half_var_dot = mean_dot = filled_like(mean_hi, 0)
    moving = (gamma_dot, beta_dot, half_var_dot + eps_dot / 2, mean_dot)
    y_dot = _tangent(layout, known, gamma, moving if vectors_move else None, x_dot if x_moves else None)
    return (y, mean_hi, var), (y_dot, mean_dot, 2 * half_var_dot)


def _is_zero(tangent):
    return isinstance(tangent, SymbolicZero)


def _moves(tangents):
    """Whether any of them is not known to be zero."""
    return not all(_is_zero(t) for t in jax.tree.leaves(tangents, is_leaf=_is_zero))


def _with_zeros(tangents, primals):
    """The tangents, with zeros in the place of those that are known to be zero."""
    return jax.tree.map(lambda t, p: filled_like(p, 0) if _is_zero(t) else t, tangents, list(primals), is_leaf=_is_zero)


@_recomputed
def _tangent_sums(layout, known, x_dot):
    """Σ(x−μ)·ẋ and Σẋ, each (C,), over the values that count."""
    x, mean_hi, mask = unshared((known.x, known.mean_hi, known.mask))
    centred = _apart(layout, x, mean_hi)
    if mask is not None:
        centred, x_dot = jnp.where(mask, centred, 0), jnp.where(mask, x_dot, 0)
    products, total = (jnp.sum(v, layout.reduce_axes) for v in (centred * x_dot, x_dot))
    return products - known.mean_lo * total, total


@_recomputed
def _tangent(layout, known, gamma, moving, x_dot):
    """ẏ = x̂·p + q + γr·ẋ, with p = γ̇ − γr·A and q = β̇ − γr·B for ``moving`` = (γ̇, β̇, A/r, B); a None does not move."""
    known = unshared(known)
    present = _present(layout, known)
    x, mean_hi = known.x, known.mean_hi
    if present is not None:  # transposed, the first term is a reduction, into which a selection is not pulled
        (constant,) = _over(layout, mean_hi + known.mean_lo)
        x, mean_hi = unshared((narrow_select(present, x, constant), mean_hi))
    scale = gamma * known.r
    terms = []
    if moving is not None:
        gamma_dot, beta_dot, a, b = moving
        coefficients: Any = (gamma_dot - scale * (known.r * a), beta_dot - scale * b)
        if any(varying_axes(known.x) - varying_axes(v) for v in coefficients):
            # Once for both: transposed, one collective.
            coefficients = as_varying(jnp.stack(coefficients), varying_axes(known.x))
        p, q = coefficients
        p = p * known.r
        p, q = _over(layout, p, q - known.mean_lo * p)
        terms.append(_apart(layout, x, mean_hi) * p)
        terms.append(broadcast_like(q, terms[0]))
    if x_dot is not None:
        (scale,) = _over(layout, scale)
        terms.append((x_dot if present is None else jnp.where(present, x_dot, 0)) * scale)
    dtype = _dtype_of_y(layout, known.x)
    return sum_of_terms(dtype, *terms) if terms else filled_like(known.x, 0, dtype)


def _over(layout, *vectors):
    """Vectors of shape (C,), laid out to broadcast against x."""
    return tuple(lax.expand_dims(v, layout.reduce_axes) for v in vectors)


def _apart(layout, x, mean_hi):
    (mean_hi,) = _over(layout, mean_hi)
    return x.astype(mean_hi.dtype) - mean_hi


def _present(layout, known):
    """Where x counts as itself, or None for everywhere.

    A masked value that is not finite once normalized counts as μ, as a constant; for the derivative, as μ
    rounded to the dtype of x.
    """
    if known.mask is None:
        return None
    mean_lo, r = _over(layout, known.mean_lo, known.r)
    return known.mask | jnp.isfinite((_apart(layout, known.x, known.mean_hi) - mean_lo) * r)
