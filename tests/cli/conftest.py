"""Runs that the tests of the command line share, and pictures that cost nothing where no test looks at them."""

import shutil
import signal

import pytest
from support import saved_runs


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with saved_runs.blank_pictures():
        yield


@pytest.fixture
def ctrl_c_is_heard():
    """Also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def data(tmp_path):
    return saved_runs.two_classes(tmp_path)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
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
