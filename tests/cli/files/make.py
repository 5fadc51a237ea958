"""Makes the stored files that tests/cli/test_stored_files.py reads: ``python tests/cli/files/make.py FOLDER``.

The committed ones stay as they are, so that what users have on their disks is still read; a new format gets files of
its own beside them. All are of version 0.1.0, in the order in which its formats came:

- ``version-0.1.0.zip``: no file has a digest, nor its arrays in float64; a run of an mlp with its checkpoints, and one
  of a resnet.
- ``packed.zip``: models have digests; all arrays of a checkpoint are packed into one. An mlp, and in ``kept.npz`` what
  its last checkpoint holds.
- ``trees.zip``: a checkpoint is a pytree. What ``packed.zip`` holds, made by the code as it is; this is what the
  program writes.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import numpy as np

from jbn.cli import main


def images():
    """Noise with a bright row at the height of the class; float32, and so the same whatever standardizes it."""
    rng = np.random.default_rng(7)
    y = np.arange(24) % 3
    x = rng.normal(3, 0.5, (24, 6, 4, 2)).astype(np.float32)
    x[np.arange(24), 2 * y] += 2
    return {"x": x, "y": y}


def restored(step):
    """The arrays of a checkpoint by their names, read by Orbax alone; those of the histories by their last names."""
    from orbax.checkpoint import StandardCheckpointer

    with StandardCheckpointer() as reader:
        items = {name: reader.restore((step / name).absolute()) for name in ("train_state", "histories")}
    leaves = jax.tree_util.tree_leaves_with_path(items)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    return {name.removeprefix("histories/"): array for name, array in named.items()}


def make(folder):
    """A run of an mlp with its checkpoints."""
    np.savez(folder / "data.npz", **images())
    common = ["--data", "data.npz", "--batch-size", "8", "--epochs", "2", "--no-compare"]
    mlp = ["--hidden", "3,2", "--lr", "0.25", "--optimizer", "momentum"]
    assert main(["train", *common, *mlp, "--checkpoint-dir", "kept", "--checkpoint-every", "4", "--out", "mlp"]) == 0
    record = json.loads((folder / "kept" / "with" / "4" / "record" / "metadata").read_text())
    assert record["step"] == 4
    np.savez_compressed("kept.npz", **restored(folder / "kept" / "with" / "4"))


if __name__ == "__main__":
    import os

    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        make(Path(place))
        with zipfile.ZipFile(target / "trees.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in Path(".").rglob("*") if path.is_file()):
                if file.suffix != ".png" and file.name != ".lock":
                    archive.write(file)
