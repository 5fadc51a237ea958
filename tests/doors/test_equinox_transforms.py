"""The layer of `jbn.equinox` under transformations of JAX: names, vmap, scan, devices, rematerialization."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import oracle
from support.beside_stock import assert_near, assert_same, bits

eqx = pytest.importorskip("equinox")
door = pytest.importorskip("jbn.equinox")
from support.equinox_layers import batch, copied, loss, made, mapped  # noqa: E402

MODES = pytest.mark.parametrize("mode", ["batch", "ema"])
pytestmark = pytest.mark.filterwarnings("ignore:When `eqx.nn.BatchNorm")


@MODES
@pytest.mark.parametrize("names", [("inner", "outer"), ["inner", "outer"]], ids=["tuple", "list"])
def test_several_names_pool_over_all_of_them(mode, names):
    x = batch((4, 6, 3, 2))
    answers = []
    for cls in (door.BatchNorm, eqx.nn.BatchNorm):
        layer, state = made(cls, names=names, mode=mode)
        y, state = mapped(mapped(layer, "inner"), "outer")(x, state)
        answers.append((y, jax.tree.leaves(state)))
    assert_same(*answers, 5e-6)
    assert_near(answers[0][0], oracle.batch_norm(x, layer.weight, layer.bias, axis=2), 5e-6)


@MODES
def test_a_vmap_without_a_name_around_it_gives_each_member_its_own_state(mode):
    # patrick-kidger/equinox#707: two vmaps, one of which is the batch.
    x = batch((5, 6, 3))
    layer, state = made(door.BatchNorm, mode=mode)
    outer = jax.jit(jax.vmap(mapped(layer), in_axes=(0, None)))
    ys, states = outer(x, state)
    for i in range(5):
        y, new = mapped(layer)(x[i], copied(state))
        assert_same([ys[i], [leaf[i] for leaf in jax.tree.leaves(states)]], [y, jax.tree.leaves(new)])
    inference = eqx.nn.inference_mode(layer)
    z, same = jax.vmap(mapped(inference), in_axes=(0, None), out_axes=(0, None))(x, state)
    assert z.shape == x.shape
    assert bits(same) == bits(state)


@MODES
@pytest.mark.parametrize("x64", [False, True])
def test_a_scan_inside_the_vmap_carries_the_state(mode, x64):
    # patrick-kidger/equinox#237: a batch norm at each of several times, and the gradient twice.
    def at_all_times(layer, state, xs):
        def at_one(state, x):
            y, state = layer(x, state)
            return state, y

        state, ys = jax.lax.scan(at_one, state, xs)
        return ys, state

    @eqx.filter_jit
    @partial(eqx.filter_value_and_grad, has_aux=True)
    def mean(layer, state, xs):
        axes = {"in_axes": (None, None, 0), "out_axes": (0, None)}
        ys, state = jax.vmap(at_all_times, axis_name="batch", **axes)(layer.__call__, state, xs)
        return jnp.mean(jnp.sin(ys)), state

    with jax.enable_x64(x64):
        xs = batch((8, 5, 3), jnp.result_type(float))
        answers = []
        for cls in (door.BatchNorm, eqx.nn.BatchNorm):
            layer, state = made(cls, mode=mode, dtype=xs.dtype)
            for _ in range(2):
                (value, state), gradients = mean(layer, state, xs)
                answers.append((value, jax.tree.leaves((state, eqx.filter(gradients, eqx.is_array)))))
        assert value.dtype == xs.dtype
        assert_same(answers[:2], answers[2:], 2e-5)


@MODES
def test_devices_and_the_batch_pool_together(mode):
    x = batch((16, 3))
    layer, state = made(door.BatchNorm, names=("devices", "batch"), mode=mode)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(
        mapped(layer), mesh=mesh, in_specs=(P("devices"), P()), out_specs=(P("devices"), P()), check_vma=False
    )
    y, new = jax.jit(step)(x, state)
    whole, expected = made(door.BatchNorm, mode=mode)
    assert_same([y, jax.tree.leaves(new)], [(p := mapped(whole)(x, expected))[0], jax.tree.leaves(p[1])], 5e-6)


def test_layers_made_under_vmap_are_an_ensemble():
    @eqx.filter_vmap
    def make(scale):
        layer, state = eqx.nn.make_with_state(door.BatchNorm)(3, "batch", mode="batch", dtype=jnp.float32)
        return eqx.tree_at(lambda layer: layer.weight, layer, layer.weight * scale), state

    scales = jnp.array([1.0, 2.0], jnp.float32)
    layers, states = make(scales)
    x = batch((6, 3))
    ys, states = eqx.filter_vmap(lambda layer, state: mapped(layer)(x, state))(layers, states)
    single, state = eqx.nn.make_with_state(door.BatchNorm)(3, "batch", mode="batch", dtype=jnp.float32)
    y, _ = mapped(single)(x, state)
    assert_same([ys[0], ys[1]], [y, 2 * y])


@MODES
def test_rematerialization_and_forward_mode_give_the_same_derivative(mode):
    layer, state = made(door.BatchNorm, mode=mode)
    _, state = mapped(layer)(batch(seed=3), state)
    x, x_dot = batch(), batch(seed=4)

    def value(x):
        return loss(layer, x, copied(state))[0]

    @jax.jit
    def derivatives(x, x_dot):
        return jax.grad(value)(x), jax.grad(jax.checkpoint(value))(x), jax.jvp(value, (x,), (x_dot,))[1]

    gradient, rematerialized, forward = derivatives(x, x_dot)
    assert_same(rematerialized, gradient)
    assert_near(forward, jnp.vdot(gradient, x_dot), 2e-5)
