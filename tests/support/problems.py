"""One way to pose a problem: a batch and all that a layer needs for it, in which nothing is 0, 1 or equal by chance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from support import oracle

from jbn import BNParams, BNState


class Problem(NamedTuple):
    params: BNParams
    state: BNState
    x: jax.Array
    mask: jax.Array | None
    weights: jax.Array  # of the outputs in a loss


def pose(
    shape: tuple[int, ...],
    axis: Any = -1,
    *,
    dtype: Any = "float32",
    offset: float = 0.0,
    mask: tuple[int, ...] | None = None,
    members: tuple[int, ...] = (),
    seed: int = 0,
) -> Problem:
    """Each channel of x has a mean, about ``offset``, and a spread of its own.

    ``mask`` is the shape of one in which two values of three count. Each array has the leading axes ``members``. All
    but x is float32, or float64 where x is.
    """
    rng = np.random.default_rng(seed)
    features = (*members, *(shape[a] for a in oracle.feature_axes(axis, len(shape))))
    others = tuple(len(members) + a for a in oracle.reduce_axes(axis, len(shape)))
    mean, running_mean, beta = rng.normal(size=(3, *features))
    spread, running_var, gamma = rng.uniform(0.5, 2, size=(3, *features))
    noise, weights = rng.normal(size=(2, *members, *shape))
    x = noise * np.expand_dims(spread, others) + np.expand_dims(mean, others) + offset
    wide = "float64" if jnp.dtype(dtype) == "float64" else "float32"
    state = BNState(
        jnp.asarray(running_mean + offset, wide),
        jnp.asarray(running_var, wide),
        jnp.asarray(rng.integers(1, 6, features), jnp.int32),
    )
    counts = None if mask is None else jnp.asarray(rng.random((*members, *mask)) < 2 / 3)
    params = BNParams(jnp.asarray(gamma, wide), jnp.asarray(beta, wide))
    return Problem(params, state, jnp.asarray(x, dtype), counts, jnp.asarray(weights, wide))
