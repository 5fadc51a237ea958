"""What every script shares: its options, the record of a run, tables and pictures, and the files it leaves."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from jbn.cli.bench.contestants import CONTESTANTS, missing, versions
from jbn.cli.bench.engine import Spread, Turn, interleave, said

# A GPU is for torch as well; JAX reads this when it first meets the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
DTYPES = ("float32", "bfloat16", "float16")  # the first two are the usual ones
HERE = Path(__file__).resolve().parent


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
            found.setdefault(itemgetter(*keys)(row), []).append(row)
        return found

    def able(self, names: Iterable[str], among: Mapping[str, Any] = CONTESTANTS) -> list[str]:
        """Those of the contestants that are installed; the others are skipped."""
        names = list(dict.fromkeys(names))
        absent = missing(names, among)
        self.skipped |= {among[name].title: why for name, why in absent.items()}
        self.versions |= versions(among[name].package for name in names if name not in absent)
        return [name for name in names if name not in absent]

    def heading(self, title: str) -> list[str]:
        """How a page begins: on what it ran, and what did not run."""
        parts = [f"{self.about['cpu']}, {self.about['cores']} cores", f"Python {self.about['python']}"]
        parts[1:1] = [f"device {self.device}"] if self.device else []
        parts += [f"{name} {version}" for name, version in self.versions.items()]
        if self.about["load_at_start"] is not None and "rounds" in self.settings:
            parts.append(f"load {self.about['load_at_start']} at start")
        reading = "[How to read it](../README.md)."
        if "rounds" in self.settings:
            reading = f"Medians (and quartiles) of {self.settings['rounds']} rounds in random order. {reading}"
        skipped = [f"Skipped: {what}, {why}." for what, why in self.skipped.items()]
        failed = [f"Could not run: {line(row)}." for row in self.rows if row.get("error") or row.get("failed")]
        return [f"# {title}", " · ".join([*parts, self.about["date"]]), reading, *skipped, *failed]


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
    options: Mapping[str, Mapping[str, Any]],
    quick: Mapping[str, Any],
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
        options: those of its own, as argparse takes them; of lists by `some`.
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
    for key, declared in options.items():
        parser.add_argument(f"--{key}", **declared)
    given = parser.parse_args()
    for key, value in quick.items() if given.quick else ():
        now = getattr(given, key)
        setattr(given, key, now[:value] if isinstance(now, list) else value)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    run = Run(machine(), {}, "", settings)
    given.order = random.Random(given.seed) if rounds else None
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
        print(line(row), flush=True)
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


def some(values: Iterable[Any], usual: Iterable[str]) -> dict[str, Any]:
    """An option of some of the values, separated by commas."""
    allowed = list(map(str, values))

    def parse(text: str) -> list[str]:
        if unknown := [value for value in text.split(",") if value not in allowed]:
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected some of {', '.join(allowed)}")
        return text.split(",")

    return {"type": parse, "default": list(usual), "help": "some of " + ", ".join(allowed)}


def _stem(name: str, run: Run) -> str:
    """What the files of a run are called: a device that is no CPU is named."""
    if run.settings["quick"]:
        return f"{name}-quick"
    kind, _, model = run.device.partition(": ")
    where = "" if kind in ("cpu", "") else "-" + "-".join(model.lower().split())
    return f"{name}{where}-{run.about['date']}"


def line(row: dict[str, Any]) -> str:
    """A row in words, and what of it could not run; without its times, its errors and other figures of many."""
    shown = {key: value for key, value in row.items() if isinstance(value, str | int | float) and value != ""}
    return ", ".join(f"{key} {value}" for key, value in (shown | row.get("failed", {})).items())


def _compact(text: str) -> str:
    """Innermost lists on one line: a row of rounds is read, and compared, as a row."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def tried(row: dict[str, Any], call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what the call gives, or with its error."""
    try:
        return row | call() | {"error": ""}
    except Exception as error:
        return row | {"error": said(error)}


def timings(options: Any, makers: Mapping[str, Callable[[], Turn]], calls: int = 1) -> dict[str, dict[str, Any]]:
    """The seconds of all who can run, as a row has them, and who could not, with the reason."""
    seconds, failed = interleave(
        makers, rounds=options.rounds, turn_seconds=options.turn, order=options.order, calls=calls
    )
    return {"seconds": seconds, "failed": failed}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def cell(value: Spread | float | None, digits: int = 2) -> str:
    """A figure as a table has it: a spread with its quartiles, a dash for none."""
    if value is None:
        return "–"
    return value.text(digits) if isinstance(value, Spread) else f"{value:.{digits}f}"


def figure(width: float, height: float, **panels: Any) -> tuple[Any, Any]:
    """Matplotlib's figure, in inches, and its axes; without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**panels)


def bars(panel: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]], label_format: str = "") -> None:
    """Groups of horizontal bars from top to bottom, a bar of each series in each."""
    drawn = panel.grouped_bar(series, tick_labels=groups, orientation="horizontal", group_spacing=0.25)
    for bars in drawn.bar_containers if label_format else ():
        panel.bar_label(bars, fmt=label_format, fontsize=7)
    panel.yaxis.set_inverted(True)
    panel.grid(axis="x", alpha=0.3)
