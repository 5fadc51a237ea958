"""jbn.linen.replace: a model that one cannot edit, with every batch norm in it exchanged while it is called."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.flax_support import assert_close

from jbn import linen

KEY = jax.random.key(0)


class ResNetBlock(nn.Module):
    """As in Flax's ImageNet example."""

    filters: int
    conv: Any
    norm: Any
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = nn.relu(norm(name="bn_init")(conv(4, (3, 3), name="conv_init")(x)))
        x = ResNetBlock(8, strides=(2, 2), conv=conv, norm=norm, act=nn.relu)(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


def trained(apply, variables, batch, steps=20):
    """The losses and the variables after some steps."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    params, stats = variables["params"], variables["batch_stats"]

    def loss_fn(params, stats, x, y):
        logits, updated = apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated["batch_stats"]

    @jax.jit
    def step(params, stats, optimizer_state, x, y):
        (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, x, y)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), stats, optimizer_state, loss

    state, losses = optimizer.init(params), []
    for _ in range(steps):
        params, stats, state, loss = step(params, stats, state, *batch)
        losses.append(float(loss))
    return losses, {"params": params, "batch_stats": stats}


def test_a_published_resnet_trains_as_before_and_its_checkpoint_goes_both_ways():
    model = ResNet()
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    batch = (x, jax.random.randint(jax.random.key(2), (8,), 0, 3))
    variables = jax.jit(model.init)(KEY, x)
    theirs, ours = (trained(apply, variables, batch) for apply in (model.apply, linen.replace()(model.apply)))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3)
    assert theirs[0][-1] < 0.8 * theirs[0][0]
    assert_close(ours[1], theirs[1], tolerance=5e-3)
    evaluate = partial(model.apply, train=False)
    assert_close(jax.jit(linen.replace()(evaluate))(theirs[1], x), jax.jit(evaluate)(ours[1], x), tolerance=1e-2)


class Net(nn.Module):
    """A batch norm on the input, where a large mean is not taken away before."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.0)(x)


FAR = 1e4 + jax.random.normal(KEY, (64, 2))


def var_of(updated):
    return jax.tree.leaves(updated)[1]


def is_right(outcome):
    """Whether the variance is that of the data, which Flax's is not."""
    exact = np.asarray(FAR, np.float64).var(0)
    error = np.abs(np.asarray(var_of(outcome[1])) / exact - 1).max()
    assert error < 1e-5 or error > 0.05
    return error < 1e-5


def run(apply, model):
    return apply(model.init(KEY, FAR), FAR, mutable=["batch_stats"])


def test_at_a_large_mean_only_ours_is_right():
    model = Net()
    assert not is_right(run(model.apply, model))
    assert is_right(run(linen.replace()(model.apply), model))
    with linen.replace():
        assert is_right(run(model.apply, model))
    assert not is_right(run(model.apply, model))


def test_what_was_traced_outside_is_traced_anew_inside_and_the_other_way_round():
    model = Net()
    apply = jax.jit(model.apply, static_argnames="mutable")
    variables = model.init(KEY, FAR)
    assert not is_right(apply(variables, FAR, mutable="batch_stats"))
    for _ in range(2):  # the second time all of it is cached, and no module is called
        with linen.replace():
            assert is_right(apply(variables, FAR, mutable="batch_stats"))
        assert not is_right(apply(variables, FAR, mutable="batch_stats"))
    exchanged = linen.replace()(apply)
    assert is_right(exchanged(variables, FAR, mutable="batch_stats"))
    assert is_right(exchanged(variables, FAR, mutable="batch_stats"))


def test_a_decorated_function_that_is_traced_outside_stays_exchanged():
    model = Net()
    apply = jax.jit(linen.replace()(model.apply), static_argnames="mutable")
    for _ in range(2):
        assert is_right(apply(model.init(KEY, FAR), FAR, mutable="batch_stats"))


class Halved(nn.BatchNorm):
    """A layer of a user's own that adds to Flax's."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(x, use_running_average, mask=mask) / 2


def test_a_subclass_keeps_what_it_adds():
    model = Halved(use_running_average=False, momentum=0.0)
    y, updated = run(linen.replace()(model.apply), model)
    assert is_right((y, updated))
    exact = np.asarray(FAR, np.float64)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / exact.std(0) / 2, atol=1e-3)


def test_a_door_called_inside_is_found_and_stays_what_it_is():
    model = nn.Sequential([linen.BatchNorm(use_running_average=False, momentum=0.0)])
    assert is_right(run(linen.replace()(model.apply), model))


def test_a_layer_that_is_called_twice_shares_its_variables():
    class Shared(nn.Module):
        def setup(self):
            self.norm = nn.BatchNorm(use_running_average=False)

        def __call__(self, x):
            return self.norm(2 * self.norm(x))

    model, x = Shared(), jax.random.normal(KEY, (16, 2)) + 3
    variables = model.init(KEY, x)
    apply = partial(model.apply, mutable=["batch_stats"])
    assert_close(linen.replace()(apply)(variables, x), apply(variables, x))


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_lifted_layers_are_exchanged(lift):
    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(nn.BatchNorm)(use_running_average=False, momentum=0.0)(x)

    model = Lifted()
    for _ in range(2):  # the second time what nn.jit compiled is cached, and only the outer module is called
        assert is_right(run(linen.replace()(model.apply), model))
        assert not is_right(run(model.apply, model))


def test_what_is_complex_is_left_to_flax():
    model, x = Net(), FAR + 1j
    variables = model.init(KEY, x)
    apply = partial(model.apply, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, linen.replace()(apply)(variables, x), apply(variables, x))


def test_an_optimizer_made_before_fits():
    model = Net()
    params = model.init(KEY, FAR)["params"]
    jax.tree.map(np.testing.assert_array_equal, linen.replace()(model.init)(KEY, FAR)["params"], params)
    before = optax.adam(0.1).init(params)
    after = optax.adam(0.1).init(linen.replace()(model.init)(KEY, FAR)["params"])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def empty():
    with linen.replace():
        model = Net()  # made inside, called outside: that would not be exchanged
    return model


def no_norm():
    model = nn.Dense(2)
    return linen.replace()(model.init)(KEY, FAR)


@pytest.mark.parametrize("call", [no_norm, empty])
def test_nothing_found_is_an_error(call, monkeypatch):
    monkeypatch.setattr(linen, "_found_in", set())
    with pytest.raises(ValueError, match=r"^replace: got no call of flax\.linen\.BatchNorm inside; expected [^\n]*$"):
        call()


def test_a_model_without_batch_norm_is_an_error_after_one_with_it_too():
    run(linen.replace()(Net().apply), Net())
    with pytest.raises(ValueError, match="replace"):
        no_norm()


def test_an_error_inside_is_not_hidden():
    with pytest.raises(RuntimeError, match="mine"), linen.replace():
        raise RuntimeError("mine")
