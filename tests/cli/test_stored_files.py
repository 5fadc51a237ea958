"""Files of earlier formats, as users have them on their disks, are still read (tests/cli/files holds them)."""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from support.saved_runs import call

from jbn.cli.checkpoints import checkpoints
from jbn.cli.fit import SoFar
from jbn.cli.models import load_model
from jbn.training import TrainState

FILES = Path(__file__).parent / "files"


def unzipped(name, folder, monkeypatch):
    """What is left of runs and of their data, as the working directory."""
    with zipfile.ZipFile(FILES / f"{name}.zip") as archive:
        archive.extractall(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stored(tmp_path, monkeypatch):
    return unzipped("version-0.1.0", tmp_path, monkeypatch)


@pytest.mark.parametrize("run", ["mlp", "resnet"])
def test_every_command_reads_a_model_of_version_0_1_0(stored, capsys, run):
    summary = json.loads((stored / run / "metrics.json").read_text())["summary"]["with"]
    arrays = load_file(stored / run / "with.safetensors")
    _, params, _, inputs = load_model(stored / run / "with.safetensors")
    name, layer = ("0", params[0]) if run == "mlp" else ("stem", params["stem"])
    np.testing.assert_array_equal(layer["W"], arrays[f"params/{name}/W"])
    np.testing.assert_array_equal(layer["bn"].gamma, arrays[f"params/{name}/bn/gamma"])
    np.testing.assert_array_equal(inputs.mean, arrays["inputs/mean"])
    for command in ("inspect", "calibrate", "fold"):
        told = call(capsys, command, stored / run)["test_accuracy"]
        assert (told if command == "inspect" else told["before"]) == pytest.approx(summary["test_accuracy"])


@pytest.mark.nightly  # by day, the next test
def test_a_run_goes_on_from_a_checkpoint_of_version_0_1_0(stored, capsys):
    before = json.loads((stored / "mlp" / "metrics.json").read_text())["history"]["with"]
    options = ("--batch-size", 8, "--no-compare", "--hidden", "3,2", "--lr", 0.25, "--checkpoint-every", 2)
    keep = ("--data", "data.npz", *options, "--checkpoint-dir", "kept")
    call(capsys, "train", *keep, "--epochs", 3, "--out", "longer")
    history = json.loads((stored / "longer" / "metrics.json").read_text())["history"]["with"]
    assert len(history["loss"]) == 6
    assert history["loss"][:4] == before["loss"]
    assert history["test_loss"][:2] == before["test_loss"]


@pytest.mark.parametrize("name", ["packed", "trees"])
def test_a_checkpoint_of_either_format_is_read_to_the_same_bits(name, tmp_path, monkeypatch, capsys):
    folder = unzipped(name, tmp_path, monkeypatch)
    _, params, state, _ = load_model(folder / "mlp" / "with.safetensors")
    opt_state = (optax.TraceState(params), optax.MaskedState(optax.EmptyState()), optax.EmptyState())
    like = TrainState(params, state, opt_state, jnp.zeros((), jnp.int32))
    record = json.loads((folder / "kept" / "with" / "4" / "record" / "metadata").read_text())
    with checkpoints(folder / "kept" / "with", record["identity"]) as kept:
        found = kept.newest(SoFar.at(like))
    assert found.steps == 4
    leaves = jax.tree_util.tree_leaves_with_path({"train_state": found.train_state})
    got = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    got |= found.histories
    with np.load(folder / "kept.npz") as archive:
        wanted = {name.removeprefix("epochs/"): archive[name] for name in archive.files}
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape, got[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
    for ours, theirs in zip(jax.tree.leaves(found.train_state[:2]), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    if name == "trees":
        return  # tests/cli/test_resume.py goes on from those
    before = json.loads((folder / "mlp" / "metrics.json").read_text())["history"]["with"]
    options = ("--batch-size", 8, "--no-compare", "--hidden", "3,2", "--lr", 0.25, "--optimizer", "momentum")
    keep = ("--data", "data.npz", *options, "--checkpoint-dir", "kept", "--checkpoint-every", 2)
    call(capsys, "train", *keep, "--epochs", 3, "--out", "longer")
    history = json.loads((folder / "longer" / "metrics.json").read_text())["history"]["with"]
    assert history["loss"][:4] == before["loss"]
    assert history["test_loss"][:2] == before["test_loss"]
    assert (folder / "kept" / "with" / "6" / "train_state").is_dir()
