"""One training run: many steps a call, so that Python costs nothing, with a report after each call."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jbn.cli.batches import Batches
from jbn.cli.data import Data
from jbn.cli.devices import local, over_devices
from jbn.networks import Network
from jbn.training import TrainState

__all__ = ["Keeping", "Progress", "SoFar", "evaluate", "fit", "loss_fn", "rows_of", "scorer"]

_ROWS_A_CALL = 2048
# Mini-batch losses are averaged over so many steps before they are held against a target.
_WINDOW = 10
_SCORES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


class Progress(NamedTuple):
    """Where a run stands: steps made, mean loss of the last ones, test accuracy of the last epoch."""

    steps: int
    loss: float
    accuracy: float | None


class SoFar(NamedTuple):
    """What a run carries from call to call: all that it takes to go on from there, and what it gives at its end.

    Attributes:
        train_state: the same on every device.
        histories: arrays by name: ``loss`` (steps,) of each mini-batch, in training mode; ``skipped`` (steps,) bool,
            whether it made no update because something was not finite; ``times`` (calls,), ms a step, without
            compilation and evaluation; ``compile_s`` (), to trace and compile the training step; and for each finished
            epoch the loss and accuracy on both sets, with running statistics.
    """

    train_state: TrainState
    histories: dict[str, np.ndarray]

    @classmethod
    def at(cls, train_state: TrainState) -> "SoFar":
        """A run that has made no step."""
        histories = {"loss": np.zeros(0, np.float32), "skipped": np.zeros(0, bool), "compile_s": np.zeros(())}
        return cls(train_state, histories | {name: np.zeros(0) for name in ("times", *_SCORES)})

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.histories["loss"])

    @property
    def epochs(self) -> dict[str, np.ndarray]:
        """What was found at the end of each epoch."""
        return {name: self.histories[name] for name in _SCORES}

    @property
    def accuracy(self) -> float | None:
        """On the test set, after the last epoch."""
        return next(reversed(self.histories["test_accuracy"].tolist()), None)

    @property
    def ms_per_step(self) -> float:
        """Median over the calls."""
        times = self.histories["times"]
        return float(np.median(times)) if times.size else math.nan

    def after(self, train_state: TrainState, loss: Any, skipped: Any, count: int, seconds: float) -> "SoFar":
        """The run after a call of ``count`` steps."""
        loss, skipped = (np.asarray(local(made))[:count] for made in (loss, skipped))
        return self._replace(train_state=train_state).seen(loss=loss, skipped=skipped, times=[1e3 * seconds / count])

    def seen(self, **more: Any) -> "SoFar":
        """The run with more in some of its histories."""
        longer = {name: np.concatenate([self.histories[name], values]) for name, values in more.items()}
        return self._replace(histories={**self.histories, **longer})

    def steps_to(self, target: float) -> int | None:
        """The first step at which the mean loss of the last 10 steps is at or below ``target``."""
        window = min(_WINDOW, self.steps)
        means = np.convolve(self.histories["loss"], np.ones(window) / window, "valid")
        reached = np.flatnonzero(means <= target)
        return int(reached[0]) + window if len(reached) else None


class Keeping(NamedTuple):
    """Who is given the run after every so many steps, and at its end."""

    every: int
    save: Callable[[SoFar], None]


def fit(
    network: Network,
    step: Callable[..., Any],
    so_far: SoFar,
    data: Data,
    batches: Batches,
    mesh: Mesh,
    report: Callable[[Progress], None],
    keeping: Keeping | None = None,
) -> SoFar:
    """Trains from ``so_far``, on every device of the mesh, to the last of the batches, each of them split over it.

    What it gives has its train state as this process alone holds it. ``step`` is made with ``axis_name=axis_of(mesh)``.
    """
    steps, length = batches.steps, batches.length(data.x)
    every = steps if keeping is None else keeping.every
    score = scorer(network)
    feeds = batches.feeds(data, mesh, so_far.steps, every)
    feed = next(feeds, None)
    if so_far.steps:
        report(Progress(so_far.steps, float(so_far.histories["loss"][-length:].mean()), so_far.accuracy))
    if feed is not None:
        call, compile_s = _compiled(step, length, mesh, so_far.train_state, feed[1:])
        so_far = so_far._replace(histories={**so_far.histories, "compile_s": np.asarray(compile_s)})
    while feed is not None:
        count, x, y = feed
        begin = time.perf_counter()
        made = call(so_far.train_state, x, y, np.int32(count))
        feed = next(feeds, None)  # while the devices are at work
        train_state, loss, skipped = jax.block_until_ready(made)
        so_far = so_far.after(train_state, loss, skipped, count, time.perf_counter() - begin)
        recent = float(so_far.histories["loss"][-count:].mean())
        report(Progress(count, recent, so_far.accuracy))
        if so_far.steps % steps == 0:
            so_far = so_far.seen(**_scores(score, so_far.train_state, data))
            report(Progress(0, recent, so_far.accuracy))
        if keeping is not None and (so_far.steps % every == 0 or feed is None):
            keeping.save(so_far)
    return so_far._replace(train_state=local(so_far.train_state))


def _scores(score: Callable[..., Any], train_state: TrainState, data: Data) -> dict[str, list[float]]:
    """Loss and accuracy on both sets. Every process finds the same by itself, on one of its devices."""
    params, bn_state = local(train_state[:2])
    train = evaluate(score, params, bn_state, data.x, data.y)
    test = evaluate(score, params, bn_state, data.x_test, data.y_test)
    return {name: [found] for name, found in zip(_SCORES, (*train, *test), strict=True)}


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


def loss_fn(outputs: Any, y: Any) -> Any:
    """Mean cross-entropy, of logits in at least float32."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y).mean()


def scorer(network: Network) -> Callable[..., Any]:
    """``score(params, state, x, y)``: mean loss and number of right answers, with running statistics."""

    def score(params, state, x, y):
        outputs, _ = network.apply(params, state, x, train=False)
        return loss_fn(outputs, y), jnp.sum(jnp.argmax(outputs, axis=-1).astype(y.dtype) == y)

    return jax.jit(score)


def _compiled(
    step: Callable[..., Any], length: int, mesh: Mesh, start: TrainState, feed: tuple[Any, ...]
) -> tuple[Callable[..., Any], float]:
    """Up to ``length`` steps as one program, and the seconds to compile it.

    The number of steps is a runtime value, so that a short last call needs no second program.
    """

    def call(train_state, x, y, count):
        def body(i, carry):
            train_state, losses, skipped = carry
            train_state, metrics = step(train_state, (x[i], y[i]))
            return train_state, losses.at[i].set(metrics["loss"]), skipped.at[i].set(metrics["skipped"])

        blank = jnp.full((length,), jnp.nan, jnp.float32), jnp.zeros((length,), bool)
        return lax.fori_loop(0, count, body, (train_state, *blank))

    begin = time.perf_counter()
    program = jax.jit(over_devices(call, mesh)).lower(start, *feed, np.int32(1)).compile()
    return program, time.perf_counter() - begin
