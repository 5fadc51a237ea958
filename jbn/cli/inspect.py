"""``jbn inspect``: the batch norm layers of a saved run as a table and in pictures."""

import re
from pathlib import Path
from typing import Any

from rich.table import Table

from jbn import report
from jbn.cli.activations import last_layer, of_one_layer
from jbn.cli.bad_input import BadInput
from jbn.cli.batches import Batches
from jbn.cli.data import Data
from jbn.cli.documents import show
from jbn.cli.places import new_folder, replaced_files
from jbn.cli.runs import Run, accuracy, load_run

__all__ = ["run"]


def run(folder: Path, model: str | None, file: Path | None, out: Path | None) -> None:
    """Prints the table, and draws into ``out``, or into the folder of the run."""
    made = load_run(folder, model)
    data = made.data(file)
    network = made.spec.make()
    # The first batch of the run, as it was shuffled.
    size = min(made.options["batch_size"], len(data.x))
    if size < 2:
        raise BadInput("--data: got a training set of 1 example; expected at least 2; add examples.")
    rows = next(Batches(len(data.x), size, 1, made.options["seed"]).order())[0]
    _, stats = network.apply(made.params, made.state, data.x[rows], train=True)
    table = report.summary(made.params, made.state, stats)
    with replaced_files(folder) if out is None else new_folder(out) as place:
        pictures = _draw(place, made, stats, data)
    document: dict[str, Any] = {
        "run": folder,
        "model": made.file.name,
        "network": made.spec.stored,
        "data": {"source": data.source, "train": len(data.x), "test": len(data.x_test), "batch": size},
        "test_accuracy": accuracy(network, made.params, made.state, data),
        "eps": table.eps,
        "layers": [row._asdict() for row in table.rows],
        "pictures": [(folder if out is None else out) / name for name in pictures],
    }
    lines: list[Any] = [
        f"{made.file}: {_described(made)}",
        f"{data.source}: test accuracy {document['test_accuracy']:.2%}",
        f"batch B: {size} training examples",
        "",
        _as_table(table),
        "",
        "Pictures: " + ", ".join(map(str, document["pictures"])),
    ]
    show(document, lines)


def _as_table(found: report.Summary) -> Table:
    """Each layer with the least and the largest value of its channels, in 80 columns."""
    *_, dead, drift = str(found).splitlines()
    updates = [count for row in found.rows for count in row.updates or ()] or [0]
    after = " to ".join(map(str, sorted({min(updates), max(updates)})))
    caption = f"least and largest of the C channels, after {after} updates\n{dead}\n{drift}"
    table = Table(caption=caption, caption_justify="left", padding=0)
    table.add_column("layer", overflow="fold")
    for heading in ("C", "γ", "β", "running\nμ", "running\nσ²", "dead", "drift\nμ, σ²"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        pairs = (row.gamma, row.beta, row.mean, row.var, (row.drift_mean, row.drift_var))
        cells = ["\n".join("–" if value is None else f"{value:.3g}" for value in pair or ()) for pair in pairs]
        name = ".".join(re.findall(r"\w+", row.path)).removesuffix(".bn")
        table.add_row(name, "×".join(map(str, row.features)), *cells[:4], str(row.dead), cells[4])
    return table


def _draw(place: Path, made: Run, stats: Any, data: Data) -> list[str]:
    """The pictures, named after the model."""
    values = of_one_layer(made.spec, made.params, made.state, data.x_test)
    figures = {
        "statistics": report.plot_statistics(made.state, stats),
        "activations": report.plot_activations(values, title=f"{last_layer(made.spec)[2]}, test examples"),
    }
    names = {kind: f"{made.file.stem}-{kind}.png" for kind in figures}
    for kind, figure in figures.items():
        figure.savefig(place / names[kind])
    return list(names.values())


def _described(made: Run) -> str:
    spec = made.spec
    where = {"z": "before", "a": "after"}[spec.norm]
    return f"{spec.network} {'–'.join(map(str, spec.sizes))}, batch norm {where} {spec.activation}"
