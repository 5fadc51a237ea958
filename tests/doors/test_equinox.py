"""The layer of `jbn.equinox` beside Equinox's own: what it computes, what it keeps, where it is better."""

import inspect
import io
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.beside_stock import assert_near, assert_same, bits, outline
from support.nightly import by_day

eqx = pytest.importorskip("equinox")
door = pytest.importorskip("jbn.equinox")
from support.equinox_layers import batch, copied, loss, made, mapped  # noqa: E402

MODES = pytest.mark.parametrize("mode", ["batch", "ema"])
pytestmark = pytest.mark.filterwarnings("ignore:When `eqx.nn.BatchNorm")


def history(cls, x, **options):
    """Everything from two training steps and an inference: outputs, gradients, leaves of the states."""
    layer, state = made(cls, x.shape[1], **options)
    step = eqx.filter_jit(eqx.filter_value_and_grad(lambda both, state: loss(*both, state), has_aux=True))
    results = []
    for scale in (1.0, 3.0):
        (_, (y, state)), gradients = step((layer, scale * x), state)
        results.append([y, jax.tree.leaves(eqx.filter(gradients, eqx.is_array)), jax.tree.leaves(state)])
    layer = eqx.nn.inference_mode(layer)
    (_, (y, state)), gradients = step((layer, x), state)
    results.append([y, jax.tree.leaves(eqx.filter(gradients, eqx.is_array)), jax.tree.leaves(state)])
    return results


SHAPES = [(6, 3), (6, 3, 4), (20, 2, 3, 2), (1, 3, 4)]


@pytest.mark.parametrize(
    ("mode", "affine", "shape"),
    by_day(
        itertools.product(["batch", "ema"], [True, False], SHAPES),
        [
            (mode, affine, shape)
            for i, shape in enumerate(SHAPES)
            for mode, affine in [("batch", i % 2 == 0), ("ema", i % 2 > 0)]
        ],
    ),
    ids=str,
)
def test_outputs_gradients_and_state_are_those_of_equinox(mode, affine, shape):
    options = {"mode": mode, "channelwise_affine": affine, "eps": 1e-3, "momentum": 0.9}
    got, expected = (history(cls, batch(shape), **options) for cls in (door.BatchNorm, eqx.nn.BatchNorm))
    assert_same(got, expected, 2e-5)


def test_constructor_and_call_have_the_signature_of_equinox():
    assert outline(inspect.signature(door.BatchNorm)) == outline(inspect.signature(eqx.nn.BatchNorm))
    calls = (inspect.signature(cls.__call__) for cls in (door.BatchNorm, eqx.nn.BatchNorm))
    assert len({str(outline(call)) for call in calls}) == 1


@MODES
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_fields_and_state_are_those_of_equinox(mode, dtype):
    (ours, our_state), (theirs, their_state) = (
        eqx.nn.make_with_state(cls)(4, "batch", mode=mode, dtype=dtype) for cls in (door.BatchNorm, eqx.nn.BatchNorm)
    )
    assert isinstance(ours, eqx.nn.BatchNorm)
    assert vars(ours).keys() == vars(theirs).keys()
    assert str(jax.tree.structure(our_state)) == str(jax.tree.structure(their_state))
    for a, b in zip(
        jax.tree.leaves((vars(ours), our_state)), jax.tree.leaves((vars(theirs), their_state)), strict=True
    ):
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert np.shape(a) == np.shape(b)


def test_a_layer_without_a_mode_is_in_mode_ema_and_warns_as_equinox_does():
    with pytest.warns(UserWarning, match="unspecified"):
        assert door.BatchNorm(2, "batch").mode == "ema"
    with pytest.raises(ValueError, match="Invalid mode"):
        door.BatchNorm(2, "batch", mode="average")


@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_the_output_has_the_dtype_that_equinox_gives_it(kept, given, affine, inference):
    def dtypes(cls):
        layer, state = made(cls, mode="batch", dtype=kept, channelwise_affine=affine)
        x = batch().astype(given)
        y, state = jax.eval_shape(mapped(partial(layer, inference=inference)), x, state)
        return y.dtype, [leaf.dtype for leaf in jax.tree.leaves(state)]

    got = dtypes(door.BatchNorm)
    try:
        assert got == dtypes(eqx.nn.BatchNorm)
    except ValueError:  # Equinox refuses a state whose dtype its own arithmetic has changed
        assert (kept, inference) == (jnp.bfloat16, False)
        assert got[1] == [jnp.result_type(int), jnp.bfloat16, jnp.bfloat16]


def test_integers_are_normalized_as_floats():
    answers = []
    for cls in (door.BatchNorm, eqx.nn.BatchNorm):
        layer, state = made(cls, mode="batch")
        y, state = mapped(layer)(batch().astype(jnp.int32), state)
        answers.append(
            (y, jax.tree.leaves(state), mapped(partial(layer, inference=True))(jnp.ones((2, 3), int), state)[0])
        )
    assert_same(*answers)


def test_mode_ema_takes_half_precision_too():
    layer, state = made(door.BatchNorm, mode="ema")
    full = mapped(layer)(batch(), copied(state))
    y, state = mapped(layer)(batch(dtype=jnp.bfloat16), state)
    assert y.dtype == jnp.float32
    assert_near(y, full[0], 0.03)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"bool", "float32"}


@MODES
def test_float64_batches_leave_a_float32_state_in_float32(mode):
    with jax.enable_x64(True):
        x = batch(dtype=jnp.float64)
        layer, state = made(door.BatchNorm, mode=mode, dtype=jnp.float32)
        y, new = mapped(layer)(x, copied(state))
        assert y.dtype == jnp.float64
        assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
        expected = oracle.batch_norm(x, layer.weight, layer.bias, axis=1)
        assert_near(y, expected, 1e-6 if mode == "ema" else 1e-12)  # "ema" normalizes with what the state holds


def test_complex_x_is_computed_by_equinox():
    x = batch() + 1j * batch(seed=5)
    answers = []
    for cls in (door.BatchNorm, eqx.nn.BatchNorm):
        layer, state = eqx.nn.make_with_state(cls)(3, "batch", mode="batch", dtype=jnp.complex64)
        y, state = mapped(layer)(x, state)
        answers.append((y, jax.tree.leaves(state)))
    assert bits(answers[0]) == bits(answers[1])


@MODES
def test_an_unbound_axis_name_is_a_name_error(mode):
    layer, state = made(door.BatchNorm, mode=mode)
    with pytest.raises(NameError):
        layer(batch()[0], state)
    with pytest.raises(NameError):
        jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))(batch(), copied(state))
    y, _ = layer(batch()[0], copied(state), inference=True)
    assert y.shape == (3, 4)


def test_channels_that_do_not_fit_are_refused_in_one_line():
    layer, state = made(door.BatchNorm, 1, mode="batch")
    with pytest.raises(ValueError, match="x: got shape") as caught:
        layer(batch()[0], state)
    assert str(caught.value) == (
        "x: got shape (3, 4); expected (1, …), channels first and no batch axis; "
        "map over the batch with jax.vmap(layer, axis_name='batch', in_axes=(0, None))."
    )


@MODES
def test_statistics_move_in_training_alone(mode):
    layer, state = made(door.BatchNorm, mode=mode, channelwise_affine=False)
    x = batch((10, 3))
    y, state = mapped(layer)(x, state)
    assert_near(y, oracle.batch_norm(x, axis=1), 2e-6)
    before = bits(state)
    _, state = mapped(layer)(3 * x + 10, state)
    assert bits(state) != before
    before = bits(state)
    _, state = mapped(eqx.nn.inference_mode(layer))(4 * x + 20, state)
    assert bits(state) == before
    _, state = mapped(eqx.nn.inference_mode(eqx.nn.inference_mode(layer), value=False))(4 * x + 20, state)
    assert bits(state) != before


@MODES
def test_files_load_in_both_directions(mode):
    (ours, our_state), (theirs, their_state) = (made(cls, mode=mode) for cls in (door.BatchNorm, eqx.nn.BatchNorm))
    _, our_state = mapped(ours)(batch(), our_state)
    _, their_state = mapped(theirs)(batch(seed=7), their_state)
    x = batch(seed=9)
    for source, target in (((ours, our_state), (theirs, their_state)), ((theirs, their_state), (ours, our_state))):
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, source)
        file.seek(0)
        layer, state = eqx.tree_deserialise_leaves(file, target)
        assert type(layer) is type(target[0])
        expected, _ = mapped(partial(source[0], inference=True))(x, copied(source[1]))
        got, _ = mapped(partial(layer, inference=True))(x, copied(state))
        assert_same(got, expected)
        trained, _ = mapped(layer)(x, state)  # its counter still has the type that a step returns
        assert trained.shape == x.shape


def test_deleting_the_initial_state_takes_the_arrays_of_equinox_out():
    for mode in ("batch", "ema"):
        layer = door.BatchNorm(3, "batch", mode=mode)
        eqx.nn.State(layer)
        bare = eqx.nn.delete_init_state(layer)
        with pytest.raises(ValueError, match="make_with_state"):
            eqx.nn.State(bare)
        assert len(jax.tree.leaves(eqx.filter(layer, eqx.is_array))) == 5
        assert len(jax.tree.leaves(eqx.filter(bare, eqx.is_array))) == 2


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_sequentials_nest(inner, outer):
    def block(channels, stateful):
        return door.BatchNorm(channels, "batch", mode="batch") if stateful else eqx.nn.Identity()

    def make():
        keys = jax.random.split(jax.random.key(0), 4)
        within = [eqx.nn.Linear(2, 4, key=keys[0]), block(4, inner), eqx.nn.Linear(4, 3, key=keys[1])]
        layers = [eqx.nn.Linear(5, 2, key=keys[2]), eqx.nn.Sequential(within), block(3, outer)]
        return eqx.nn.Sequential([*layers, eqx.nn.Linear(3, 6, key=keys[3])])

    x = batch((4, 5))
    if inner or outer:
        model, state = eqx.nn.make_with_state(make)()
        y, state = mapped(model)(x, state)
        assert isinstance(state, eqx.nn.State)
        assert eqx.nn.Sequential(list(model)) == model
        assert isinstance(model[1:], eqx.nn.Sequential)
    else:
        y = jax.vmap(make(), axis_name="batch")(x)
    assert y.shape == (4, 6)


def read(layer, state):
    """(mean, var) as inference reads them: from y at x = 0 and at x = 1."""
    if layer.mode == "ema":
        return state.get(layer.ema_state_index)
    scale = 1 - layer.momentum ** state.get(layer.batch_counter)
    return tuple(v / scale for v in state.get(layer.batch_state_index))


@MODES
def test_a_batch_that_is_not_finite_moves_nothing(mode):
    layer, state = made(door.BatchNorm, mode=mode)
    _, state = mapped(layer)(batch(), state)
    before = bits(state)
    y, state = mapped(layer)(batch().at[0].set(jnp.nan), state)
    assert bits(state) == before
    assert not jnp.isfinite(y).any()  # and hides nothing


@MODES
def test_a_channel_that_is_not_finite_keeps_its_reading_and_does_not_hold_up_the_others(mode):
    layer, state = made(door.BatchNorm, mode=mode)
    clean, clean_state = layer, copied(state)
    for seed in (1, 2, 3):
        x = batch(seed=seed)
        if seed == 2:
            before = read(layer, state)
        _, state = mapped(layer)(x.at[2, 1].set(jnp.inf) if seed == 2 else x, state)
        _, clean_state = mapped(clean)(x, clean_state)
        if seed == 2:
            assert_same([v[1] for v in read(layer, state)], [v[1] for v in before])
    for got, expected in zip(read(layer, state), read(clean, clean_state), strict=True):
        assert jnp.isfinite(got).all()
        assert_same(got[jnp.array([0, 2])], expected[jnp.array([0, 2])])


def test_in_mode_ema_a_first_batch_that_is_not_finite_is_not_the_first():
    layer, state = made(door.BatchNorm, mode="ema")
    _, state = mapped(layer)(batch().at[0, 1].set(jnp.nan), state)
    _, state = mapped(layer)(batch(), state)
    _, expected = mapped(layer)(batch(), made(door.BatchNorm, mode="ema")[1])
    assert bits(state) == bits(expected)


def test_in_mode_ema_inference_before_training_reads_zeros():
    layer, state = made(door.BatchNorm, mode="ema", channelwise_affine=False)
    assert not any(jnp.any(v) for v in state.get(layer.ema_state_index))
    x = batch()
    y, _ = mapped(eqx.nn.inference_mode(layer))(x, state)
    assert_near(y, x / np.sqrt(1e-5), 1e-6)


def test_at_a_large_mean_only_the_door_is_right():
    x = batch((64, 3, 16), offset=0.0) * 1e-2 + 4e4
    expected = oracle.batch_norm(x, axis=1)
    errors = {}
    for cls in (door.BatchNorm, eqx.nn.BatchNorm):
        layer, state = made(cls, mode="batch", channelwise_affine=False)
        y, state = mapped(layer)(x, state)
        errors[cls] = np.max(np.abs(np.asarray(y) - expected))
    assert errors[door.BatchNorm] < 1e-4
    assert errors[eqx.nn.BatchNorm] > 1e-2


def test_a_step_is_compiled_once():
    traced = []

    @eqx.filter_jit
    def step(layer, x, state):
        traced.append(1)
        return mapped(layer)(x, state)

    layer, state = made(door.BatchNorm, mode="batch")
    for seed in range(3):
        _, state = step(layer, batch(seed=seed), state)
    assert len(traced) == 1
