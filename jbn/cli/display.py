"""What a user sees of a run: a progress bar and a table on a terminal, one JSON document elsewhere."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jbn.cli.data import Data
from jbn.cli.fit import Progress
from jbn.cli.saving import to_json
from jbn.cli.streams import printing, say

__all__ = ["progress", "show", "show_lines", "tell_data"]


@contextmanager
def progress(names: Sequence[str], steps: int, shown: bool = True) -> Iterator[Callable[[str, Progress | None], None]]:
    """Gives ``report(name, progress)``, which moves the bar of one of the runs, if this is a terminal.

    The first report of a run is None, where it has begun to compile.
    """
    if not (shown and sys.stdout.isatty()):
        yield lambda name, made: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=Console()) as bar:
        tasks = {name: bar.add_task(name, total=steps, start=False, state="waiting") for name in names}

        def report(name: str, made: Progress | None) -> None:
            if made is None:
                bar.update(tasks[name], state="compiling")
                return
            bar.start_task(tasks[name])
            accuracy = "" if made.accuracy is None else f"  test accuracy {made.accuracy:.1%}"
            bar.update(tasks[name], advance=made.steps, state=f"loss {made.loss:.4f}{accuracy}")

        yield report


def tell_data(data: Data) -> None:
    """Says how the data were understood, on a terminal, and on stderr what is odd about them."""
    for doubt in data.doubts:
        say(doubt)
    if sys.stdout.isatty():
        with suppress(OSError):
            print(f"{data.source}: {data.understood}")


def show(document: dict[str, Any]) -> None:
    """Prints the outcome of a run."""
    with printing():
        if sys.stdout.isatty():
            _show_table(document)
        else:
            print(to_json(document))


def _show_table(document: dict[str, Any]) -> None:
    console = Console()
    options, summary = document["options"], document["summary"]
    table = Table(title=f"{document['data']['source']}, {document['steps']} steps")
    table.add_column("")
    for name in summary:
        table.add_column(f"{name} batch norm", justify="right")
    for label, shown in _rows(options["target_loss"], document["steps"]).items():
        table.add_row(label, *(shown(run) for run in summary.values()))
    if any(run["skipped_steps"] for run in summary.values()):
        table.add_row("steps skipped (not finite)", *(str(run["skipped_steps"]) for run in summary.values()))
    console.print(table)
    if document["devices"] > 1:
        several = f" in {document['processes']} processes" if document["processes"] > 1 else ""
        console.print(f"{document['devices']} devices{several}, {document['stats']} statistics.", highlight=False)
    if document["held_equal"]:
        console.print(f"Held equal: {', '.join(document['held_equal'])}.", highlight=False)
    if len(summary) == 2 and summary["with"]["test_accuracy"] < summary["without"]["test_accuracy"]:
        console.print(
            f"Batch norm did worse here. It wants a learning rate of its own, often a larger one (--lr, now "
            f"{options['lr']:g}), and batches that are not small (--batch-size, now {options['batch_size']}).",
            highlight=False,
        )
    console.print(f"Results in {escape(str(options['out']))}", highlight=False, soft_wrap=True)


def show_lines(document: dict[str, Any], lines: Sequence[str | Table]) -> None:
    """Prints what a command found: lines and tables on a terminal, the document elsewhere."""
    with printing():
        if not sys.stdout.isatty():
            print(to_json(document))
            return
        for line in lines:
            print(line) if isinstance(line, str) else Console().print(line)


def _rows(target: float, steps: int) -> dict[str, Callable[[dict[str, Any]], str]]:
    def reached(run: dict[str, Any]) -> str:
        found = run["steps_to_target"]
        return f"not in {steps}" if found is None else str(found)

    return {
        "train loss": lambda run: f"{run['train_loss']:.4f}",
        "test accuracy": lambda run: f"{run['test_accuracy']:.2%}",
        f"steps to a loss of {target:g}": reached,
        "ms per step": lambda run: f"{run['ms_per_step']:.2f}",
        "compile time (s)": lambda run: f"{run['compile_s']:.2f}",
    }
