"""The pooling of the stem: windows, as a TPU has them, or slices, and the plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_imagenet import patches

from jbn.networks import _convolution as convolution

SIZES = [(1, 1), (2, 3), (7, 8), (8, 7)]
WAYS = {"windows": convolution._by_window, "slices": convolution._by_slices}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_ways_give_the_largest_of_each_window_and_its_gradient(way, size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)), jnp.float32)
    want = patches(np, np.asarray(x), 3, 2, fill=-np.inf).max(0)
    got, pullback = jax.vjp(WAYS[way], x)
    np.testing.assert_array_equal(got, want)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=want.shape), jnp.float32)
    (gradient,) = pullback(cotangent)
    exact = np.zeros_like(x)
    for n, i, j, c in np.ndindex(want.shape):
        place = np.argwhere(np.asarray(x)[n, :, :, c] == want[n, i, j, c])[0]
        exact[n, *place, c] += cotangent[n, i, j, c]
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_stays_and_minus_infinity_and_nan_are_values(dtype):
    x = jnp.full((1, 3, 3, 2), -jnp.inf, dtype).at[0, 2, 2, 1].set(jnp.nan)
    for way in WAYS.values():
        y = way(x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y[..., 0].astype(jnp.float32), np.full((1, 2, 2), -np.inf))
        np.testing.assert_array_equal(jnp.isnan(y[0, :, :, 1]), [[False, False], [False, True]])


def test_only_its_argument_is_kept_for_the_backward_pass():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    _, vjp = jax.eval_shape(partial(jax.vjp, convolution.max_pool), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(vjp)) == x.size


def test_a_tpu_takes_windows_and_all_others_slices():
    def names(platform):
        lowered = jax.jit(convolution.max_pool).trace(jnp.ones((1, 8, 8, 1))).lower(lowering_platforms=(platform,))
        return lowered.as_text()

    assert "reduce_window" in names("tpu")
    for platform in ("cpu", "cuda"):
        assert "reduce_window" not in names(platform)
