"""``jbn fold``: a saved run without its batch norms, for inference."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jbn.cli.documents import show
from jbn.cli.fit import rows_of
from jbn.cli.models import save_model
from jbn.cli.places import new_file
from jbn.cli.runs import accuracy, load_run, refusing
from jbn.networks import fold

__all__ = ["run"]


def run(folder: Path, model: str | None, file: Path | None, out: Path | None) -> None:
    """Folds the batch norms into the layers next to them, and writes a new model."""
    made = load_run(folder, model)
    out = folder / "folded.safetensors" if out is None else out
    data = made.data(file)
    network = made.spec.make()
    with new_file(out) as work:
        with refusing(made.file):
            folded, params = fold(made.spec.make, made.params, made.state)
        before = accuracy(network, made.params, made.state, data)
        after = accuracy(folded, params, None, data)

        @jax.jit
        def outputs(x):
            return (
                network.apply(made.params, made.state, x, train=False)[0],
                folded.apply(params, None, x, train=False)[0],
            )

        pairs = [map(np.asarray, outputs(x)) for x in rows_of(data.x_test)]
        wanted, got = (np.concatenate(column).astype(np.float64) for column in zip(*pairs, strict=True))
        difference, largest = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
        save_model(work, replace(made.spec, norm="none"), params, None, made.inputs)
    document = {
        "run": folder,
        "model": made.file.name,
        "data": {"source": data.source, "test": len(data.x_test)},
        "test_accuracy": {"before": before, "after": after},
        "largest_difference": difference,
        "largest_output": largest,
        "out": out,
    }
    lines = [
        f"{made.file}: batch norms folded into the layers next to them",
        f"{data.source}: test accuracy {before:.2%} before, {after:.2%} after",
        f"Outputs differ by at most {difference:.2g}, where the largest is {largest:.3g}",
        f"Written: {out}",
    ]
    show(document, lines)
