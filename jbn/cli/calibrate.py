"""``jbn calibrate``: exact running statistics for a saved run, those of a whole data set."""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.documents import show
from jbn.cli.models import save_model
from jbn.cli.places import new_file
from jbn.cli.runs import accuracy, load_run, refusing

__all__ = ["run"]

# Large, since a layer behind another batch norm sees its input normalized batch by batch.
_BATCH = 1024


def run(folder: Path, model: str | None, file: Path | None, out: Path | None) -> None:
    """Recomputes the statistics with the training part of the data, and writes a new model."""
    made = load_run(folder, model)
    out = folder / "calibrated.safetensors" if out is None else out
    data = made.data(file)
    if len(data.x) < 2:
        raise BadInput("--data: got a training set of 1 example; expected at least 2; add examples.")
    network = made.spec.make()
    with new_file(out) as work:
        # Cut evenly: a last batch of one example would have no variance.
        cuts = np.array_split(np.arange(len(data.x)), -(-len(data.x) // _BATCH))
        batches = [data.x[rows] for rows in cuts]
        apply = jax.jit(partial(network.apply, train=True))
        with refusing(made.file):
            state = jbn.bn_calibrate(apply, made.params, made.state, batches, progress=sys.stdout.isatty())
        before, after = (accuracy(network, made.params, each, data) for each in (made.state, state))
        save_model(work, made.spec, made.params, state, made.inputs)
    document = {
        "run": folder,
        "model": made.file.name,
        "data": {"source": data.source, "train": len(data.x), "test": len(data.x_test)},
        "batches": len(batches),
        "test_accuracy": {"before": before, "after": after},
        "out": out,
    }
    lines = [
        f"{made.file}: statistics of {len(data.x)} training examples in {len(batches)} "
        f"batch{'es' if len(batches) > 1 else ''}",
        f"{data.source}: test accuracy {before:.2%} before, {after:.2%} after",
        f"Written: {out}",
    ]
    show(document, lines)
