"""A run of ``jbn bench``: jbn beside Flax, torch and bare copies, in three modes, in under a minute."""

import math
import os
import platform
import random
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jbn.cli.bad_input import BadInput
from jbn.cli.bench import display
from jbn.cli.bench.contestants import CONTESTANTS, PASSES, Case, missing, versions
from jbn.cli.bench.engine import interleave, ratios, spread
from jbn.cli.bench.in_jax import jax_turn
from jbn.cli.bench.options import BenchOptions
from jbn.cli.bench.torch_process import Torch, torch_process
from jbn.cli.interrupt import check

__all__ = ["run", "summary"]

_NAMES = ("jbn", "linen", "torch", "copy")
_SECONDS = 50.0  # for all of it
_TURN = 0.02  # s, a turn's length at least
_COPY_PASSES = 2
_COPIED = 2**20  # bytes; a copy of less takes as long as its dispatch, and says nothing of bandwidth
# Arrays of the size of x, in float32, that all contestants hold together at most.
_ARRAYS = 16


def run(options: BenchOptions) -> None:
    """Times all contestants in turns, and shows the outcome."""
    started = time.perf_counter()
    # A GPU's memory is for torch as well; JAX reads this when it first meets the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    _fits(options, device)
    skipped = missing(_NAMES)
    if device.platform not in ("cpu", "gpu"):
        skipped["torch"] = f"it does not run on a {device.platform}"
    names = [name for name in _NAMES if name not in skipped]
    process: AbstractContextManager[Any] = torch_process(device.platform) if "torch" in names else nullcontext()
    modes: dict[str, Any] = {}
    with process as torch, display.progress(options) as tell:
        for mode in PASSES:
            now = time.perf_counter()
            deadline = now + (started + _SECONDS - now) / (len(PASSES) - len(modes))
            modes[mode] = _measured(mode, names, options, torch, deadline, tell)
    display.show(
        {
            "options": asdict(options),
            "versions": versions(CONTESTANTS[name].package for name in names) | {"python": platform.python_version()},
            "device": f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
            "date": date.today().isoformat(),
            "skipped": skipped,
            "modes": modes,
        }
    )


def _fits(options: BenchOptions, device: Any) -> None:
    free, needed = _free_memory(device), _ARRAYS * 4 * math.prod(options.shape)
    if free is not None and needed > free:
        raise BadInput(
            f"--shape: got {options.shown}, which takes {needed / 2**30:.3g} GiB to compare; "
            f"expected at most {free / 2**30:.3g} GiB, what is free; use a smaller batch."
        )


def _free_memory(device: Any) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.platform != "cpu":
        told = device.memory_stats() or {}
        return told["bytes_limit"] - told.get("bytes_in_use", 0) if "bytes_limit" in told else None
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _measured(
    mode: str, names: list[str], options: BenchOptions, torch: Torch | None, deadline: float, tell: Any
) -> dict[str, Any]:
    """What one mode costs each contestant."""
    # Many calls in a row where a call is short, so that dispatch does not count, and few where it is long.
    steps = max(2, min(10, 2**28 // options.nbytes), min(1000, 2**22 // options.nbytes))
    case = Case(options.shape, options.axis, options.dtype, mode, steps)

    def at(round_: int) -> None:
        check()
        tell(mode, round_)

    seconds, errors = interleave(
        {name: partial(torch.turn if torch and name == "torch" else jax_turn, name, case) for name in names},
        rounds=options.rounds,
        turn_seconds=_TURN,
        order=random.Random(),
        calls=steps,
        deadline=deadline,
        tell=at,
        expected=RuntimeError,  # XLA's are among them, out of memory above all; another is a bug
    )
    if vital := [name for name in ("jbn", "copy") if name in errors]:
        raise BadInput(
            f"--shape: got {options.shown}; expected one that fits this device, which says of {mode}: "
            f"{errors[vital[0]]}; use a smaller batch."
        )
    return {
        "passes": PASSES[mode],
        "rounds": len(seconds["jbn"]),
        "contestants": summary(seconds, PASSES[mode], options.nbytes),
        "errors": errors,
    }


def summary(seconds: dict[str, list[float]], passes: int, nbytes: int) -> dict[str, Any]:
    """Time, ratio and bandwidth of each contestant, from the seconds a call took it in each round."""
    rows = {}
    for name, times in seconds.items():
        moved = _COPY_PASSES if name == "copy" else passes
        share = statistics.median(ratios(seconds["copy"], times)) * moved / _COPY_PASSES
        rows[name] = {
            "ms": 1e3 * statistics.median(times),
            "time_over_jbn": list(spread(ratios(times, seconds["jbn"]))),
            "gb_per_s": 1e-9 * moved * nbytes / statistics.median(times),
            "share_of_copy": share if nbytes >= _COPIED else None,
            "seconds": times,
        }
    return rows
