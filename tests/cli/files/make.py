"""Makes the stored files that tests/cli/test_stored_files.py reads: ``python tests/cli/files/make.py FOLDER``.

The committed ones were made by version 0.1.0, before any file had a digest or its arrays in float64. They stay as they
are, so that what users have on their disks is still read; a new format gets files of its own beside them.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from jbn.cli import main


def images():
    """Noise with a bright row at the height of the class; float32, and so the same whatever standardizes it."""
    rng = np.random.default_rng(7)
    y = np.arange(24) % 3
    x = rng.normal(3, 0.5, (24, 6, 4, 2)).astype(np.float32)
    x[np.arange(24), 2 * y] += 2
    return {"x": x, "y": y}


def make(folder):
    """A run of an mlp with its checkpoints, and one of a resnet."""
    np.savez(folder / "data.npz", **images())
    common = ["--data", "data.npz", "--batch-size", "8", "--epochs", "2", "--no-compare"]
    mlp = ["--hidden", "3,2", "--lr", "0.25", "--checkpoint-dir", "kept", "--checkpoint-every", "2"]
    resnet = ["--network", "resnet", "--widths", "2", "--activation", "gelu"]
    assert main(["train", *common, *mlp, "--out", "mlp"]) == 0
    assert main(["train", *common, *resnet, "--out", "resnet"]) == 0


if __name__ == "__main__":
    import os

    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        make(Path(place))
        with zipfile.ZipFile(target / "version-0.1.0.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in Path(".").rglob("*") if path.is_file() and path.suffix != ".png"):
                archive.write(file)
