"""The engine of `jbn bench` and of `benchmarks/`: turns in random order, and what follows from their times.

Absolute times drift on a shared machine; ratios within a round do not. So contestants take their turns in
random order, each round gives one ratio, and its median and quartiles are what counts.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Spread", "Turn", "interleave", "ratios", "said", "spread", "timed"]

_REST = 0.02  # s after a turn; longer than thread pools spin

Turn = Callable[[int], float]  # how often what is timed is repeated -> seconds


def timed(run: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> Turn:
    """A turn of what is called again and again, until ``wait`` returns after the last."""

    def turn(repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        return time.perf_counter() - start

    return turn


def interleave(
    makers: Mapping[str, Callable[[], Turn]],
    *,
    rounds: int,
    turn_seconds: float,
    order: random.Random,
    calls: int = 1,
    deadline: float = math.inf,
    tell: Callable[[int], None] = lambda round_: None,
    expected: type[Exception] = Exception,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times contestants (name → what makes its turn): in each round all take a turn, in random order.

    Args:
        makers: each is called once, and its turn to warm up, and once more to see how long it takes.
        rounds: how many; those that would begin after the deadline, but the first, are left out.
        turn_seconds: how long a turn is, at least; 0 for one that is not repeated.
        order: where the order comes from.
        calls: how many calls are made each time that a turn is repeated.
        deadline: in the seconds of `time.perf_counter`.
        tell: is told of each round before each turn, 0 before a contestant is made.
        expected: what makers and first turns may raise, where a contestant cannot run.

    Returns:
        Seconds a call for each round, and a line for each contestant that could not run.
    """
    turns, repeats, errors = {}, {}, {}
    for name, make in makers.items():
        tell(0)
        try:
            turn = make()
            turn(1)
            turns[name], repeats[name] = turn, math.ceil(turn_seconds / turn(1)) if turn_seconds else 1
        except expected as error:
            errors[name] = said(error)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names, done = list(turns), 0
    gc.collect()
    gc.freeze()  # a collection that goes through all of JAX would outlast a turn
    try:
        while done < rounds and (done == 0 or time.perf_counter() < deadline):
            done += 1
            order.shuffle(names)
            for name in names:
                tell(done)
                seconds[name].append(float(f"{turns[name](repeats[name]) / (repeats[name] * calls):.5g}"))
                time.sleep(_REST)
    finally:
        gc.unfreeze()
    return seconds, errors


def said(error: Exception) -> str:
    """An error in one line; one of XLA's, such as being out of memory, needs no name."""
    text = (str(error).strip() or "-").splitlines()[0].rstrip(".")[:200]
    return text if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    def text(self, digits: int = 2) -> str:
        """As it stands in a table."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(values: Iterable[float]) -> Spread:
    """Of one value or more."""
    values = list(values)
    return Spread(*(statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round: the machine's slow drift cancels, because both took their turn in the same round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]
