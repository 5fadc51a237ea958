"""Rounds in which all contestants take a turn, and what follows from their times.

Absolute times drift on a shared machine; ratios within a round do not. So contestants take their turns in
random order, each round gives one ratio, and its median and quartiles are what counts.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jbn.cli.bad_input import BadInput
from jbn.cli.bench.in_jax import jax_turn
from jbn.cli.bench.options import BenchOptions
from jbn.cli.bench.torch_process import Torch

__all__ = ["PASSES", "Source", "measure", "summary"]

# Reads and writes of x that nothing can avoid; for forward+backward those of g, y and dx as well.
PASSES = {"forward": 3, "forward+backward": 8, "evaluation": 2}
_COPY_PASSES = 2
_COPIED = 2**20  # bytes; a copy of less takes as long as its dispatch, and says nothing of bandwidth
_TURN = 0.02  # s, a turn's length at least
_REST = 0.02  # s after a turn; longer than thread pools spin

Turn = Callable[[int], float]  # how often the chain of calls is repeated -> seconds


class Source(NamedTuple):
    """Where turns come from."""

    options: BenchOptions
    torch: Torch | None

    def turn(self, name: str, mode: str, steps: int) -> Turn:
        """A turn of one contestant: as often as is asked, ``steps`` dependent calls."""
        if name == "torch" and self.torch is not None:
            return self.torch.turn(mode, steps)
        run = jax_turn(name, mode, steps, self.options)

        def turn(repeats):
            start = time.perf_counter()
            run(repeats)
            return time.perf_counter() - start

        return turn


def measure(
    mode: str, names: list[str], source: Source, deadline: float, at: Callable[[str, int], None]
) -> dict[str, Any]:
    """What one mode costs each contestant; rounds that would begin after the deadline, but the first, are left out."""
    options = source.options
    steps = _steps(options.nbytes)
    turns, repeats, errors = {}, {}, {}
    for name in names:
        at(mode, 0)
        try:
            turn = source.turn(name, mode, steps)
            turn(1)
            turns[name], repeats[name] = turn, math.ceil(_TURN / turn(1))
        except RuntimeError as error:  # XLA's are among them, out of memory above all
            errors[name] = str(error).partition("\n")[0].rstrip(".")
    if vital := [name for name in ("jbn", "copy") if name in errors]:
        raise BadInput(
            f"--shape: got {options.shown}; expected one that fits this device, which says of {mode}: "
            f"{errors[vital[0]]}; use a smaller batch."
        )
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    order, done = list(turns), 0
    while done < options.rounds and (done == 0 or time.perf_counter() < deadline):
        done += 1
        random.shuffle(order)
        for name in order:
            at(mode, done)
            seconds[name].append(turns[name](repeats[name]) / (repeats[name] * steps))
            time.sleep(_REST)
    return {
        "passes": PASSES[mode],
        "rounds": done,
        "contestants": summary(seconds, PASSES[mode], options.nbytes),
        "errors": errors,
    }


def _steps(nbytes: int) -> int:
    """Calls in a row: many where a call is short, so that dispatch does not count, and few where it is long."""
    return max(2, min(10, 2**28 // nbytes), min(1000, 2**22 // nbytes))


def summary(seconds: dict[str, list[float]], passes: int, nbytes: int) -> dict[str, Any]:
    """Time, ratio and bandwidth of each contestant, from the seconds a call took it in each round."""
    copies = [_COPY_PASSES / time_ for time_ in seconds["copy"]]
    rows = {}
    for name, times in seconds.items():
        moved = _COPY_PASSES if name == "copy" else passes
        rows[name] = {
            "ms": 1e3 * statistics.median(times),
            "time_over_jbn": _quartiles([a / b for a, b in zip(times, seconds["jbn"], strict=True)]),
            "gb_per_s": 1e-9 * moved * nbytes / statistics.median(times),
            "share_of_copy": statistics.median(moved / a / b for a, b in zip(times, copies, strict=True))
            if nbytes >= _COPIED
            else None,
            "seconds": times,
        }
    return rows


def _quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
