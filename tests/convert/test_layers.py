"""What comes out of a framework's layer computes what it computed there, and goes back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.beside_stock import bits
from support.foreign_layers import LAYERS, Equinox, EquinoxEma, Haiku, Keras, batch, trained

import jbn
from jbn import convert

KINDS = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
DOORS = pytest.mark.parametrize("door", [False, True], ids=["stock", "door"])
SATURATED = np.iinfo(np.int32).max


def arrays(variables):
    """Of variables as a tree, without the boxes around them."""
    return bits([np.asarray(v) for v in jax.tree.leaves(variables)])


@KINDS
@DOORS
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_evaluation_is_that_of_the_framework(kind, door, affine):
    layer = trained(kind, door=door, affine=affine)
    params, state = layer.loaded()
    assert [v is None for v in params] == [not affine] * 2
    x = batch(7)
    y, _ = jbn.bn_apply(params, state, x, train=False, eps=layer.eps)
    np.testing.assert_allclose(y, layer.evaluate(x), rtol=1e-6, atol=1e-6)


@KINDS
@DOORS
def test_five_training_steps_are_those_of_the_framework(kind, door):
    layer = trained(kind, door=door)
    params, state = layer.loaded()
    for seed in range(10, 15):
        x = batch(seed)
        expected = layer.train(x)
        y, stats = jbn.bn_apply(params, state, x, train=True, eps=layer.eps)
        state = jbn.bn_update_stats(state, stats, **layer.update)
        if kind is not EquinoxEma:  # which normalizes training batches with what runs along
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    after = layer.loaded()[1]
    np.testing.assert_allclose(state.mean, after.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.var, after.var, rtol=1e-5)
    np.testing.assert_array_equal(state.count, after.count)


@KINDS
@DOORS
def test_a_layer_goes_back_as_it_came(kind, door):
    layer = trained(kind, door=door)
    back = layer.write(*layer.loaded())
    if kind in (Haiku, Equinox):  # hidden averages come back to the neighbour that reads the same
        pairs = zip(jax.tree.leaves(back), jax.tree.leaves(layer.variables), strict=True)
        for new, old in (pair for pair in pairs if isinstance(pair[1], jax.Array)):
            np.testing.assert_allclose(new, old, rtol=2e-7)
            assert new.dtype == old.dtype
    else:
        assert arrays(back) == arrays(layer.variables)
    other = kind(door=not door)
    other.variables = back
    x = batch(7)
    np.testing.assert_allclose(other.evaluate(x), layer.evaluate(x), rtol=1e-6, atol=1e-6)


@KINDS
def test_what_jbn_trained_comes_back_bit_for_bit(kind):
    params, state = jbn.bn_init(3)
    for seed in range(6):
        _, stats = jbn.bn_apply(params, state, batch(seed), train=True)
        state = jbn.bn_update_stats(state, stats, momentum=0.9)
    params = jbn.BNParams(params.gamma * 1.3, params.beta + 0.7)
    layer = kind(door=False)
    layer.variables = layer.write(params, state)
    back = layer.loaded()
    assert bits(back[0]) == bits(params)
    assert bits(back[1].count) == bits(state.count if layer.counts else np.full(3, SATURATED, np.int32))
    if kind is Equinox:  # which reads the average as hidden/(1−mᵗ), and that cannot be every float32
        np.testing.assert_allclose(back[1].mean, state.mean, rtol=1.2e-7)
        np.testing.assert_allclose(back[1].var, state.var, rtol=1.2e-7)
    else:
        assert bits(back[1][:2]) == bits(state[:2])


@KINDS
def test_a_saturated_count_survives_and_so_does_the_layer(kind):
    params, state = jbn.bn_init(3)
    state = jbn.BNState(state.mean + 2, state.var * 3, jnp.full(3, SATURATED, jnp.int32))
    layer = kind(door=False)
    layer.variables = layer.write(params, state)
    back = layer.loaded()[1]
    assert bits(back) == bits(state)
    for seed in range(2):
        layer.train(batch(seed))
    params, after = layer.loaded()
    for seed in range(2):
        _, stats = jbn.bn_apply(params, state, batch(seed), train=True)
        state = jbn.bn_update_stats(state, stats, **layer.update)
    np.testing.assert_allclose(after.mean, state.mean, rtol=1e-5)


@KINDS
def test_a_new_layer_has_seen_nothing(kind):
    layer = kind(door=False)
    count = layer.loaded()[1].count
    expected = 0 if layer.counts or kind is EquinoxEma else SATURATED
    assert count.tolist() == [expected] * 3
    assert layer.read(layer.variables, count=5)[1].count.tolist() == [5] * 3
    assert layer.read(layer.variables, count=[1, 2, 2**40])[1].count.tolist() == [1, 2, SATURATED]


@pytest.mark.parametrize("kind", [Haiku, Equinox])
def test_hidden_averages_need_the_momentum_unless_they_are_warm(kind):
    params, state = jbn.bn_init(3)
    one = jbn.BNState(*state[:2], state.count + 1)
    write = {Haiku: convert.to_haiku, Equinox: convert.to_equinox}[kind]
    with pytest.raises(ValueError, match=r"^momentum: got None; expected the share that the layer keeps"):
        write(params, one)
    write(params, state)
    write(params, one, momentum=0.9)


def test_equinox_fields_are_read_without_a_layer_if_the_momentum_is_told():
    params, state = trained(Equinox, door=False).loaded()
    fields = convert.to_equinox(params, state, "norm", momentum=0.9)
    again = convert.from_equinox(fields, "norm", momentum=0.9)
    np.testing.assert_allclose(again[1].var, state.var, rtol=2e-7)
    with pytest.raises(ValueError, match=r"^momentum: got None"):
        convert.from_equinox(fields, "norm")


def test_what_is_left_of_equinoxs_start_is_taken_over():
    layer = trained(Equinox, steps=1, door=False)
    state = layer.loaded()[1]
    np.testing.assert_allclose(state.var, batch(0).var(0) + 0.9 / 0.1, rtol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((1, 3, 1, 1), 1), ((1, 1, 1, 3), -1), ((3, 1), 0)])
def test_haikus_features_are_where_axis_says(shape, axis):
    params, state = jbn.bn_init(3)
    variables = convert.to_haiku(params, state, ndim=len(shape), axis=axis)
    assert variables[0]["batch_norm"]["scale"].shape == shape
    assert variables[1]["batch_norm/~/var_ema"]["hidden"].shape == shape
    back = convert.from_haiku(variables, "batch_norm", axis=axis)
    assert bits(back) == bits((params, state))


def test_three_arrays_of_keras_without_names_are_asked_about():
    params, state = jbn.bn_init(3, use_gamma=False)
    named = convert.to_keras(params, state)
    assert list(named) == ["beta", "moving_mean", "moving_variance"]
    with pytest.raises(ValueError, match=r"^variables: got 3 arrays without names; expected 4"):
        convert.from_keras([*named.values()])
    assert convert.from_keras(named)[0].gamma is None
    assert Keras(door=False).read(Keras(door=False).variables)[0].gamma.shape == (3,)
