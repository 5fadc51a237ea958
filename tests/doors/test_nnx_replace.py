"""jbn.nnx.replace: a model that one cannot edit, with every batch norm in it exchanged."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.flax_support import assert_close

import jbn.nnx


class CNN(nnx.Module):
    """As in Flax's own examples."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.linear = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.batch_norm1(self.conv1(x))), (2, 2), strides=(2, 2))
        x = nnx.relu(self.batch_norm2(self.conv2(x)))
        return self.linear(jnp.mean(x, (1, 2)))


class Halved(nnx.BatchNorm):
    """A layer of a user's own that adds to Flax's."""

    def __call__(self, x, **options):
        return super().__call__(x, **options) / 2


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def cnn():
    return CNN(rngs=nnx.Rngs(0))


def adam(model):
    return nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@pytest.fixture(scope="module")
def batch():
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    return x, jax.random.randint(jax.random.key(2), (8,), 0, 3)


def test_a_model_trains_as_before_and_its_checkpoint_goes_both_ways(batch):
    theirs, ours = cnn(), jbn.nnx.replace(cnn())
    losses = []
    for model in (theirs, ours):
        optimizer = adam(model)
        losses.append([float(train_step(model, optimizer, *batch)) for _ in range(20)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0][-1] < losses[0][0] / 2
    states = [nnx.state(model) for model in (theirs, ours)]
    outputs = []
    for model, state in zip((theirs, ours), reversed(states), strict=True):  # each with the other's weights
        nnx.update(model, state)
        model.eval()
        outputs.append(model(batch[0]))
    assert_close(*map(nnx.to_pure_dict, states), tolerance=2e-3)
    assert_close(*outputs, tolerance=1e-2)


def test_at_a_large_mean_only_ours_is_right():
    x = 1e4 + jax.random.normal(jax.random.key(0), (64, 2))
    model = nnx.Sequential(nnx.BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(0)), nnx.relu)
    ours = jbn.nnx.replace(model)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(ours(x), np.maximum((exact - exact.mean(0)) / exact.std(0), 0), atol=1e-3)
    model(x)
    assert np.abs(model.layers[0].var[...] / exact.var(0) - 1).max() > 0.1


def test_the_model_stays_as_it_is_and_shares_its_variables():
    model = cnn()
    ours = jbn.nnx.replace(model)
    assert type(model.batch_norm1) is nnx.BatchNorm
    assert type(ours.batch_norm1) is jbn.nnx.BatchNorm
    assert type(ours) is CNN
    given, found = ([id(v) for _, v in nnx.to_flat_state(nnx.state(m))] for m in (model, ours))
    assert len(given) == len(found)
    assert model.batch_norm2.mean is ours.batch_norm2.mean
    assert model.conv1.kernel is ours.conv1.kernel


def test_an_optimizer_made_before_trains_the_new_model(batch):
    found = []
    for order in ("before", "after"):
        model = cnn()
        optimizer = adam(model) if order == "before" else None
        ours = jbn.nnx.replace(model)
        optimizer = optimizer or adam(ours)
        found.append([float(train_step(ours, optimizer, *batch)) for _ in range(3)])
    assert found[0] == found[1]
    assert found[0][2] != found[0][0]


def test_what_was_shared_stays_shared():
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ours = jbn.nnx.replace(nnx.List([layer, nnx.Dict(again=layer)]))
    assert ours[0] is ours[1]["again"]
    assert type(ours[0]) is jbn.nnx.BatchNorm
    model = nnx.List([layer, nnx.BatchNorm(3, rngs=nnx.Rngs(1))])
    model[1].scale = layer.scale
    ours = jbn.nnx.replace(model)
    assert ours[0].scale is ours[1].scale


def test_a_subclass_keeps_what_it_adds():
    x = 1e4 + jax.random.normal(jax.random.key(0), (64, 2))
    ours = jbn.nnx.replace(nnx.List([Halved(2, rngs=nnx.Rngs(0)), Halved(2, rngs=nnx.Rngs(0))]))
    assert isinstance(ours[0], Halved)
    assert type(ours[0]) is type(ours[1])
    assert type(ours[0]).__name__ == "Halved"
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(ours[0](x), (exact - exact.mean(0)) / exact.std(0) / 2, atol=1e-3)


def test_a_subclass_is_pickled():
    ours = jbn.nnx.replace(Halved(2, rngs=nnx.Rngs(0)))
    copy = pickle.loads(pickle.dumps(ours))
    assert type(copy) is type(ours)
    x = jax.random.normal(jax.random.key(0), (8, 2))
    np.testing.assert_array_equal(copy(x), ours(x))


def test_switches_and_arguments_are_kept():
    model = nnx.List([nnx.BatchNorm(2, axis=1, momentum=0.5, epsilon=0.1, use_bias=False, rngs=nnx.Rngs(0))])
    model.eval()
    ours = jbn.nnx.replace(model)
    kept = ("axis", "momentum", "epsilon", "use_bias", "use_running_average")
    assert [getattr(ours[0], name) for name in kept] == [getattr(model[0], name) for name in kept]
    assert ours[0].bias is None


def test_a_layer_alone_and_one_exchanged_before_are_models_too():
    once = jbn.nnx.replace(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    assert type(once) is jbn.nnx.BatchNorm
    assert type(jbn.nnx.replace(once)) is jbn.nnx.BatchNorm


def test_a_step_traced_before_is_not_reused(batch):
    step = nnx.jit(lambda model, x: model(x))
    x = 1e4 + batch[0]
    model = nnx.Sequential(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    theirs = step(model, x)
    ours = step(jbn.nnx.replace(model), x)
    assert jnp.abs(ours - theirs).max() > 0.1


def test_nothing_found_is_an_error():
    with pytest.raises(ValueError, match=r"^model: got no flax\.nnx\.BatchNorm in it; expected at least one; [^\n]*$"):
        jbn.nnx.replace(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
