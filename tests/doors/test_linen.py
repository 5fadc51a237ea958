"""jbn.linen.BatchNorm is Flax's layer: a product of its options, its conventions, and where only ours is right."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.flax_support import assert_close, cases

from jbn.linen import BatchNorm

KEY = jax.random.key(0)


def outcome(layer, variables, x, mask):
    """The output, the gradients for x and the parameters, and the variables after a call."""

    def loss(params, x):
        y, updated = layer.apply({**variables, "params": params}, x, mask=mask, mutable=["batch_stats"])
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y.astype(jnp.float32) * weights), (y, updated)

    moving = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
    gradients, (y, updated) = jax.grad(loss, moving, has_aux=True)(variables.get("params", {}), x)
    return y, gradients, updated


@pytest.mark.parametrize("case", cases(), ids=str)
def test_outputs_gradients_and_variables_are_those_of_flax(case):
    x, mask = case.data()
    ours, theirs = BatchNorm(**case.arguments), nn.BatchNorm(**case.arguments)
    assert_close(ours.init(KEY, x), theirs.init(KEY, x))
    variables = case.filled(theirs.init(KEY, x))
    both = jax.jit(lambda *given: (outcome(ours, *given), outcome(theirs, *given)))
    assert_close(*both(variables, x, mask))


@pytest.mark.parametrize("function", [lambda layer: layer, lambda layer: layer.__call__])
def test_signatures_are_those_of_flax(function):
    assert inspect.signature(function(BatchNorm)) == inspect.signature(function(nn.BatchNorm))


def test_name_and_attributes_are_those_of_flax():
    assert BatchNorm.__name__ == "BatchNorm"
    assert str(BatchNorm(momentum=0.5)) == str(nn.BatchNorm(momentum=0.5))


@pytest.mark.parametrize("dtype", ["complex64", "float32"])
def test_what_is_complex_is_computed_by_flax(dtype):
    x = jax.random.normal(KEY, (8, 3)) + 1j * jax.random.normal(jax.random.key(1), (8, 3))
    options = {"use_running_average": False, "param_dtype": jnp.dtype("complex64")}
    ours, theirs = BatchNorm(**options), nn.BatchNorm(**options)
    x = x.astype(dtype) if dtype == "complex64" else x.real
    variables = theirs.init(KEY, x)
    found = [layer.apply(variables, x, mutable=["batch_stats"]) for layer in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_one_value_per_channel_gives_the_bias_and_a_variance_of_zero():
    layer = BatchNorm(use_running_average=False, momentum=0.0, bias_init=nn.initializers.constant(0.5))
    y, variables = layer.init_with_output(KEY, jnp.array([[3.0, -2.0]]))
    np.testing.assert_array_equal(y, 0.5)
    _, updated = layer.apply(variables, jnp.array([[3.0, -2.0]]), mutable=["batch_stats"])
    np.testing.assert_array_equal(updated["batch_stats"]["mean"], [3, -2])
    np.testing.assert_array_equal(updated["batch_stats"]["var"], 0)


def test_initialization_updates_nothing_and_needs_no_axis():
    layer = BatchNorm(use_running_average=False, axis_name="batch")
    stats = layer.init(KEY, jnp.ones((4, 2)))["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)
    with pytest.raises(NameError, match="batch"):
        layer.apply(layer.init(KEY, jnp.ones((4, 2))), jnp.ones((4, 2)), mutable=["batch_stats"])


def test_training_without_mutable_statistics_is_refused_as_flax_does():
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, jnp.ones((4, 2)))
    with pytest.raises(Exception, match="immutable") as refused:
        layer.apply(variables, jnp.ones((4, 2)))
    assert type(refused.value).__module__ == "flax.errors"


@pytest.mark.parametrize("use_running_average", [None, True])
def test_the_mode_is_given_once(use_running_average):
    layer = BatchNorm(use_running_average=use_running_average)
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="use_running_average"):
        layer.init(KEY, x, use_running_average=use_running_average)


@pytest.mark.parametrize("shape", [(3, 2), (1, 4, 2), (5,)])
def test_a_mask_that_does_not_broadcast_is_one_line(shape):
    layer = BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"^mask: got shape .*; expected one that broadcasts against \(4, 2\)"):
        layer.init(KEY, jnp.ones((4, 2)), mask=jnp.ones(shape, bool))


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
def test_statistics_start_in_the_dtype_of_the_parameters_where_float32_is_not_forced(param_dtype):
    options = {"use_running_average": False, "force_float32_reductions": False, "param_dtype": jnp.dtype(param_dtype)}
    ours, theirs = BatchNorm(**options), nn.BatchNorm(**options, use_fast_variance=False)
    x = jax.random.normal(KEY, (16, 3)).astype(param_dtype)
    variables = theirs.init(KEY, x)
    assert_close(ours.init(KEY, x), variables)
    assert_close(*(layer.apply(variables, x, mutable=["batch_stats"]) for layer in (ours, theirs)))


@pytest.mark.parametrize("fast", [True, False])
def test_a_large_mean_costs_no_digits_whatever_use_fast_variance_says(fast):
    noise = jax.random.normal(KEY, (256, 3))
    x = noise + jnp.array([1e4, -3e3, 0])
    layer = BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=fast)
    y, updated = layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(updated["batch_stats"]["var"], exact.var(0), rtol=1e-5)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), atol=1e-4)
    stock = nn.BatchNorm(use_running_average=False, momentum=0.0)
    _, theirs = stock.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
    assert abs(theirs["batch_stats"]["var"][0] / exact.var(0)[0] - 1) > 0.1


def test_nan_under_a_mask_reaches_neither_output_nor_gradient_nor_statistics():
    x = jax.random.normal(KEY, (8, 3)).at[-2:].set(jnp.nan)
    mask = (jnp.arange(8) < 6)[:, None]
    layer = BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(KEY, x[:6])

    def loss(params, x):
        given = {**variables, "params": params}
        y, updated = layer.apply(given, x, mask=mask, mutable=["batch_stats"])
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), updated

    gradients, updated = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves((gradients, updated)))
    np.testing.assert_allclose(updated["batch_stats"]["mean"], x[:6].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_batch_that_is_not_finite_leaves_its_channel_alone_and_no_other(bad):
    x = jax.random.normal(KEY, (8, 3))
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)
    updates = [layer.apply(variables, v, mutable=["batch_stats"])[1] for v in (x, x.at[3, 1].set(bad))]
    kept = jax.tree.map(lambda good, old: good.at[1].set(old[1]), updates[0]["batch_stats"], variables["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updates[1]["batch_stats"], kept)


def test_an_empty_mask_changes_no_statistic():
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, jnp.ones((4, 2)))
    y, updated = layer.apply(variables, jnp.ones((4, 2)), mask=jnp.zeros((4, 1), bool), mutable=["batch_stats"])
    assert jnp.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_statistics_carry_gradients_as_in_flax():
    x = jax.random.normal(KEY, (8, 3))

    def loss(x, layer):
        _, updated = layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(updated))

    assert_close(*(jax.grad(loss)(x, kind(use_running_average=False)) for kind in (BatchNorm, nn.BatchNorm)))


@pytest.mark.parametrize("param_dtype", ["float32", "float64"])
def test_with_64_bit_statistics_keep_their_dtype_and_numbers_are_those_of_float64(param_dtype):
    with jax.enable_x64(True):
        x = 1e6 + jax.random.normal(KEY, (8, 3), jnp.float64)
        options = {"use_running_average": False, "momentum": 0.0, "param_dtype": jnp.dtype(param_dtype)}
        ours, theirs = BatchNorm(**options), nn.BatchNorm(**options, use_fast_variance=False)
        variables = ours.init(KEY, x)
        (y, updated), (expected, _) = (v.apply(variables, x, mutable=["batch_stats"]) for v in (ours, theirs))
        assert_close(y, expected, tolerance=1e-9)
        assert {v.dtype for v in jax.tree.leaves(updated)} == {jnp.dtype("float32")}


def test_float32_data_and_a_float64_output_are_computed_in_float64():
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, (8, 3), jnp.float32) + 100
        layer = BatchNorm(use_running_average=False, dtype=jnp.dtype("float64"))
        y, _ = layer.init_with_output(KEY, x)
        exact = np.asarray(x, np.float64)
        np.testing.assert_allclose(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), rtol=1e-9)
