"""What every benchmark shares: turns in random order, medians with their spread, the files written."""

import dataclasses
import datetime
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "jax": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "KERAS_BACKEND": "jax"},
    "torch": {"OMP_WAIT_POLICY": "passive"},
    # glibc keeps freed memory instead of handing it back, so that torch pays no page faults.
    "torch_tuned": {
        "OMP_WAIT_POLICY": "passive",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
}


class Engine:
    """A worker process, asked for one thing at a time."""

    def __init__(self, name: str):
        environment = {**ENVIRONMENT[name], **os.environ}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE,
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The worker ended with status {self._process.wait()} during {call} {arguments}.")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Here:
    """An engine in this process, where all contestants are JAX: ``build(name, case)`` gives what is timed.

    If that has a method ``refresh`` it is called before each turn, untimed.
    """

    def __init__(self, build: Callable[[str, dict[str, Any]], Callable[[], Any]]):
        self._build = build
        self._turns: dict[str, tuple[Callable[[], Any], int]] = {}

    def ask(self, call: str, **arguments: Any) -> Any:
        return getattr(self, call)(**arguments)

    def prepare(self, name: str, case: dict[str, Any], turn_seconds: float) -> dict[str, Any]:
        try:
            run = self._build(name, case)
            run()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        self._turns[name] = run, max(1, math.ceil(turn_seconds / seconds))
        return {"seconds": seconds}

    def turn(self, name: str) -> float:
        run, repeats = self._turns[name]
        getattr(run, "refresh", lambda: None)()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def clear(self) -> None:
        import jax

        self._turns = {}
        jax.clear_caches()


@dataclasses.dataclass
class Run:
    """All that was measured."""

    about: dict[str, Any]
    versions: dict[str, str]
    device: str
    settings: dict[str, Any]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # contestant → why
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(values: Iterable[float]) -> Spread:
    values = sorted(values)
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round: the machine's slow drift cancels, because both took their turn in the same round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def geomean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values))


def geomeans(columns: Sequence[Sequence[float]]) -> list[float]:
    """Geometric mean over several cases, for each round."""
    return [geomean(row) for row in zip(*columns, strict=True)]


def interleave(
    engines: Mapping[str, Engine | Here],
    contestants: dict[str, str],
    case: dict[str, Any],
    *,
    rounds: int,
    turn_seconds: float,
    order: random.Random,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times ``contestants`` (name → engine) on one case: in each round all take a turn, in random order.

    Returns seconds per call for each round, and an error for each contestant that could not run the case.
    """
    errors, ready = {}, []
    for name, engine in contestants.items():
        answer = engines[engine].ask("prepare", name=name, case=case, turn_seconds=turn_seconds)
        if "error" in answer:
            errors[name] = answer["error"]
        else:
            ready.append(name)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 1):
        order.shuffle(ready)
        for name in ready:
            elapsed = engines[contestants[name]].ask("turn", name=name)
            if turn:  # the first round warms caches and clocks
                seconds[name].append(elapsed)
    for engine in set(contestants.values()):
        engines[engine].ask("clear")
    return seconds, errors


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, system, load and date."""
    model = platform.processor() or platform.machine()
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = found[1]
    memory = None
    if meminfo.exists() and (found := re.search(r"MemTotal:\s*(\d+) kB", meminfo.read_text())):
        memory = round(int(found[1]) / 2**20, 1)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": affinity,
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.date.today().isoformat(),
    }


def machine_line(about: dict[str, Any], versions: dict[str, str], device: str | None = None) -> str:
    parts = [f"{about['cpu']}, {about['cores']} cores"]
    if device:
        parts.append(f"device {device}")
    parts.append(f"Python {about['python']}")
    parts += [f"{name} {version}" for name, version in versions.items()]
    if about["load_at_start"] is not None:
        parts.append(f"load {about['load_at_start']} at start")
    return " · ".join([*parts, about["date"]])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def stem(name: str, device: str, date: str, *, quick: bool) -> str:
    """What the files of a run are called: a device that is no CPU is named."""
    if quick:
        return f"{name}-quick"
    kind, _, model = device.partition(": ")
    where = "" if kind == "cpu" else "-" + "-".join(model.lower().split())
    return f"{name}{where}-{date}"


def write(out: Path, stem: str, record: dict[str, Any], page: str, figure: Any = None) -> list[Path]:
    """Writes STEM.json, STEM.md and, given a figure, STEM.png; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{stem}.json", out / f"{stem}.md"]
    paths[0].write_text(_compact(json.dumps(record, indent=1, ensure_ascii=False)) + "\n")
    if figure is not None:
        paths.append(out / f"{stem}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
        page = f"{page.rstrip()}\n\n![{stem}]({stem}.png)"
    paths[1].write_text(page.rstrip() + "\n")
    return paths


def _compact(text: str) -> str:
    """Innermost lists on one line: a row of rounds is read, and compared, as a row."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def figure(**arguments: Any) -> tuple[Any, Any]:
    """Matplotlib's figure and axes, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(**arguments)


def comma_separated(choices: Iterable[str]) -> Any:
    """The type of an option that takes some of ``choices``, separated by commas."""
    choices = tuple(choices)

    def parse(text: str) -> list[str]:
        import argparse

        values = text.split(",")
        unknown = [value for value in values if value not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected some of {', '.join(choices)}")
        return values

    return parse


def parser(about: str, *, rounds: int | None = None, turn: float = 0.0) -> Any:
    """An argument parser with what every script takes, and with ``rounds`` what every script that times takes."""
    import argparse

    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a smoke run of under a minute; its figures mean nothing")
    options.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="where the files go")
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds, help="in which each takes a turn")
        options.add_argument("--turn", type=float, default=turn, metavar="SECONDS", help="a turn's length, at least")
        options.add_argument("--seed", type=int, default=0, help="of the random order")
    return options
