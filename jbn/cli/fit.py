"""One training run: many steps a call, so that Python costs nothing, with a report after each call."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.cli.data import Data
from jbn.cli.network import loss_fn
from jbn.networks import Network
from jbn.training import TrainState

__all__ = ["Fit", "Progress", "batch_order", "evaluate", "fit", "rows_of", "scorer"]

# Steps in one call: enough to hide the call, few enough for a live display of a long epoch.
_STEPS_A_CALL = 64
_ROWS_A_CALL = 2048
# Mini-batch losses are averaged over so many steps before they are held against a target.
_WINDOW = 10


class Progress(NamedTuple):
    """Where a run stands: steps made, mean loss of the last ones, test accuracy of the last epoch."""

    steps: int
    loss: float
    accuracy: float | None


class Fit(NamedTuple):
    """What a run gives.

    Attributes:
        params, state: of the trained network.
        loss: (steps,) of each mini-batch, in training mode.
        skipped: (steps,) bool, steps without an update because something was not finite.
        epochs: for each epoch the loss and accuracy on both sets, with running statistics.
        ms_per_step: median over the calls, without compilation and evaluation.
        compile_s: seconds to trace and compile the training step.
    """

    params: Any
    state: Any
    loss: np.ndarray
    skipped: np.ndarray
    epochs: dict[str, list[float]]
    ms_per_step: float
    compile_s: float

    def steps_to(self, target: float) -> int | None:
        """The first step at which the mean loss of the last 10 steps is at or below ``target``."""
        window = min(_WINDOW, len(self.loss))
        means = np.convolve(self.loss, np.ones(window) / window, "valid")
        reached = np.flatnonzero(means <= target)
        return int(reached[0]) + window if len(reached) else None


def batch_order(examples: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """(epochs, steps, batch_size) row numbers: each epoch a shuffle, less the rows that fill no batch."""
    rng = np.random.default_rng(seed)
    steps = examples // batch_size
    shuffles = [rng.permutation(examples)[: steps * batch_size] for _ in range(epochs)]
    return np.stack(shuffles).astype(np.int32).reshape(epochs, steps, batch_size)


def fit(
    network: Network,
    step: Callable[..., Any],
    start: TrainState,
    data: Data,
    order: np.ndarray,
    report: Callable[[Progress], None],
) -> Fit:
    """Trains from ``start`` over batches in the given order."""
    _, steps, batch_size = order.shape
    length = min(_STEPS_A_CALL, steps)
    call, compile_s = _compiled(step, length, start, data, jnp.zeros((length, batch_size), jnp.int32))
    score = scorer(network)
    train_state, losses, skipped, times = start, [], [], []
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    epochs: dict[str, list[float]] = {name: [] for name in names}
    for epoch in order:
        for rows in _calls(epoch, length):
            padded = np.zeros((length, batch_size), np.int32)
            padded[: len(rows)] = rows
            begin = time.perf_counter()
            train_state, loss, skips = jax.block_until_ready(
                call(train_state, data.x, data.y, padded, np.int32(len(rows)))
            )
            times.append(1e3 * (time.perf_counter() - begin) / len(rows))
            losses.append(np.asarray(loss)[: len(rows)])
            skipped.append(np.asarray(skips)[: len(rows)])
            seen = epochs["test_accuracy"]
            report(Progress(len(rows), float(losses[-1].mean()), seen[-1] if seen else None))
        results = [
            *evaluate(score, train_state.params, train_state.bn_state, data.x, data.y),
            *evaluate(score, train_state.params, train_state.bn_state, data.x_test, data.y_test),
        ]
        for name, value in zip(names, results, strict=True):
            epochs[name].append(value)
        report(Progress(0, float(losses[-1].mean()), epochs["test_accuracy"][-1]))
    return Fit(
        train_state.params,
        train_state.bn_state,
        np.concatenate(losses),
        np.concatenate(skipped),
        epochs,
        float(np.median(times)),
        compile_s,
    )


def evaluate(score: Callable[..., Any], params: Any, state: Any, x: Any, y: Any) -> tuple[float, float]:
    """Mean loss and accuracy over a whole set, with running statistics."""
    loss = correct = 0.0
    for some_x, some_y in zip(rows_of(x), rows_of(y), strict=True):
        mean_loss, right = score(params, state, some_x, some_y)
        loss += float(mean_loss) * len(some_x)
        correct += int(right)
    return loss / len(x), correct / len(x)


def rows_of(values: Any) -> Iterator[Any]:
    """The rows of a set, as many at a time as fit an evaluation."""
    for i in range(0, len(values), _ROWS_A_CALL):
        yield values[i : i + _ROWS_A_CALL]


def scorer(network: Network) -> Callable[..., Any]:
    """``score(params, state, x, y)``: mean loss and number of right answers, with running statistics."""

    def score(params, state, x, y):
        outputs, _ = network.apply(params, state, x, train=False)
        return loss_fn(outputs, y), jnp.sum(jnp.argmax(outputs, axis=-1).astype(y.dtype) == y)

    return jax.jit(score)


def _calls(epoch: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for i in range(0, len(epoch), length):
        yield epoch[i : i + length]


def _compiled(
    step: Callable[..., Any], length: int, start: TrainState, data: Data, rows: Any
) -> tuple[Callable[..., Any], float]:
    """Up to ``length`` steps as one program, and the seconds to compile it.

    The number of steps is a runtime value, so that a short last call needs no second program.
    """

    def call(train_state, x, y, rows, count):
        def body(i, carry):
            train_state, losses, skipped = carry
            train_state, metrics = step(train_state, (x[rows[i]], y[rows[i]]))
            return train_state, losses.at[i].set(metrics["loss"]), skipped.at[i].set(metrics["skipped"])

        blank = jnp.full((length,), jnp.nan, jnp.float32), jnp.zeros((length,), bool)
        return lax.fori_loop(0, count, body, (train_state, *blank))

    begin = time.perf_counter()
    program = jax.jit(call).lower(start, data.x, data.y, rows, np.int32(1)).compile()
    return program, time.perf_counter() - begin
