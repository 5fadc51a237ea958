"""What every script shares: its options, the record of a run, tables and pictures, and the files it leaves."""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jbn.cli.bench.contestants import CONTESTANTS, missing, versions
from jbn.cli.bench.engine import said

# A GPU is for torch as well; JAX reads this when it first meets the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass
class Run:
    """All that was measured."""

    about: dict[str, Any]
    versions: dict[str, str]
    device: str
    settings: dict[str, Any]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # what → why
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def by(self, *keys: str) -> dict[Any, list[dict[str, Any]]]:
        """The rows by the values of some keys; of a single key, by its value."""
        found: dict[Any, list[dict[str, Any]]] = {}
        for row in self.rows:
            values = tuple(row[key] for key in keys)
            found.setdefault(values if len(keys) > 1 else values[0], []).append(row)
        return found

    def able(self, names: Iterable[str], among: Mapping[str, Any] = CONTESTANTS) -> list[str]:
        """Those of the contestants that are installed; the others are skipped."""
        names = list(dict.fromkeys(names))
        absent = missing(names, among)
        self.skipped |= {among[name].title: why for name, why in absent.items()}
        self.versions |= versions(among[name].package for name in names if name not in absent)
        return [name for name in names if name not in absent]

    def heading(self, title: str) -> list[str]:
        """How a page begins."""
        parts = [f"{self.about['cpu']}, {self.about['cores']} cores", f"Python {self.about['python']}"]
        parts[1:1] = [f"device {self.device}"] if self.device else []
        parts += [f"{name} {version}" for name, version in self.versions.items()]
        if self.about["load_at_start"] is not None and "rounds" in self.settings:
            parts.append(f"load {self.about['load_at_start']} at start")
        skipped = [f"Skipped: {what}, {why}." for what, why in self.skipped.items()]
        return [f"# {title}", " · ".join([*parts, self.about["date"]]), *skipped]


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, system, load and date."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.date.today().isoformat(),
    }


def main(
    script: str,
    measure: Callable[[Any, Run], Iterator[dict[str, Any]]],
    page: Callable[[Run], str],
    picture: Callable[[Run], Any] | None = None,
    *,
    name: Callable[[Any], str] | None = None,
    rounds: int = 0,
    turn: float = 0.0,
    lists: Mapping[str, tuple[Iterable[Any], Iterable[Any]]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    quick: Mapping[str, Any] | None = None,
    on_device: bool = True,
) -> None:
    """What a script does: it measures row after row, prints what comes out, and writes it to files.

    Args:
        script: its docstring.
        measure: gives rows, as JSON has them, for its options and the run that they are part of.
        page: the table of a run, in Markdown.
        picture: a figure of matplotlib.
        name: what the files are called, given the options; else as the script.
        rounds, turn: the usual ones, where it times something.
        lists: options that take some of the values, separated by commas: the values and the usual ones.
        options: other options, as argparse takes them.
        quick: of options, what ``--quick`` makes of them: of a list so many, else the value.
        on_device: whether it runs something, and not only compiles it.
    """
    parser = argparse.ArgumentParser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of under a minute; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="where the files go")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="in which each takes a turn")
        parser.add_argument("--turn", type=float, default=turn, metavar="SECONDS", help="a turn's length, at least")
        parser.add_argument("--seed", type=int, default=0, help="of the random order")
    for key, (values, usual) in (lists or {}).items():
        values = list(map(str, values))
        parser.add_argument(f"--{key}", type=_some(values), default=list(usual), help="some of " + ", ".join(values))
    for key, declared in (options or {}).items():
        parser.add_argument(f"--{key}", **declared)
    given = parser.parse_args()
    for key, value in (quick or {}).items() if given.quick else ():
        now = getattr(given, key)
        setattr(given, key, now[:value] if isinstance(now, list) else value)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    run = Run(machine(), {}, "", settings)
    if on_device:
        import jax

        device = jax.devices()[0]
        run.device = f"{device.platform}: {device.device_kind}"
    stem = _stem((name or (lambda given: Path(parser.prog).stem.replace("_", "-")))(given), run)
    run.able(["jbn"])
    given.out.mkdir(parents=True, exist_ok=True)
    record = given.out / f"{stem}.json"
    for row in measure(given, run):
        run.rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _shown(row)), flush=True)
        record.write_text(_compact(json.dumps(dataclasses.asdict(run), indent=1, ensure_ascii=False)) + "\n")
    if not run.rows:
        raise SystemExit("\n".join(run.heading("Nothing was measured")))
    text = page(run).rstrip() + "\n"
    print("\n" + text)
    written = [record, given.out / f"{stem}.md"]
    if picture is not None:
        written.append(given.out / f"{stem}.png")
        picture(run).savefig(written[-1], dpi=110, bbox_inches="tight")
        text += f"\n![{stem}]({stem}.png)\n"
    written[1].write_text(text)
    print("written:", *written, flush=True)


def _some(values: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := [value for value in text.split(",") if value not in values]:
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected some of {', '.join(values)}")
        return text.split(",")

    return parse


def _stem(name: str, run: Run) -> str:
    """What the files of a run are called: a device that is no CPU is named."""
    if run.settings["quick"]:
        return f"{name}-quick"
    kind, _, model = run.device.partition(": ")
    where = "" if kind in ("cpu", "") else "-" + "-".join(model.lower().split())
    return f"{name}{where}-{run.about['date']}"


def _shown(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What of a row is a line while the script runs; of times their medians."""
    for key, value in row.items():
        if key == "seconds":
            yield from ((name, sorted(times)[len(times) // 2]) for name, times in value.items())
        elif (value and not isinstance(value, list | tuple | dict)) or (value and key == "errors"):
            yield key, value


def _compact(text: str) -> str:
    """Innermost lists on one line: a row of rounds is read, and compared, as a row."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def tried(row: dict[str, Any], call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what the call gives, or with its error."""
    try:
        return row | call() | {"error": ""}
    except Exception as error:
        return row | {"error": said(error)}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def geomean(values: Iterable[float]) -> float:
    """The geometric mean."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def figure(**arguments: Any) -> tuple[Any, Any]:
    """Matplotlib's figure and axes, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **arguments)


def bars(panel: Any, groups: Sequence[str], series: Mapping[str, Sequence[Any]], label_format: str = "") -> None:
    """Groups of horizontal bars from top to bottom, a bar of each series in each; a value may be a `Spread`."""
    height = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        at = [line + (place - (len(series) - 1) / 2) * height for line in range(len(groups))]
        spreads = [value if isinstance(value, tuple) else (value, value, value) for value in values]
        errors = [[median - low for low, median, _ in spreads], [high - median for _, median, high in spreads]]
        drawn = panel.barh(
            at, [median for _, median, _ in spreads], 0.9 * height, xerr=None if label_format else errors, label=label
        )
        if label_format:
            panel.bar_label(drawn, fmt=label_format, fontsize=7)
    panel.set_yticks(range(len(groups)), groups)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
