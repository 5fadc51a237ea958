"""Data and small runs of ``jbn train`` for the tests of what is done with them, and their mlp in NumPy."""

import fcntl
import io
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from jbn.cli import main

CLASSES = 3


def images(seed, n=60):
    """Noise with a bright row at the height of the class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    x = rng.normal(3, 0.5, (n, 6, 4, 2))
    x[np.arange(n), 2 * y] += 2
    return {"x": x, "y": y}


def two_classes(folder):
    """A file of two classes that a line parts, 80 examples, 64 of them to train on."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    file = folder / "data.npz"
    np.savez(file, x=rng.normal(size=(80, 3)) + 4 * y[:, None], y=y)
    return file


def call(capsys, *arguments):
    """What a good command prints, parsed."""
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return json.loads(printed.out)


@contextmanager
def blank_pictures():
    """Rendering two pictures takes longer than a small run. Those of the default run are real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file: Path(file).write_bytes(b""))
        yield


def shared(tmp_path_factory, name, make):
    """A folder that ``make(folder)`` fills, and what it printed: made once for all workers of a test session."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, printed = root / name, root / f"{name}.json"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            folder.mkdir()
            with blank_pictures():
                printed.write_text(json.dumps(make(folder)))
    return folder, json.loads(printed.read_text())


def printed_by(*arguments):
    """What a good run prints, without a fixture."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(list(map(str, arguments))) == 0
    return json.loads(out.getvalue())


def train_default(folder):
    """In this folder, with real pictures."""

    def savefig(figure, file):
        figure.canvas.print_figure(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(matplotlib.figure.Figure, "savefig", savefig)
        return printed_by("train")


def trained(folder, *arguments):
    np.savez(folder / "data.npz", **images(0))
    return printed_by("train", "--data", folder / "data.npz", "--batch-size", 16, "--out", folder / "run", *arguments)


def train_resnet(folder):
    return trained(folder, "--network", "resnet", "--widths", "4,5", "--epochs", 4, "--no-compare")


def train_mlp(folder):
    """With the norm after the activation, and the statistics of each batch forgotten slowly."""
    options = ("--norm", "a", "--no-compare", "--hidden", "7,5", "--activation", "tanh", "--epochs", 3)
    return trained(folder, *options, "--lr", 0.3, "--bn-momentum", 0.99)


# An mlp that is trained alone, in 4 epochs of 3 steps.
ALONE = ("--hidden", "3", "--batch-size", "16", "--epochs", "4", "--no-compare")


def train_with_checkpoints(folder):
    np.savez(folder / "data.npz", **images(0))
    places = ("--data", folder / "data.npz", "--checkpoint-dir", folder / "kept", "--out", folder / "out")
    return printed_by("train", *ALONE, *places)


def split(seed=0):
    """Training and test set as the run splits them."""
    from sklearn.model_selection import train_test_split

    x, y = images(0).values()
    return train_test_split(x.astype(np.float32), y, test_size=12, stratify=y, random_state=seed)


def standardized(x, inputs):
    return ((x - np.asarray(inputs.mean)) / np.sqrt(np.asarray(inputs.var, np.float64))).reshape(len(x), -1)


def forward(params, state, z):
    """The mlp of `mlp_run` in NumPy, and what its first norm is given."""
    a, first = z, None
    for i, layer in enumerate(params):
        a = a @ np.asarray(layer["W"], np.float64) + np.asarray(layer["b"])
        if i == len(params) - 1:
            return a, first
        a = np.tanh(a)
        first = a if first is None else first
        if layer["bn"] is not None:
            a = (a - state[i].mean) / np.sqrt(np.asarray(state[i].var, np.float64) + 1e-5)
            a = np.asarray(layer["bn"].gamma) * a + np.asarray(layer["bn"].beta)


def refused(capsys, folder, *arguments):
    """The line on stderr, after a look that nothing else was said or written."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert printed.out == ""
    assert printed.err.startswith("jbn: ")
    assert printed.err.count("\n") == 1
    return printed.err[5:-1]
