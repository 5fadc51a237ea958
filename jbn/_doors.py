"""What several doors to other frameworks need, and the little arithmetic that their conventions ask for."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core import apply_unchecked, bn_update_stats
from jbn._normalize import Layout
from jbn._pytrees import BNParams, BNState, BNStats
from jbn._shardings import laid_out_like

__all__ = ["any_complex", "blended", "feature_axes", "keras_average", "keras_renorm", "missing", "normalized"]


def missing(door: str, package: str, extra: str) -> ModuleNotFoundError:
    """The error of a door whose framework is not installed."""
    return ModuleNotFoundError(
        f"jbn.{door}: got no package {package}; expected it to be installed; run pip install 'jbn[{extra}]'."
    )


def keras_average(mean: jax.Array, var: jax.Array, stats: BNStats, momentum: float) -> BNState:
    """Keras's moving averages: d·running + (1−d)·batch, with no correction of the start, nor of the variance.

    They come in the dtype of the statistics. ``count`` is 1 where a channel was averaged, and 0 where it was left
    as it was, since its batch held nothing or something that is not finite.
    """
    dtype = stats.mean.dtype
    state = BNState(mean.astype(dtype), var.astype(dtype), jnp.zeros(mean.shape, jnp.int32))
    return bn_update_stats(state, stats, momentum=momentum, debias=False, unbiased=False)


def keras_renorm(
    stats: BNStats, mean: jax.Array, std: jax.Array, eps: float, clipping: dict[str, Any]
) -> tuple[jax.Array, jax.Array, BNStats]:
    """Keras's batch renormalization against the averages ``mean`` and ``std``, each (C,), of μ_B and σ_B = √(var_B+ε).

    Returns r = σ_B/σ within [rmin, rmax] and d = (μ_B−μ)/σ within ±dmax, for σ = max(std, √ε), without gradient; and
    the statistics with σ_B in the place of the variance, which is what Keras averages.

    References:
        Ioffe 2017, "Batch Renormalization", Algorithm 1, where rmin = 1/rmax.
    """
    mean, std = mean.astype(stats.mean.dtype), std.astype(stats.mean.dtype)
    spread = jnp.sqrt(stats.var + eps)
    std = jnp.maximum(std, eps**0.5)
    dmax = clipping.get("dmax")
    r = jnp.clip(spread / std, clipping.get("rmin"), clipping.get("rmax"))
    d = jnp.clip((stats.mean - mean) / std, None if dmax is None else -dmax, dmax)
    return lax.stop_gradient(r), lax.stop_gradient(d), BNStats(stats.mean, spread, stats.count)


def any_complex(*values: Any) -> bool:
    """Whether an array or dtype among them is complex, which jbn leaves to the framework; a None is not."""
    return any(jnp.issubdtype(jnp.result_type(v), jnp.complexfloating) for v in values if v is not None)


def feature_axes(axis: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    """One feature axis or several of ``ndim`` axes, negative ones counted from the end, in ascending order."""
    axes = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({a + ndim if a < 0 else a for a in axes}))


def normalized(
    params: BNParams,
    moments: tuple[jax.Array, jax.Array],
    x: jax.Array,
    *,
    train: bool,
    axes: tuple[int, ...],
    eps: Any,
    dtype: Any,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, BNStats]:
    """``(y, stats)`` of `bn_apply`, for what frameworks allow beyond it.

    Args:
        params: γ and β, each of the sizes of x along ``axes``, or None.
        moments: running mean and variance, of those sizes.
        x: real numbers, integers included.
        train: whether to normalize with the statistics of x.
        axes: the feature axes, ascending and not negative.
        eps: ε.
        dtype: of y. The arithmetic is float32 whatever it is, or float64 where x or y is.
        mask: bools or numbers that broadcast against x; a value counts where they are not 0.
        axis_name: a name, or several, of axes along which the statistics are synchronized in training.
        axis_index_groups: lists of indices along ``axis_name``, each synchronized by itself.

    Raises:
        ValueError: a mask that does not broadcast against x.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64 or not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"mask: got shape {mask.shape}; expected one that broadcasts against {x.shape}, the shape of x; "
                f"add axes of size 1 or remove some."
            )
    names: tuple[Any, ...] = ()
    if train and axis_name is not None:
        names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    groups = tuple(map(tuple, axis_index_groups)) if names and axis_index_groups is not None else None
    reduce_axes = tuple(a for a in range(x.ndim) if a not in axes)
    mean, var = moments
    many = jnp.full(mean.shape, jnp.iinfo(jnp.int32).max, jnp.int32)  # how many updates they hold is not recorded
    layout = Layout(reduce_axes, names, groups, train, dtype=dtype)
    return apply_unchecked(layout, params, BNState(mean, var, many), x, eps, mask)


def blended(moments: tuple[jax.Array, jax.Array], stats: BNStats, momentum: Any) -> tuple[jax.Array, jax.Array]:
    """Running mean and variance after a batch: d·running + (1−d)·batch, d the momentum; biased and not debiased.

    A channel that saw nothing, or whose result is not finite, keeps what it had, and dtypes and shardings stay:
    as in `bn_update_stats`, but for the arithmetic, which is float32 also for narrow moments, and for gradients,
    which flow.
    """
    wide = [jnp.promote_types(old.dtype, jnp.float32) for old in moments]
    batch = (laid_out_like(new, old) for old, new in zip(moments, (stats.mean, stats.var), strict=True))
    moved = [
        (momentum * old.astype(dtype) + (1 - momentum) * new.astype(dtype)).astype(old.dtype)
        for old, new, dtype in zip(moments, batch, wide, strict=True)
    ]
    usable = (laid_out_like(stats.count, moments[0]) > 0) & jnp.isfinite(moved[0]) & jnp.isfinite(moved[1])
    mean, var = (jnp.where(usable, new, old) for old, new in zip(moments, moved, strict=True))
    return mean, var
