"""`normalize_inputs`: the training set standardized, and the test set with the same statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, bits, relative_error

from jbn import BNStats, normalize_inputs

X64 = jax.config.jax_enable_x64
DTYPES = ["float16", "bfloat16", "float32"] + ["float64"] * X64


def wide(dtype):
    return "float64" if dtype == "float64" else "float32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((20, 5), -1), ((6, 4, 3, 5), -1), ((6, 5, 4, 3), 1), ((9, 4, 3), (1, 2))], ids=str
)
def test_the_training_set_gets_mean_zero_and_variance_one(shape, axis, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 3 + 7, dtype)
    z, stats = normalize_inputs(x, axis=axis)
    want = oracle.moments(x, axis)
    assert (z.dtype, z.shape) == (x.dtype, x.shape)
    assert (stats.mean.dtype, stats.var.dtype, stats.count.dtype) == (wide(dtype), wide(dtype), "float32")
    for got, expected in zip(stats, want, strict=True):
        assert_close(got, expected)
    assert_close(z, oracle.normalize(x, None, None, want.mean, want.var, 0.0, axis), roundings=32)


def test_the_test_set_is_normalized_with_the_statistics_of_the_training_set():
    rng = np.random.default_rng(0)
    train, test = (jnp.asarray(rng.normal(size=(n, 5)) * 3 + 7, jnp.float32) for n in (50, 7))
    _, stats = normalize_inputs(train)
    z, again = normalize_inputs(test, stats)
    assert list(map(bits, again)) == list(map(bits, stats))
    assert_close(z, oracle.normalize(test, None, None, *oracle.moments(train)[:2], 0.0), roundings=32)


def test_given_back_its_own_statistics_the_training_set_comes_out_the_same():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 5)) * 3 + 7, jnp.float32)
    z, stats = normalize_inputs(x)
    assert_close(normalize_inputs(x, stats)[0], z)


def test_one_row_is_enough_for_the_test_set():
    stats = BNStats(jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0]), jnp.full(2, 10.0))
    z, _ = normalize_inputs(jnp.array([[3.0, 5.0]]), stats)
    assert z.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -12345.678, 3.3e-7, 7.7e8])
@pytest.mark.parametrize("rows", [7, 1000])
def test_a_constant_feature_gives_exactly_zero_and_has_variance_zero(constant, rows):
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    x[:, 1] = constant
    z, stats = normalize_inputs(x)
    assert not np.asarray(z)[:, 1].any()
    assert stats.var[1] == 0
    assert stats.mean[1] == x[0, 1]
    assert_close(z[:, np.array([0, 2])], oracle.batch_norm(x[:, [0, 2]], eps=0.0))


@pytest.mark.parametrize("constant", [0.1, -12345.678])
def test_a_feature_constant_in_training_gives_zero_in_the_test_set_whatever_it_holds_there(constant):
    _, stats = normalize_inputs(np.full((10, 2), constant, np.float32))
    z, _ = normalize_inputs(np.array([[constant, 5.0], [0.0, -5.0]], np.float32), stats)
    assert z.tolist() == [[0, 0], [0, 0]]


def test_a_single_row_is_constant_and_gives_zero():
    z, stats = normalize_inputs(jnp.array([[3.0, -1.0]]))
    assert z.tolist() == [[0, 0]]
    assert (stats.mean.tolist(), stats.var.tolist(), stats.count.tolist()) == ([3, -1], [0, 0], [1, 1])


def test_an_empty_set_is_nothing_seen():
    z, stats = normalize_inputs(jnp.zeros((0, 3)))
    assert z.shape == (0, 3)
    assert all(leaf.tolist() == [0, 0, 0] for leaf in stats)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_integers_and_booleans_become_float32(dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, size=(30, 4)).astype(dtype)
    z, stats = normalize_inputs(x)
    assert (z.dtype, stats.mean.dtype) == ("float32", "float32")
    assert_close(z, oracle.batch_norm(x, eps=0.0), roundings=32)
    assert normalize_inputs(x[:3], stats)[0].dtype == "float32"


def test_lists_are_arrays():
    z, _ = normalize_inputs([[1, 2], [3, 2]])
    assert z.tolist() == [[-1, 0], [1, 0]]


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_eps_is_added_to_the_variance_and_not_stored(eps):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 5)), jnp.float32)
    z, stats = normalize_inputs(x, eps=eps)
    assert_close(z, oracle.batch_norm(x, eps=eps))
    assert_close(stats.var, oracle.moments(x).var)
    assert_close(normalize_inputs(x, stats, eps=eps)[0], z)


def test_inputs_far_from_zero_are_standardized_exactly():
    x = (np.random.default_rng(0).normal(size=(500, 3)) + 1e4).astype(np.float32)
    z, stats = normalize_inputs(x)
    assert relative_error(stats.var, oracle.moments(x).var) < 1e-5
    assert np.abs(oracle.float64(z) - oracle.batch_norm(x, eps=0.0)).max() < 3e-5


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_inputs_of_any_unit_are_standardized(scale):
    x = (np.random.default_rng(0).normal(size=(50, 3)) * scale).astype(np.float32)
    assert_close(normalize_inputs(x)[0], oracle.batch_norm(x, eps=0.0))


def test_one_bad_feature_does_not_touch_the_others():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    x[4, 1] = np.nan
    z, _ = normalize_inputs(x)
    assert_close(z[:, np.array([0, 2])], oracle.batch_norm(x[:, [0, 2]], eps=0.0))


def test_it_works_under_jit_and_vmap_and_is_differentiable_in_x():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 20, 3)) + 1, jnp.float32)
    z, stats = normalize_inputs(x[0])
    compiled, compiled_stats = jax.jit(normalize_inputs)(x[0])
    assert_close(compiled, z)
    assert_close(compiled_stats.var, stats.var)
    mapped, _ = jax.vmap(normalize_inputs)(x)
    assert_close(mapped[0], z)
    dx = jax.grad(lambda x: (normalize_inputs(x, stats)[0] ** 2).sum())(x[1])
    want = 2 * (oracle.float64(x[1]) - oracle.float64(stats.mean)) / oracle.float64(stats.var)
    assert_close(dx, want)
