"""What a user sees of a run: a progress bar and a table on a terminal, one JSON document elsewhere."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jbn.cli.fit import Progress
from jbn.cli.saving import to_json

__all__ = ["progress", "show", "show_lines"]


@contextmanager
def progress(names: Sequence[str], steps: int, shown: bool = True) -> Iterator[Callable[[str, Progress], None]]:
    """Gives ``report(name, progress)``, which moves the bar of one of the runs, if this is a terminal."""
    console = Console()
    if not (shown and sys.stdout.isatty()):
        yield lambda name, made: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  test accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console) as bar:
        tasks = {name: bar.add_task(name, total=steps, start=False, loss="  –  ", accuracy="  –  ") for name in names}

        def report(name: str, made: Progress) -> None:
            bar.start_task(tasks[name])
            accuracy = "  –  " if made.accuracy is None else f"{made.accuracy:5.1%}"
            bar.update(tasks[name], advance=made.steps, loss=f"{made.loss:.4f}", accuracy=accuracy)

        yield report


def show(document: dict[str, Any]) -> None:
    """Prints the outcome of a run."""
    console = Console()
    if not sys.stdout.isatty():
        print(to_json(document))
        return
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
    console.print(f"Results in {escape(str(options['out']))}", highlight=False, soft_wrap=True)


def show_lines(document: dict[str, Any], lines: Sequence[str]) -> None:
    """Prints what a command found: lines on a terminal, the document elsewhere."""
    print("\n".join(lines) if sys.stdout.isatty() else to_json(document))


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
