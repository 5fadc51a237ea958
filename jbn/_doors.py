"""What several doors to other frameworks need, and the little arithmetic that their conventions ask for."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core import bn_update_stats
from jbn._pytrees import BNState, BNStats

__all__ = ["keras_average", "keras_renorm", "missing"]


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
