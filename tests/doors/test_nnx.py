"""jbn.nnx.BatchNorm is Flax's layer: a product of its options, its conventions, and where only ours is right."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from support.flax_support import assert_close, cases

from jbn.nnx import BatchNorm

KEY = jax.random.key(0)


def make(kind, *features, **options):
    return kind(*features, **options, rngs=nnx.Rngs(0))


def outcome(graph, state, x, mask):
    """The output, the gradients for x and the parameters, and the state after a call."""
    graph, params, rest = nnx.split(nnx.merge(graph, state, copy=True), nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graph, params, rest, copy=True)
        y = layer(x, mask=mask)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y.astype(jnp.float32) * weights), (y, nnx.to_pure_dict(nnx.state(layer)))

    moving = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
    gradients, (y, updated) = jax.grad(loss, moving, has_aux=True)(params, x)
    return y, jax.tree.leaves(gradients), updated


@pytest.mark.parametrize("case", cases(axis=(-1, 1, (1,)), mask=(None, "whole", "rows", "lower rank")), ids=str)
def test_outputs_gradients_and_variables_are_those_of_flax(case):
    x, mask = case.data()
    layers = [make(kind, *case.features, **case.arguments) for kind in (BatchNorm, nnx.BatchNorm)]
    assert_close(*(nnx.to_pure_dict(nnx.state(layer)) for layer in layers))
    graphs = [nnx.graphdef(layer) for layer in layers]
    state = case.filled(nnx.state(layers[0]))
    both = jax.jit(lambda *given: [outcome(graph, *given) for graph in graphs])
    # Flax rounds running statistics to a narrow dtype before it normalizes with them.
    assert_close(*both(state, x, mask), narrow=case.dtype == "bfloat16")


def test_masks_may_hold_numbers():
    x = jax.random.normal(KEY, (8, 3))
    mask = (jnp.arange(8) < 5)[:, None]
    found = []
    for shown in (mask, mask.astype(jnp.int32), mask.astype(jnp.float32)):
        layer = make(BatchNorm, 3)
        found.append((layer(x, mask=shown), layer.mean[...], layer.var[...]))
    jax.tree.map(np.testing.assert_array_equal, *found[:2])
    jax.tree.map(np.testing.assert_array_equal, *found[1:])


@pytest.mark.parametrize("function", [lambda layer: layer, lambda layer: layer.__init__, lambda layer: layer.__call__])
def test_signatures_are_those_of_flax(function):
    assert inspect.signature(function(BatchNorm)) == inspect.signature(function(nnx.BatchNorm))


def test_running_statistics_are_used_as_they_are_stored():
    options = {"use_running_average": True, "dtype": jnp.bfloat16}
    layer = make(BatchNorm, 1, **options)
    layer.mean[...] = jnp.array([257.0])  # 256 or 258 in bfloat16
    np.testing.assert_array_equal(layer(jnp.array([[256.0], [258.0]])), jnp.array([[-1], [1]], jnp.bfloat16))


def test_promote_dtype_is_asked_as_in_flax():
    asked = []

    def promote(values, *, dtype):
        asked.append((len(values), dtype))
        return tuple(v if v is None else v.astype(jnp.float16) for v in values)

    for kind in (BatchNorm, nnx.BatchNorm):
        layer = make(kind, 3, promote_dtype=promote, use_bias=False)
        assert layer(jnp.ones((4, 3), jnp.int32)).dtype == jnp.float16
    assert asked == [(5, None)] * 2


def test_what_is_complex_is_computed_by_flax():
    x = jax.random.normal(KEY, (8, 3)) + 1j
    found = []
    for kind in (BatchNorm, nnx.BatchNorm):
        layer = make(kind, 3)
        found.append((layer(x), nnx.to_pure_dict(nnx.state(layer))))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_mode_has_to_be_given_and_the_error_is_that_of_flax():
    errors = []
    for kind in (BatchNorm, nnx.BatchNorm):
        with pytest.raises(ValueError, match="use_running_average") as caught:
            make(kind, 3, use_running_average=None)(jnp.ones((4, 3)))
        errors.append(str(caught.value).splitlines()[0])
    assert errors[0] == errors[1]


def test_a_number_of_features_that_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match=r"^num_features: got 1; expected 3, the size of x of shape \(4, 3\)"):
        make(BatchNorm, 1)(jnp.ones((4, 3)))


def test_several_feature_axes_can_be_trained():
    x = jax.random.normal(KEY, (16, 2, 3)) * 2 + 1
    layer = make(BatchNorm, 6, axis=(1, 2), momentum=0.0)
    y = layer(x)
    np.testing.assert_allclose(layer.mean[...], x.mean(0).reshape(6), rtol=1e-5)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_a_large_mean_costs_no_digits_whatever_use_fast_variance_says(fast):
    x = 1e4 + jax.random.normal(KEY, (256, 1))
    exact = np.asarray(x, np.float64)
    ours, theirs = (make(kind, 1, momentum=0.0, use_fast_variance=fast) for kind in (BatchNorm, nnx.BatchNorm))
    np.testing.assert_allclose(ours(x), (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5), atol=1e-4)
    np.testing.assert_allclose(ours.var[...], exact.var(0), rtol=1e-5)
    theirs(x)
    assert not fast or abs(theirs.var[0] / exact.var() - 1) > 0.1


def test_a_batch_that_is_not_finite_leaves_its_channel_alone_and_no_other():
    x = jax.random.normal(KEY, (8, 3))
    good, bad = make(BatchNorm, 3), make(BatchNorm, 3)
    good(x)
    bad(x.at[3, 1].set(jnp.nan))
    np.testing.assert_array_equal(bad.mean[...], good.mean[...].at[1].set(0))
    np.testing.assert_array_equal(bad.var[...], good.var[...].at[1].set(1))


def test_statistics_carry_no_gradient():
    @nnx.grad(argnums=1)
    def gradient(layer, x):
        layer(x)
        return jnp.sum(layer.mean[...])

    np.testing.assert_array_equal(gradient(make(BatchNorm, 3), jnp.ones((4, 3))), 0)


@pytest.mark.parametrize("length", [1, 3])
def test_statistics_are_a_carry_of_scan_with_64_bit(length):
    with jax.enable_x64(True):
        layer = make(BatchNorm, 3)
        graph, state = nnx.split(layer)

        def step(state, x):
            layer = nnx.merge(graph, state)
            y = layer(x)
            return nnx.state(layer), y

        state, y = jax.lax.scan(step, state, jax.random.normal(KEY, (length, 8, 3), jnp.float64))
        assert (y.dtype, state["mean"][...].dtype) == (jnp.float64, jnp.float32)


def test_train_and_eval_switch_the_mode():
    x = jax.random.normal(KEY, (8, 3)) + 5
    layer = make(BatchNorm, 3)
    layer.eval()
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(layer.mean[...], 0)
    layer.train()
    np.testing.assert_allclose(layer(x).mean(0), 0, atol=1e-5)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="newer than the oldest Flax that is supported")
def test_a_view_has_a_mode_of_its_own_and_the_same_variables():
    x = jax.random.normal(KEY, (8, 3)) + 5
    layer = make(BatchNorm, 3, use_running_average=True)
    view = nnx.view(layer, use_running_average=False)
    assert isinstance(view, BatchNorm)
    view(x)
    np.testing.assert_allclose(layer.mean[...], 0.01 * x.mean(0), rtol=1e-5)
    assert layer.use_running_average


def test_a_layer_is_pickled():
    layer = make(BatchNorm, 3)
    layer(jnp.arange(6.0).reshape(2, 3))
    copy = pickle.loads(pickle.dumps(layer))
    assert type(copy) is BatchNorm
    np.testing.assert_array_equal(copy.mean[...], layer.mean[...])


def test_metadata_is_that_of_flax():
    options = {"scale_metadata": {"note": "a"}, "bias_metadata": {"note": "b"}}
    ours, theirs = (make(kind, 3, **options).scale.get_metadata() for kind in (BatchNorm, nnx.BatchNorm))
    assert ours == theirs
    assert ours["note"] == "a"


def test_a_summary_names_the_layer_and_its_variables():
    shown = nnx.tabulate(make(BatchNorm, 3), jnp.ones((4, 3)))
    assert shown == nnx.tabulate(make(nnx.BatchNorm, 3), jnp.ones((4, 3)))


SHAPE = jax.ShapeDtypeStruct((4, 3), jnp.float32)


@pytest.mark.parametrize(
    "shape_of",
    [
        lambda layer: nnx.eval_shape(layer, SHAPE),
        lambda layer: nnx.eval_shape(lambda x: layer(x), SHAPE),
        lambda layer: nnx.eval_shape(lambda layer, x: layer(x), layer, SHAPE),
        lambda layer: jax.eval_shape(layer, SHAPE),
        lambda _: nnx.eval_shape(lambda x: make(BatchNorm, 3)(x), SHAPE),
    ],
)
def test_eval_shape_of_a_module_works(shape_of):
    """google/flax#4734."""
    layer = make(BatchNorm, 3)
    with jax.checking_leaks():
        assert shape_of(layer) == SHAPE
    np.testing.assert_array_equal(layer.mean[...], 0)
    layer(jnp.ones((4, 3)))
    assert layer.mean[0] > 0


def test_running_a_closed_over_module_in_training_is_still_an_error():
    layer = make(BatchNorm, 3)
    with pytest.raises(Exception, match="Cannot mutate BatchStat from a different trace level"):
        jax.block_until_ready(jax.jit(lambda x: layer(x))(jnp.ones((4, 3))))
    with pytest.raises(TraceContextError):
        jax.jit(make(nnx.BatchNorm, 3))(jnp.ones((4, 3)))
    layer.eval()
    assert jax.jit(lambda x: layer(x))(jnp.ones((4, 3))).shape == (4, 3)
