"""`resnet` under a training step: on eight devices, and on data that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.closeness import assert_close
from support.eight import mesh
from support.small_resnet import CLASSES, N, by_name, made

from jbn.networks import resnet
from jbn.training import TrainState, make_train_step


def cross_entropy(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y).mean()


def start(params, bn_state, optimizer):
    return TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))


def test_a_training_step_on_eight_devices_equals_that_on_one():
    network, params, state, x = made(remat=True)
    y = jnp.arange(N, dtype=jnp.int32) % CLASSES
    optimizer = optax.sgd(0.1)
    train_state = start(params, state, optimizer)
    want = jax.jit(make_train_step(network.apply, cross_entropy, optimizer))(train_state, (x, y))
    step = make_train_step(network.apply, cross_entropy, optimizer, axis_name="data")
    devices = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())
    assert_close(jax.jit(devices)(train_state, (x, y)), want, roundings=2048)


def digits():
    """Images and labels for training, and those for testing."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = jnp.asarray(data.images[order, :, :, None] / 8 - 1, jnp.float32)
    y = jnp.asarray(data.target[order], jnp.int32)
    return (x[:1472], y[:1472]), (x[1472:], y[1472:])


@pytest.mark.nightly
def test_it_learns_digits_and_its_running_statistics_serve_evaluation():
    network = resnet(10, in_channels=1, widths=(8, 16), blocks=1)
    (x, y), (x_test, y_test) = digits()
    epochs, batch_size = 8, 64
    batches = len(y) // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, epochs * batches))
    step = make_train_step(network.apply, cross_entropy, optimizer)

    @jax.jit
    def epoch(train_state, order):
        return jax.lax.scan(lambda carry, rows: step(carry, (x[rows], y[rows])), train_state, order)

    rng = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedule relies on it
        train_state = start(*network.init(jax.random.key(0)), optimizer)
        for _ in range(epochs):
            order = rng.permutation(len(y)).reshape(batches, batch_size)
            train_state, metrics = epoch(train_state, jnp.asarray(order, jnp.int32))
    assert not metrics["skipped"].any()
    assert all((node.count == epochs * batches).all() for node in by_name(train_state.bn_state).values())
    outputs, _ = jax.jit(network.apply, static_argnames="train")(*train_state[:2], x_test, train=False)
    assert (outputs.argmax(-1).astype(jnp.int32) == y_test).mean() > 0.95
