"""The problem of the tests of transformations, and how two answers to it are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn import BNParams, BNState, bn_apply, bn_update_stats

N, C = 6, 3
CASES = (
    "plain",
    "masked",
    "empty mask",
    "mask differing between channels",
    "nan",
    "offset",
    "bf16",
    "one example",
)
HOSTILE = pytest.mark.parametrize(
    ("case", "train"),
    [(c, t) for c in CASES for t in (True, False) if not (t and c == "one example")],
    ids=lambda v: v if isinstance(v, str) else "train" if v else "eval",
)


def problem(case="plain", members=()):
    """(params, state, x, mask); each leaf with the leading axes ``members``."""
    rng = np.random.default_rng(0)
    n = 1 if case == "one example" else N
    x = rng.normal(size=(*members, n, C)) + (1e3 if case == "offset" else 0)
    if case == "nan":
        x[..., 0, 1] = np.nan
    mask = {
        "masked": rng.random((*members, n, 1)) < 0.6,
        "empty mask": np.zeros((*members, n, 1), bool),
        "mask differing between channels": rng.random((*members, n, C)) < 0.6,
    }.get(case)
    gamma, beta, mean, var = np.float32(rng.normal(size=(4, *members, C)))
    params = BNParams(jnp.asarray(gamma), jnp.asarray(beta))
    count = jnp.asarray(rng.integers(0, 5, (*members, C)), jnp.int32)
    state = BNState(jnp.asarray(mean), jnp.asarray(var**2 + 0.5), count)
    dtype = jnp.bfloat16 if case == "bf16" else jnp.float32
    return params, state, jnp.asarray(x, dtype), None if mask is None else jnp.asarray(mask)


def step(params, state, x, mask=None, *, train, **options):
    """Everything that a layer computes: (y, stats, new state)."""
    y, stats = bn_apply(params, state, x, train=train, mask=mask, **options)
    return y, stats, bn_update_stats(state, stats)


def loss(params, x, state, mask=None, *, train):
    y, stats, _ = step(params, state, x, mask, train=train)
    shown = True if mask is None else mask
    y = jnp.sum(jnp.where(shown, jnp.sin(y.astype(jnp.float32)), 0))
    return y + jnp.sum(jnp.cos(stats.mean) + jnp.sqrt(stats.var + 1))


def assert_equal(got, expected, tolerance=2e-6):
    """To a few rounding errors: fused, the same formula rounds at other places; NaN where NaN is expected."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        ulp = 2.0**-7 if a.dtype == jnp.bfloat16 else 0
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=tolerance + ulp, atol=(tolerance + ulp) * scale)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)
