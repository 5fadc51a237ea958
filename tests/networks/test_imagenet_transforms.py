"""Residual networks for ImageNet under JAX's transformations, and on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.closeness import CHAIN, assert_close
from support.counting import compile_hlo
from support.eight import mesh
from support.small_imagenet import CLASSES, N, made

from jbn.networks import resnet
from jbn.training import TrainState, make_train_step


def square_loss(network, params, state, x):
    outputs, stats = network.apply(params, state, x, train=True)
    return jnp.mean(jnp.square(outputs)), stats


@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_forward_mode_agrees_with_reverse_mode(remat):
    network, params, state, x = made(remat=remat)
    loss = lambda params, x: square_loss(network, params, state, x)[0]  # noqa: E731
    rng = np.random.default_rng(7)
    tangents = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), (params, x))

    @jax.jit
    def both(params, x, tangents):
        _, forward = jax.jvp(loss, (params, x), tangents)
        grads = jax.grad(loss, (0, 1))(params, x)
        return forward, sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, tangents)))

    forward, reverse = both(params, x, tangents)
    np.testing.assert_allclose(forward, reverse, rtol=1e-3)


def test_an_ensemble_is_a_vmap_of_init_and_of_the_gradient():
    network, _, _, x = made()
    keys = jax.random.split(jax.random.key(5), 2)
    params, states = jax.jit(jax.vmap(network.init))(keys)
    gradient = jax.grad(partial(square_loss, network), has_aux=True)
    grads, stats = jax.jit(jax.vmap(gradient, in_axes=(0, 0, None)))(params, states, x)
    alone = jax.jit(lambda key: gradient(*network.init(key), x))(keys[1])
    assert_close(jax.tree.map(lambda v: v[1], (grads, stats)), alone, roundings=64 * CHAIN)


def cross_entropy(outputs, y):
    """With one-hot labels: JAX 0.12 has no gradient of optax's loss with integer ones on an explicit mesh."""
    return optax.softmax_cross_entropy(outputs.astype(jnp.float32), jax.nn.one_hot(y, CLASSES)).mean()


def start(params, state):
    return TrainState(params, state, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))


OPTIMIZER = optax.sgd(0.1)
Y = jnp.arange(N, dtype=jnp.int32) % CLASSES


def test_a_step_under_shard_map_and_its_loop_equal_those_of_one_device():
    network, params, state, x = made(remat=True)
    train_state, batches = start(params, state), (jnp.stack([x, x + 1]), jnp.stack([Y, Y]))

    def loop(step, train_state, batches):
        return lax.scan(step, train_state, batches)

    want = jax.jit(partial(loop, make_train_step(network.apply, cross_entropy, OPTIMIZER)))(train_state, batches)
    step = make_train_step(network.apply, cross_entropy, OPTIMIZER, axis_name="data")
    devices = jax.shard_map(partial(loop, step), mesh=mesh((4,)), in_specs=(P(), P(None, "data")), out_specs=P())
    got = jax.jit(devices)(train_state, batches)
    assert_close(got, want, roundings=64 * CHAIN)


# The batch and the rows of the images, the batch and the columns; by night the batch alone and the rows alone.
SPECS = [P("data", "model"), P("model", None, "data")]
BY_NIGHT = [pytest.param(spec, marks=pytest.mark.nightly) for spec in (P("data"), P(None, "data"))]


@pytest.mark.parametrize("spec", [*SPECS, *BY_NIGHT], ids=str)
def test_a_step_on_an_explicit_mesh_equals_that_of_one_device(spec):
    there = mesh((4, 2), ("data", "model"), kind=AxisType.Explicit)
    network = resnet(CLASSES, in_channels=2, stem="imagenet", block="bottleneck", widths=(2, 3), blocks=1)
    train_state = start(*jax.jit(network.init)(jax.random.key(0)))
    x = 2 * jax.random.normal(jax.random.key(1), (N, 16, 16, 2)) + 1
    step = jax.jit(make_train_step(network.apply, cross_entropy, OPTIMIZER))
    want = step(train_state, (x, Y))
    rows = NamedSharding(there, P(*spec[:1]))
    batch = (jax.device_put(x, NamedSharding(there, spec)), jax.device_put(Y, rows))
    got = step(jax.device_put(train_state, NamedSharding(there, P())), batch)
    assert_close(jax.device_get(got), jax.device_get(want), roundings=64 * CHAIN)


def test_on_an_explicit_mesh_no_device_gets_the_activations_of_others():
    there = mesh((8,), kind=AxisType.Explicit)
    network = resnet(CLASSES, in_channels=2, stem="imagenet", widths=(2, 3), blocks=1)
    x = jax.ShapeDtypeStruct((64, 32, 32, 2), "float32", sharding=NamedSharding(there, P("data")))

    def described(v):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(there, P()))

    params, state = jax.tree.map(described, jax.eval_shape(network.init, jax.random.key(0)))
    hlo, _ = compile_hlo(jax.grad(partial(square_loss, network), has_aux=True), params, state, x)
    assert hlo.collectives()
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    assert all(max(c.sizes, default=0) <= largest for c in hlo.collectives())


def test_statistics_of_devices_under_vmap_are_those_of_the_whole_batch():
    network, params, state, x = made()
    want = jax.jit(partial(network.apply, train=True))(params, state, x)
    apply = partial(network.apply, params, state, train=True, axis_name="parts")
    outputs, stats = jax.jit(jax.vmap(apply, axis_name="parts", out_axes=(0, None)))(x.reshape(4, 2, *x.shape[1:]))
    assert_close((outputs.reshape(N, CLASSES), stats), want, roundings=8 * CHAIN)
