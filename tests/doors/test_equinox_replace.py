"""`jbn.equinox.replace`: a model whose source is not ours, trained beside itself."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.beside_stock import assert_near, assert_same, bits

eqx = pytest.importorskip("equinox")
door = pytest.importorskip("jbn.equinox")
models = pytest.importorskip("support.equinox_models")

pytestmark = pytest.mark.filterwarnings("ignore:When `eqx.nn.BatchNorm")
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def resnet(mode="batch"):
    pair = eqx.nn.make_with_state(models.ResNet)(mode, key=jax.random.key(0))
    model, state = jax.tree.map(lambda v: v.astype(jnp.float32) if eqx.is_inexact_array(v) else v, pair)
    return model, state, OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))


def is_layer(node):
    return isinstance(node, eqx.nn.BatchNorm)


def layers_of(model):
    return [node for node in jax.tree.leaves(model, is_leaf=is_layer) if is_layer(node)]


def mapped(layer):
    return jax.jit(jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))


def in_float64(tree):
    dtypes = {"float32": "float64", "int32": "int64"}
    return jax.tree.map(lambda v: v.astype(dtypes.get(v.dtype.name, v.dtype)) if eqx.is_array(v) else v, tree)


@pytest.mark.parametrize("mode", ["batch", pytest.param("ema", marks=pytest.mark.nightly)])
def test_a_resnet_trains_as_it_does_with_the_layers_of_equinox(mode):
    model, state, opt_state = resnet(mode)
    stock = models.train(model, state, opt_state, OPTIMIZER, *models.images())
    replaced, opt_state = door.replace((model, opt_state))
    assert {type(layer) for layer in layers_of(replaced)} == {door.BatchNorm}
    assert len(layers_of(replaced)) == len(layers_of(model)) == 6
    ours = models.train(replaced, state, opt_state, OPTIMIZER, *models.images())
    assert stock[0][-1] < 0.9 * stock[0][0]
    np.testing.assert_allclose(ours[0], stock[0], rtol=2e-3)
    np.testing.assert_allclose(ours[0][:5], stock[0][:5], rtol=1e-5)
    # What was trained with one is read by the other, in both directions.
    x, labels = models.images()
    for source, target in ((stock, ours), (ours, stock)):
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, source[1:3])
        file.seek(0)
        pair = eqx.tree_deserialise_leaves(file, target[1:3])
        got, expected = (models.loss_of(*eqx.nn.inference_mode(one), x, labels)[0] for one in (pair, source[1:3]))
        assert_near(got, expected, 1e-5)


def test_an_optimizer_state_made_before_goes_on_after():
    images = models.images()
    model, state, opt_state = resnet()
    whole = models.train(model, state, opt_state, OPTIMIZER, *images, steps=6)[0]
    first, model, state, opt_state = models.train(model, state, opt_state, OPTIMIZER, *images, steps=3)
    model, opt_state = door.replace((model, opt_state))
    second = models.train(model, state, opt_state, OPTIMIZER, *images, steps=3)[0]
    np.testing.assert_allclose(first + second, whole, rtol=1e-5)


def test_on_images_with_a_large_mean_only_the_replaced_model_is_right():
    x, labels = models.images()
    x = 4e4 + 1e-2 * jnp.concatenate([x, x[:, :1]], 1)
    model, state, _ = resnet()
    model = eqx.tree_at(lambda model: model.stem, model, eqx.nn.Identity())  # the first layer sees the images
    loss = eqx.filter_jit(models.loss_of)
    stock, ours = loss(model, state, x, labels)[0], loss(door.replace(model), state, x, labels)[0]
    with jax.enable_x64(True):
        expected, _ = loss(in_float64(model), in_float64(state), x.astype(float), labels)
    assert abs(ours - expected) < 1e-5
    assert abs(stock - expected) > 1e-4


def test_the_state_made_before_stays_valid_and_the_model_as_it_was():
    model, state, _ = resnet()
    before = bits(eqx.filter(model, eqx.is_array))
    replaced, same = door.replace((model, state))
    for old, new in zip(layers_of(model), layers_of(replaced), strict=True):
        assert new.batch_state_index is old.batch_state_index
        assert new.weight is old.weight
        assert state.get(new.batch_counter) is state.get(old.batch_counter)
    assert bits(same) == bits(state)
    assert {type(layer) for layer in layers_of(model)} == {eqx.nn.BatchNorm}
    assert bits(eqx.filter(model, eqx.is_array)) == before


def test_a_model_replaced_before_its_state_is_made_has_the_same_state():
    stock, expected = eqx.nn.make_with_state(models.ResNet)("ema", key=jax.random.key(0))
    model, state = eqx.nn.make_with_state(lambda: door.replace(models.ResNet("ema", key=jax.random.key(0))))()
    assert str(jax.tree.structure(state)) == str(jax.tree.structure(expected))
    assert [leaf.shape for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)] == [
        leaf.shape for leaf in jax.tree.leaves(stock) if eqx.is_array(leaf)
    ]


def test_a_layer_at_two_places_stays_one():
    layer = eqx.nn.BatchNorm(3, "batch", mode="batch")
    first, second = door.replace([layer, layer])
    assert first is second
    shared = eqx.nn.Shared((layer, layer), where=lambda pair: pair[1], get=lambda pair: pair[0])
    first, second = door.replace(shared)()
    assert type(first) is type(second) is door.BatchNorm
    assert first.weight is second.weight


class Doubled(eqx.nn.BatchNorm):
    """A subclass as people write them."""

    factor: float

    def __init__(self, *args, factor=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def __call__(self, x, state, **kwargs):
        y, state = super().__call__(x, state, **kwargs)
        return self.factor * y, state


def test_a_subclass_stays_one_with_the_door_below_it():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 16)) * 1e-2 + 4e4, jnp.float32)
    layer, state = eqx.nn.make_with_state(Doubled)(3, "batch", mode="batch", factor=3.0)
    replaced, again = door.replace([layer])[0], door.replace(layer)
    assert isinstance(replaced, Doubled)
    assert isinstance(replaced, door.BatchNorm)
    assert (type(replaced).__name__, type(replaced)) == ("Doubled", type(again))
    assert replaced.factor == 3.0
    y, _ = mapped(replaced)(x, state)
    plain, plain_state = eqx.nn.make_with_state(door.BatchNorm)(3, "batch", mode="batch")
    assert_same(y, 3 * mapped(plain)(x, plain_state)[0])


def test_what_is_replaced_already_stays():
    model, _, _ = resnet()
    once = door.replace(model)
    for old, new in zip(layers_of(once), layers_of(door.replace(once)), strict=True):
        assert new is old


def test_nothing_found_is_an_error_of_one_line():
    with pytest.raises(ValueError, match="without a batch norm") as caught:
        door.replace(eqx.nn.Linear(2, 3, key=jax.random.key(0)))
    assert str(caught.value) == (
        "model: got Linear without a batch norm; expected equinox.nn.BatchNorm in it; "
        "pass the model itself, with its layers in fields that are not static."
    )
