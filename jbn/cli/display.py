"""What a terminal shows of a run: how the data were understood, a progress bar, and what came out."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jbn.cli.data import Data
from jbn.cli.fit import Progress
from jbn.cli.streams import say

__all__ = ["lines_of", "progress", "tell_data"]


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


def lines_of(document: dict[str, Any]) -> Iterator[str | Table]:
    """The outcome of a run for a terminal."""
    options, summary = document["options"], document["summary"]
    table = Table(title=f"{document['data']['source']}, {document['steps']} steps")
    table.add_column("")
    for name in summary:
        table.add_column(f"{name} batch norm", justify="right")
    for label, shown in _rows(options["target_loss"], document["steps"]).items():
        table.add_row(label, *(shown(run) for run in summary.values()))
    if any(run["skipped_steps"] for run in summary.values()):
        table.add_row("steps skipped (not finite)", *(str(run["skipped_steps"]) for run in summary.values()))
    yield table
    if document["devices"] > 1:
        several = f" in {document['processes']} processes" if document["processes"] > 1 else ""
        yield f"{document['devices']} devices{several}, {document['stats']} statistics."
    if document["held_equal"]:
        yield f"Held equal: {', '.join(document['held_equal'])}."
    if len(summary) == 2 and summary["with"]["test_accuracy"] < summary["without"]["test_accuracy"]:
        yield (
            f"Batch norm did worse here. It wants a learning rate of its own, often a larger one\n(--lr, now "
            f"{options['lr']:g}), and batches that are not small (--batch-size, now {options['batch_size']})."
        )
    yield f"Results in {options['out']}"


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
