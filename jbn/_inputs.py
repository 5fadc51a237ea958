"""Input normalization: the data themselves, standardized with the statistics of the training set."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks, _checks_axes, _checks_layer
from jbn._measure import measure
from jbn._normalize import Layout, normalize
from jbn._pool import Moments, as_stats
from jbn._pytrees import BNStats
from jbn._shardings import filled_like, spec_of, with_spec

__all__ = ["normalize_inputs"]


def normalize_inputs(
    x: Any, stats: BNStats | None = None, *, axis: int | tuple[int, ...] = -1, eps: Any = 0.0
) -> tuple[jax.Array, BNStats]:
    """Standardizes inputs with the statistics of the training set: z = (x−μ)/√(σ²+ε).

    The statistics are constants of the data: no gradient flows through them to x, so that dz/dx = 1/√(σ²+ε) for
    each value alone, and the returned ones carry none.

    Args:
        x: the data, with the feature sizes C along ``axis``; integers become float32.
        stats: None for the training set; for the test set, the `BNStats` that the training set gave.
        axis: the feature axis, or axes (static).
        eps: ε ≥ 0, added to the variance.

    Returns:
        ``(z, stats)``: z of x's shape (and dtype, if floating) and the statistics used, (C,). A
        feature that is constant in the training set gives 0.

    Raises:
        TypeError: x not real numbers, ``stats`` not `BNStats`.
        ValueError: ``axis`` or the shape of ``stats`` does not fit, ``eps`` < 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import normalize_inputs
        >>> z, stats = normalize_inputs(jnp.array([[1.0, 7.0], [3.0, 7.0]]))
        >>> z
        Array([[-1.,  0.],
               [ 1.,  0.]], dtype=float32)
        >>> z_test, _ = normalize_inputs(jnp.array([[5.0, 7.0]]), stats)
        >>> z_test
        Array([[3., 0.]], dtype=float32)

    Keras has a ``Normalization`` layer for this, scikit-learn a ``StandardScaler``.

    References:
        LeCun, Bottou, Orr & Müller 1998, "Efficient BackProp", section 4.3.
    """
    x = _checks.as_data("x", x)
    axes = _checks_axes.as_axes(axis, x.ndim)
    reduce_axes = tuple(a for a in range(x.ndim) if a not in axes)
    eps = _checks_layer.as_input_eps(eps)
    if stats is not None:
        stats = _checks_layer.as_stats(stats, tuple(x.shape[a] for a in axes))
    return _standardized(reduce_axes, x, stats, eps)


@partial(jax.jit, static_argnums=0)
def _standardized(reduce_axes, x, stats, eps):
    dtype = _checks.compute_dtype(x.dtype)
    if stats is None:
        moments = measure(x, None, reduce_axes, dtype)
        # Rounding leaves a constant feature a variance of some 1e-16: it is 0, and so is its output.
        least = jnp.min(x.astype(dtype), reduce_axes, initial=jnp.inf)
        most = jnp.max(x.astype(dtype), reduce_axes, initial=-jnp.inf)
        moments = moments._replace(var=jnp.where(least < most, moments.var, 0))
    else:
        features = [entry for a, entry in enumerate(spec_of(x)) if a not in reduce_axes]
        mean, var, count = (
            with_spec(jnp.asarray(v).astype(dtype), features, mesh_of=x) for v in lax.stop_gradient(stats)
        )
        moments = Moments(mean, filled_like(mean, 0), var, count)
    exact = not jnp.issubdtype(x.dtype, jnp.floating)  # converted where it is read, not to an array of its own
    layout = Layout(reduce_axes, train=False, dtype=dtype if exact else None)
    spread = moments.var + jnp.asarray(eps, dtype)
    gamma = jnp.where(spread > 0, 1, 0).astype(dtype)
    safe = moments._replace(var=jnp.where(spread > 0, spread, 1))
    z, _ = normalize(layout, x, gamma, filled_like(gamma, 0), jnp.zeros((), dtype), safe, None)
    return z, as_stats(moments)
