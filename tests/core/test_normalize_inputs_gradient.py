"""Statistics of `normalize_inputs` are constants of the data, as its docstring says: no gradient flows through them."""

import jax
import jax.numpy as jnp
import numpy as np
from support import oracle

from jbn import normalize_inputs

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(9, 3)) * 2 + 5, jnp.float32)
G = RNG.normal(size=(9, 3)).astype(np.float32)


def test_each_value_moves_its_own_output_alone_by_one_over_sigma():
    dx = jax.grad(lambda x: jnp.sum(normalize_inputs(x)[0] * G))(X)
    sigma = np.sqrt(oracle.moments(X).var)
    np.testing.assert_allclose(dx, G / sigma, rtol=1e-5)


def test_the_returned_statistics_carry_no_gradient():
    for name in ("mean", "var"):
        dx = jax.grad(lambda x: jnp.sum(getattr(normalize_inputs(x)[1], name)))(X)  # noqa: B023
        np.testing.assert_array_equal(dx, 0)
