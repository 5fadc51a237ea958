"""A run of ``jbn bench``: jbn beside Flax, torch and bare copies, in three modes, in under a minute."""

import gc
import math
import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.bench import display
from jbn.cli.bench.options import BenchOptions
from jbn.cli.bench.rounds import PASSES, Source, measure
from jbn.cli.bench.torch_process import Torch, torch_process
from jbn.cli.interrupt import check

__all__ = ["run"]

_SECONDS = 50.0  # for all of it
# Contestant → the package that has to be installed.
_PACKAGES = {"jbn": "jbn", "linen": "flax", "torch": "torch", "copy": "jax"}
# Arrays of the size of x, in float32, that all contestants hold together at most.
_ARRAYS = 16


def run(options: BenchOptions) -> None:
    """Times all contestants in turns, and shows the outcome."""
    started = time.perf_counter()
    # A GPU's memory is for torch as well; JAX reads this when it first meets the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    _fits(options, device)
    skipped = {name: f"{package} is not installed" for name, package in _PACKAGES.items() if not find_spec(package)}
    process: AbstractContextManager[Torch | None] = nullcontext()
    if device.platform not in ("cpu", "gpu"):
        skipped["torch"] = f"it does not run on a {device.platform}"
    elif "torch" not in skipped:
        process = torch_process(options, device.platform)
    names = [name for name in _PACKAGES if name not in skipped]
    modes: dict[str, Any] = {}
    gc.freeze()  # a collection that goes through all of JAX would outlast a turn
    try:
        with process as torch, display.progress(options) as tell:

            def at(mode: str, round_: int) -> None:
                check()
                tell(mode, round_)

            source = Source(options, torch)
            for mode in PASSES:
                now = time.perf_counter()
                deadline = now + (started + _SECONDS - now) / (len(PASSES) - len(modes))
                modes[mode] = measure(mode, names, source, deadline, at)
    finally:
        gc.unfreeze()
    display.show(_document(options, device, modes, skipped, torch))


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


def _document(
    options: BenchOptions, device: Any, modes: dict[str, Any], skipped: dict[str, str], torch: Torch | None
) -> dict[str, Any]:
    """What is printed."""
    versions = {"jbn": jbn.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("jax", "jaxlib", "flax") if find_spec(name)}
    if torch is not None and torch.version is not None:
        versions["torch"] = torch.version
    return {
        "options": asdict(options),
        "versions": versions,
        "device": f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "date": date.today().isoformat(),
        "skipped": skipped,
        "modes": modes,
    }
