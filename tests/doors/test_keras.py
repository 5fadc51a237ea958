"""The door to Keras computes what Keras's layer does, where that is right, and is configured and saved as it is."""

import inspect

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, bits, eps_of
from support.keras_twins import Door, Stock, call, twins
from support.refusals import assert_refused

SHAPE = (6, 4, 3)
WIDE = ("float32", "float64")
NARROW = ("mixed_bfloat16", "mixed_float16", "bfloat16")
RENORM = {
    "": {},
    "renorm": {"renorm": True, "renorm_momentum": 0.7},
    "clipped": {"renorm": True, "renorm_clipping": {"rmin": 0.9, "rmax": 1.1, "dmax": 0.1}},
}
MASKS = {
    "no mask": None,
    "bool": np.arange(24).reshape(6, 4) % 3 > 0,
    "float of lower size": np.float32([[1.0], [0.0], [0.5], [1.0], [0.0], [2.0]]),
}


def data(shape=SHAPE, offset=0.5):
    return np.random.default_rng(1).normal(offset, 2, shape).astype("float32")


def assert_same(ours, theirs, ulps=64):
    """To the rounding of float32, in which Keras computes whatever the dtype is, and to that of the dtype itself."""
    jax.tree.map(lambda a, b: assert_close(a, oracle.float64(b), roundings=ulps, computed_in=np.float32), ours, theirs)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), theirs)


LAYOUTS = [(axis, mask) for axis in (-1, 1) for mask in MASKS]
CASES = (
    [(policy, "training", renorm, *layout) for policy in WIDE for renorm in RENORM for layout in LAYOUTS]
    + [(policy, "training", renorm, *LAYOUTS[i]) for policy in NARROW for i, renorm in enumerate(RENORM, 2)]
    + [
        (policy, mode, renorm, 1, mask)
        for policy in (*WIDE, *NARROW)
        for mode, renorm, mask in [("evaluation", "", "no mask"), ("frozen", "renorm", "bool")]
    ]
)


@pytest.mark.parametrize(("policy", "mode", "renorm", "axis", "mask"), CASES)
def test_outputs_gradients_and_variables_are_those_of_keras(policy, mode, renorm, axis, mask):
    if policy == "float64" and not jax.config.jax_enable_x64:
        pytest.skip("float64 needs JAX_ENABLE_X64")
    i = CASES.index((policy, mode, renorm, axis, mask))
    options = {"axis": axis, "momentum": 0.8, "scale": i % 2 == 0, "center": i % 4 < 2, **RENORM[renorm]}
    layers = twins(SHAPE, trainable=mode != "frozen", dtype=policy, **options)
    theirs, ours = (call(layer, data(), MASKS[mask], training=mode != "evaluation") for layer in layers)
    assert_same((ours.y, ours.variables), (theirs.y, theirs.variables))
    # They pass through y and through its cotangent, both of which were rounded.
    rounding = eps_of(theirs.y.dtype) / eps_of(np.float32)
    assert_same((ours.x_gradient, ours.gradients), (theirs.x_gradient, theirs.gradients), ulps=max(64, 4 * rounding))
    if mode == "training":  # the test would notice if nothing were averaged
        before = [v.numpy() for v in layers[1].non_trainable_variables]
        assert not any((a == b).all() for a, b in zip(before, ours.variables, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_float64_is_computed_in_float64(training):
    if not jax.config.jax_enable_x64:
        pytest.skip("float64 needs JAX_ENABLE_X64")
    _, door = twins(SHAPE, dtype="float64")
    x = np.random.default_rng(1).normal(1e4, 1, SHAPE)
    gamma, beta, mean, var = (v.numpy() for v in door.weights)
    if training:
        mean, var, _ = oracle.moments(x)
    y = door(x, training=training)
    assert y.dtype == np.float64
    assert_close(y, oracle.normalize(x, gamma, beta, mean, var, eps=1e-3), roundings=2**16)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int32])
def test_integers_become_floats(dtype):
    x = (data() > 0).astype(dtype)
    theirs, ours = (layer(x, training=True) for layer in twins(SHAPE))
    assert_same(ours, theirs)


def test_one_value_per_channel_gives_beta():
    stock, door = twins((1, 3))
    theirs, ours = (call(layer, data((1, 3))) for layer in (stock, door))
    assert bits(ours.y[0]) == bits(door.beta.value)
    assert_same((ours.y, ours.variables), (theirs.y, theirs.variables))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("renorm", RENORM)
def test_variables_and_config_are_those_of_keras(dtype, renorm):
    stock, door = twins(
        SHAPE, dtype=dtype, name="bn", beta_regularizer="l2", gamma_constraint="non_neg", **RENORM[renorm]
    )
    outlines = [[(v.name, v.path, v.shape, v.dtype, v.trainable) for v in layer.variables] for layer in (stock, door)]
    assert outlines[0] == outlines[1]
    assert door.get_config() == stock.get_config()
    assert Door.from_config(stock.get_config()).get_config() == stock.get_config()
    assert float(door.losses[0]) == pytest.approx(float(stock.losses[0]))
    assert door.compute_output_spec(keras.KerasTensor((None, 4, 3))).dtype == door.compute_dtype


def test_the_constructor_is_that_of_keras():
    assert inspect.signature(Door) == inspect.signature(Stock)
    assert inspect.signature(Door.__init__) == inspect.signature(Stock.__init__)
    of_call = [
        [(p.name, p.default) for p in inspect.signature(make.call).parameters.values()] for make in (Door, Stock)
    ]
    assert of_call[0] == of_call[1]
    assert Door.__name__ == Stock.__name__
    assert Door(1, 0.5).get_config() | {"name": ""} == Stock(1, 0.5).get_config() | {"name": ""}


def test_a_mask_of_another_rank_is_refused():
    assert_refused(
        lambda: Door().call(jnp.ones(SHAPE), mask=jnp.ones(SHAPE)),
        ValueError,
        "mask: got shape (6, 4, 3) for inputs of shape (6, 4, 3); expected one axis less; leave out the last axis.",
    )


@pytest.mark.parametrize("training", [True, False])
def test_only_ours_keeps_its_digits_at_a_large_mean(training):
    """The data and the offset are such that their sum is exact: the layer sees the same deviations from the mean."""
    deviations = np.random.default_rng(2).integers(-256, 256, (64, 3)).astype("float32") / 128
    offset = np.float32(2**16)
    exact = oracle.batch_norm(deviations, eps=1e-6) if training else deviations / np.sqrt(3 + 1e-6)
    errors = []
    for layer in twins((64, 3), scale=False, center=False, epsilon=1e-6):
        layer.moving_mean.assign(np.full(3, offset))
        layer.moving_variance.assign(np.full(3, 3.0))
        y = layer(deviations + offset, training=training)
        errors.append(np.abs(np.asarray(y) - exact).max())
    assert errors[1] < 1e-5 < 1e-3 < errors[0]


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_a_masked_value_holds_changes_nothing(value, training, renorm):
    mask = MASKS["bool"]
    _, door = twins(SHAPE, renorm=renorm)
    weights = jnp.asarray(mask[..., None])
    clean, soiled = (
        call(door, np.where(mask[..., None], data(), hidden), mask, training, weights) for hidden in (0, value)
    )
    show = lambda c: (jnp.where(weights, c.y, 0), c.x_gradient, c.gradients, c.variables)  # noqa: E731
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(show(soiled)))
    assert_same(show(soiled), show(clean))


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_channel_leaves_its_averages_as_they_were_and_the_others_move(value, renorm):
    _, door = twins(SHAPE, renorm=renorm)
    x = data()
    clean = call(door, x).variables
    x[2, 1, 0] = value
    before = [bits(v.value[0]) for v in door.non_trainable_variables]
    after = call(door, x).variables
    assert [bits(v[0]) for v in after] == before
    assert_same([v[1:] for v in after], [v[1:] for v in clean])


@pytest.mark.parametrize("renorm", [False, True])
def test_an_empty_mask_leaves_the_averages_as_they_were(renorm):
    _, door = twins(SHAPE, renorm=renorm)
    before = [bits(v.value) for v in door.non_trainable_variables]
    done = call(door, data(), np.zeros(SHAPE[:2], bool))
    assert [bits(v) for v in done.variables] == before
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(done))


def test_one_channel_takes_a_mask():
    _, door = twins((6, 4, 1), scale=False, center=False)
    x, mask = data((6, 4, 1)), MASKS["bool"]
    assert_close(door(x, mask=mask, training=True), oracle.batch_norm(x, eps=1e-3, mask=mask[..., None]))


@pytest.mark.parametrize("renorm", [False, True])
def test_a_sharded_batch_is_normalized_as_a_whole(renorm):
    layer = Door(synchronized=True, renorm=renorm)
    assert layer.get_config()["synchronized"]
    assert Door.from_config(layer.get_config()).synchronized
    x = data((16, 3))
    layer.build(x.shape)
    state = ([v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables])
    run = jax.jit(lambda x: layer.stateless_call(*state, x, training=True))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert_same(run(sharded), run(x))
