"""What a user sees of ``jbn bench``: a line that moves and a table on a terminal, one JSON document elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from jbn.cli.bench.contestants import CONTESTANTS
from jbn.cli.bench.options import BenchOptions
from jbn.cli.documents import to_json
from jbn.cli.streams import printing

__all__ = ["progress", "show"]


@contextmanager
def progress(options: BenchOptions) -> Iterator[Callable[[str, int], None]]:
    """Gives ``tell(mode, round)``, which says how far it is, if this is a terminal; round 0 is compilation."""
    if not sys.stdout.isatty():
        yield lambda mode, round_: None
        return
    with Console().status("") as status:

        def tell(mode: str, round_: int) -> None:
            status.update(f"{mode}: round {round_} of {options.rounds}" if round_ else f"{mode}: compiling")

        yield tell


def show(document: dict[str, Any]) -> None:
    """Prints the outcome of a run."""
    with printing():
        if document["options"]["json"] or not sys.stdout.isatty():
            print(to_json(document))
        else:
            _show_table(document)


def _show_table(document: dict[str, Any]) -> None:
    options = document["options"]
    shape = "×".join(map(str, options["shape"]))
    table = Table(title=f"Batch norm of {shape} {options['dtype']}, axis {options['axis']}")
    table.add_column("")
    for heading in ("ms a call", "time / jbn (quartiles)", "GB/s", "of a copy's"):
        table.add_column(heading, justify="right")
    for mode, rows in document["modes"].items():
        table.add_section()
        table.add_row(mode)
        for name, row in rows["contestants"].items():
            low, median, high = row["time_over_jbn"]
            ratio = "1" if name == "jbn" else "" if name == "copy" else f"{median:.2f} ({low:.2f}–{high:.2f})"
            table.add_row(
                f"  {CONTESTANTS[name].title}",
                f"{row['ms']:.4g}",
                ratio,
                f"{row['gb_per_s']:.3g}",
                "–" if row["share_of_copy"] is None else f"{row['share_of_copy']:.0%}",
            )
    console = Console()
    console.print(table)
    for line in _notes(document):
        console.print(line, highlight=False, soft_wrap=True)


def _notes(document: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    yield f"Device: {document['device']}. {versions}."
    passes = ", ".join(f"{rows['passes']} {mode}" for mode, rows in document["modes"].items())
    yield (
        f"A time above 1 is slower than jbn. GB/s count the reads and writes of x that nothing can avoid: {passes}; "
        f"where y is written over x, and finds it in a cache, they can exceed a copy's."
    )
    for name, why in document["skipped"].items():
        yield f"Skipped: {CONTESTANTS[name].title}, {why}."
    if missing := [why.split()[0] for why in document["skipped"].values() if why.endswith("is not installed")]:
        yield f"To see them too: python -m pip install {' '.join(missing)}"
    for mode, rows in document["modes"].items():
        for name, error in rows["errors"].items():
            yield f"{CONTESTANTS[name].title} could not run {mode}: {error}."
        if rows["rounds"] < document["options"]["rounds"]:
            yield f"Time was up after {rows['rounds']} rounds of {mode}."
