"""The way in which moments are measured off the CPU, run on it: one read, shifted by the mean of a sample."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.closeness import relative_error

from jbn import _measure

LAYOUTS = {
    "rows": ((100_000, 4), (0,)),
    "few rows": ((130, 700), (0,)),
    "NHWC": ((8, 40, 24, 16), (0, 1, 2)),
    "NCHW": ((8, 16, 40, 24), (0, 2, 3)),
    "sequence": ((16, 200, 8), (0, 1)),
    "one example": ((1, 64, 64, 8), (0, 1, 2)),
    "features first": ((8, 30_000), (1,)),
}


@partial(jax.jit, static_argnums=1)
def by_sample(x, reduce_axes):
    count = _measure._count(x, None, reduce_axes, jnp.float32)
    return _measure._as_moments(_measure._about_sample(reduce_axes, x, None, 1 / count), count)


def variance_error(x, reduce_axes):
    x64 = np.asarray(x, np.float64)
    mean_hi, mean_lo, var, _ = by_sample(jnp.asarray(x), reduce_axes)
    far = np.abs(np.asarray(mean_hi, np.float64) + np.asarray(mean_lo) - x64.mean(reduce_axes)) / x64.std(reduce_axes)
    return relative_error(var, x64.var(reduce_axes)), far.max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_about_a_sample_are_exact_at_any_offset(layout):
    shape, reduce_axes = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    for ratio in (0, 1, 4, 1e2, 1e4):
        x = (rng.normal(size=shape) + ratio).astype(np.float32)
        var_error, mean_error = variance_error(x, reduce_axes)
        assert var_error < 1e-5, ratio
        assert mean_error < 1e-6, ratio


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_worst_data_there_is_four_bits_are_lost_and_no_more(layout):
    """All of the sample here, all of the rest there."""
    shape, reduce_axes = LAYOUTS[layout]
    sampled = jax.linear_transpose(
        lambda x: _measure._sample_mean(x, reduce_axes, jnp.float32), jnp.zeros(shape, jnp.float32)
    )(jnp.ones([n for a, n in enumerate(shape) if a not in reduce_axes], jnp.float32))[0]
    sampled = np.asarray(sampled) > 0
    assert 1 / 16 - 1e-3 < sampled.mean() < 1 / 8
    x = np.where(sampled, 3.0, 1.0) + 1e-4 * np.random.default_rng(1).normal(size=shape)
    assert variance_error(x.astype(np.float32), reduce_axes)[0] < 1e-5


def test_the_sample_reads_whole_rows_and_leaves_a_sharded_batch_alone_where_it_can():
    jaxpr = jax.make_jaxpr(lambda x: _measure._sample_mean(x, (0, 1, 2), jnp.float32))(jnp.zeros((32, 64, 64, 8)))
    (strides,) = [eqn.params["strides"] for eqn in jaxpr.eqns if eqn.primitive.name == "slice"]
    assert strides == (1, 4, 4, 1)
