"""The descent by itself: the order of the examples, and what calls of many steps compute."""

import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbn.cli.batches
import jbn.cli.fit
from jbn.cli import main
from jbn.cli.batches import Batches
from jbn.cli.data import load_data
from jbn.cli.devices import mesh_of, replicated
from jbn.cli.fit import SoFar, fit, loss_fn
from jbn.networks import mlp
from jbn.training import TrainState, make_train_step


def test_batches_are_the_same_for_the_same_seed_and_hold_no_row_twice():
    order = np.stack(list(Batches(10, 4, 3, seed=1).order()))
    assert order.shape == (3, 2, 4)
    rng = np.random.default_rng(1)  # as version 0.1.0 has drawn them, all at once
    np.testing.assert_array_equal(order, [rng.permutation(10)[:8].reshape(2, 4) for _ in range(3)])
    assert all(len(set(epoch.ravel())) == 8 for epoch in order)
    assert (order[0] != order[1]).any()


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_an_epoch_is_shuffled_when_it_comes(tmp_path, data, monkeypatch):
    """A run of a billion epochs gets as far as its first step."""
    monkeypatch.setattr(SoFar, "after", lambda *given: signal.raise_signal(signal.SIGINT))
    arguments = ("--epochs", "1000000000", "--batch-size", "8", "--hidden", "3", "--norm", "none")
    assert main(["train", "--data", str(data), *arguments, "--out", str(tmp_path / "run")]) == 130


def test_calls_of_many_steps_are_the_steps_one_by_one(data, monkeypatch):
    """Also where the last call of an epoch, and the last rows of an evaluation, are fewer."""
    network = mlp((3, 4, 2), activation=jax.nn.sigmoid)
    optimizer = optax.sgd(0.1)
    step = make_train_step(network.apply, loss_fn, optimizer)
    params, state = network.init(jax.random.key(0))
    start = TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
    loaded = load_data(data, 0, flat=True)
    batches = Batches(len(loaded.x), 8, 2, seed=0)
    assert (batches.steps, batches.total) == (8, 16)

    train_state, losses, accuracies = start, [], []
    one, apply = jax.jit(step), jax.jit(partial(network.apply, train=False))
    for epoch in batches.order():
        for rows in epoch:
            train_state, metrics = one(train_state, (loaded.x[rows], loaded.y[rows]))
            losses.append(float(metrics["loss"]))
        outputs, _ = apply(train_state.params, train_state.bn_state, loaded.x_test)
        accuracies.append(float(np.mean(np.argmax(outputs, -1) == np.asarray(loaded.y_test))))

    monkeypatch.setattr(jbn.cli.batches, "_STEPS_A_CALL", 3)
    monkeypatch.setattr(jbn.cli.fit, "_ROWS_A_CALL", 5)
    reports = []
    begun = SoFar.at(replicated(start, mesh_of(1)))
    done = fit(network, step, begun, loaded, batches, mesh_of(1), reports.append)
    np.testing.assert_allclose(done.histories["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(done.epochs["test_accuracy"], accuracies)
    for a, b in zip(jax.tree.leaves(done.train_state.params), jax.tree.leaves(train_state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    outputs, _ = apply(*done.train_state[:2], loaded.x)
    np.testing.assert_allclose(done.epochs["train_loss"][-1], loss_fn(outputs, loaded.y), rtol=1e-5)
    assert [report.steps for report in reports] == [3, 3, 2, 0] * 2
    assert [report.accuracy for report in reports] == [None] * 3 + accuracies[:1] * 4 + accuracies[1:]


def test_steps_to_a_loss_average_ten_steps():
    def steps_to(losses, target):
        return SoFar(None, {"loss": np.array(losses)}).steps_to(target)

    losses = [2.0] * 9 + [0.0] + [1.0] * 10
    assert steps_to(losses, 1.8) == 10
    assert steps_to(losses, 0.9) == 19
    assert steps_to(losses, 0.5) is None
    assert steps_to([3.0, 1.0], 2.0) == 2
