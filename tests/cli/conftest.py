"""Runs that the tests of the command line share, and pictures that cost nothing where no test looks at them."""

import shutil
from pathlib import Path

import matplotlib.figure
import pytest
from support import saved_runs


@pytest.fixture(scope="session", autouse=True)
def blank_pictures():
    """Rendering two pictures takes longer than a small run. Those of the default run are real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file: Path(file).write_bytes(b""))
        yield patch


@pytest.fixture(scope="session")
def default_run(blank_pictures, tmp_path_factory):
    """``jbn train``, in a folder of its own."""
    return saved_runs.shared(tmp_path_factory, "default", saved_runs.train_default)


@pytest.fixture(scope="session")
def resnet_run(tmp_path_factory):
    return saved_runs.shared(tmp_path_factory, "resnet", saved_runs.train_resnet)


@pytest.fixture(scope="session")
def mlp_run(tmp_path_factory):
    return saved_runs.shared(tmp_path_factory, "mlp", saved_runs.train_mlp)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run with checkpoints that came to its end: data.npz, out and kept."""
    return saved_runs.shared(tmp_path_factory, "finished", saved_runs.train_with_checkpoints)[0]


@pytest.fixture
def run(mlp_run, tmp_path):
    """A copy of the mlp's run, to write into."""
    return shutil.copytree(mlp_run[0] / "run", tmp_path / "run")
