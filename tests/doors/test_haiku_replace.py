"""`jbn.haiku.replace`: a model whose source is not ours, trained beside itself."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.beside_stock import assert_near, assert_same

hk = pytest.importorskip("haiku")
door = pytest.importorskip("jbn.haiku")

SIZES = {"channels_per_group": (4, 4, 8, 8), "bottleneck": False, "use_projection": (True,) * 4}
OPTIMIZER = optax.sgd(0.02, momentum=0.9)


def resnet():
    """Haiku's own residual network, of another size."""
    return hk.transform_with_state(
        lambda x, is_training: hk.nets.ResNet((1, 1, 1, 1), 3, bn_config={"decay_rate": 0.9}, **SIZES)(x, is_training)
    )


def images(count=8):
    """(x, labels): the label of an image is the colour that there is most of."""
    x = np.random.default_rng(0).normal(size=(count, 16, 16, 3)) + np.random.default_rng(1).normal(
        size=(count, 1, 1, 3)
    )
    return jnp.asarray(x, jnp.float32), jnp.asarray(x.mean((1, 2)).argmax(1))


def train(apply, params, state, x, labels, steps=20):
    """(losses, params, state)."""

    def loss_of(params, state):
        logits, state = apply(params, state, None, x, True)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]), state

    @jax.jit
    def step(params, state, opt_state):
        (loss, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, state)
        updates, opt_state = OPTIMIZER.update(gradients, opt_state)
        return loss, optax.apply_updates(params, updates), state, opt_state

    opt_state, losses = OPTIMIZER.init(params), []
    for _ in range(steps):
        loss, params, state, opt_state = step(params, state, opt_state)
        losses.append(float(loss))
    return losses, params, state


@pytest.mark.nightly
def test_a_resnet_trains_as_it_does_with_the_layers_of_haiku():
    model, (x, labels) = resnet(), images()
    params, state = jax.jit(partial(model.init, is_training=True))(jax.random.key(0), x)
    stock = train(model.apply, params, state, x, labels)
    got = train(door.replace()(model.apply), params, state, x, labels)
    assert stock[0][-1] < stock[0][0] / 2
    np.testing.assert_allclose(got[0], stock[0], rtol=5e-3)
    np.testing.assert_allclose(got[0][:4], stock[0][:4], rtol=1e-4)
    # What was trained with one is read by the other, in both directions.
    evaluate = [jax.jit(partial(f, is_training=False)) for f in (model.apply, door.replace()(model.apply))]
    for _, params, state in (stock, got):
        theirs, ours = (f(params, state, None, x)[0] for f in evaluate)
        assert_near(ours, theirs, 1e-4)


def norm(x, is_training=True, *, cls=hk.BatchNorm, **options):
    return cls(**{"create_scale": True, "create_offset": True, "decay_rate": 0.9, **options})(x, is_training)


def test_on_inputs_with_a_large_mean_only_the_replaced_model_is_right():
    def f(x):
        return hk.Linear(3)(jax.nn.relu(norm(hk.Linear(8)(norm(x)))))

    x = 1e4 + jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)), jnp.float32)
    model = hk.transform_with_state(f)
    variables = door.replace()(model.init)(jax.random.key(0), x)
    stock, ours = (jax.jit(g)(*variables, None, x)[0] for g in (model.apply, door.replace()(model.apply)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: v.astype(float), variables[0])
        expected, _ = door.replace()(model.apply)(wide, variables[1], None, x.astype(float) - 1e4)
    assert_near(ours, expected, 1e-4)
    assert not np.max(np.abs(stock - expected)) < 0.1  # it may be NaN


LARGE = 1e5 + jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)


def is_right(y):
    """Whether a batch of `LARGE` came out normalized."""
    return bool(jnp.all(jnp.abs(jnp.std(y, 0) - 1) < 1e-2))


def test_it_is_a_context_manager_and_decorates_functions_before_and_after_they_are_transformed():
    model = hk.transform_with_state(norm)
    variables = model.init(jax.random.key(0), LARGE)
    assert not is_right(model.apply(*variables, None, LARGE)[0])
    with door.replace():
        assert is_right(model.apply(*variables, None, LARGE)[0])
        variables = model.init(jax.random.key(0), LARGE)
    assert not is_right(model.apply(*variables, None, LARGE)[0])
    assert is_right(door.replace()(model.apply)(*variables, None, LARGE)[0])

    @door.replace()
    def decorated(x):
        """Normalizes."""
        return norm(x)

    assert (decorated.__name__, decorated.__doc__) == ("decorated", "Normalizes.")
    assert list(inspect.signature(decorated).parameters) == ["x"]
    y, _ = jax.jit(hk.transform_with_state(decorated).apply)(*variables, None, LARGE)
    assert is_right(y)


def test_what_was_traced_before_is_not_exchanged_and_says_so():
    model = hk.transform_with_state(norm)
    variables = model.init(jax.random.key(0), LARGE)
    before = jax.jit(model.apply)
    before(*variables, None, LARGE)
    with pytest.raises(ValueError, match="replace: ") as caught, door.replace():
        before(*variables, None, LARGE)
    assert str(caught.value) == (
        "replace: got no haiku.BatchNorm made inside; expected at least one; a function compiled before is not "
        "traced again: put jax.jit outside, as in jax.jit(replace()(model.apply))."
    )
    inside = door.replace()(jax.jit(lambda *args: model.apply(*args)))
    for _ in range(2):  # the second call traces nothing, and found its layers in the first
        assert is_right(inside(*variables, None, LARGE)[0])


def test_an_error_inside_is_the_one_that_is_seen():
    with pytest.raises(KeyError), door.replace():
        raise KeyError


def test_replacements_nest_and_the_door_inside_one_is_left_alone():
    model = hk.transform_with_state(partial(norm, cls=door.BatchNorm))
    apply = door.replace()(door.replace()(model.apply))
    variables = model.init(jax.random.key(0), LARGE)
    assert_same(list(apply(*variables, None, LARGE)), list(model.apply(*variables, None, LARGE)))
    x = LARGE + 1j
    model = hk.transform_with_state(partial(norm, create_scale=False, create_offset=False))
    variables = model.init(None, x)
    assert_same(list(door.replace()(model.apply)(*variables, None, x)), list(model.apply(*variables, None, x)))


class Doubled(hk.BatchNorm):
    """A subclass as people write them."""

    def __init__(self, factor, name=None):
        super().__init__(create_scale=False, create_offset=False, decay_rate=0.9, name=name)
        self.factor = factor

    def __call__(self, x, is_training):
        return self.factor * super().__call__(x, is_training)


def test_a_subclass_stays_one_with_the_door_below_it_and_a_layer_used_twice_stays_one():
    seen = []

    def f(x):
        layer = Doubled(3.0)
        seen.append(layer)
        return layer(layer(x, True), True)

    model = hk.transform_with_state(door.replace()(f))
    params, state = model.init(None, LARGE)
    y, state = model.apply(params, state, None, LARGE)
    assert set(state) == {"doubled/~/mean_ema", "doubled/~/var_ema"}
    assert int(state["doubled/~/mean_ema"]["counter"]) == 2
    assert is_right(y / 3)
    assert isinstance(seen[0], Doubled)
    assert isinstance(seen[0], door.BatchNorm)
    assert type(seen[0]) is type(seen[1])


def test_summaries_and_mixed_precision_see_the_layer_of_haiku():
    def f(x):
        return norm(x)

    def rows(f):
        return [
            row.module_details.module.module_name
            for row in hk.experimental.eval_summary(hk.transform_with_state(f))(LARGE)
        ]

    assert rows(door.replace()(f)) == rows(f)
    jmp = pytest.importorskip("jmp")
    hk.mixed_precision.set_policy(hk.BatchNorm, jmp.get_policy("params=float32,compute=float32,output=bfloat16"))
    try:
        model = hk.transform_with_state(door.replace()(f))
        y, _ = model.apply(*model.init(jax.random.key(0), LARGE), None, LARGE)
    finally:
        hk.mixed_precision.clear_policy(hk.BatchNorm)
    assert y.dtype == jnp.bfloat16
    assert is_right(y.astype(jnp.float32))
