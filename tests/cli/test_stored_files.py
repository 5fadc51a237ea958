"""Files of earlier formats, as users have them on their disks, are still read (tests/cli/files holds them)."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.saved_runs import call

from jbn.cli.models import load_model

FILES = Path(__file__).parent / "files"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """What version 0.1.0 has left of two runs and of their data, as the working directory."""
    with zipfile.ZipFile(FILES / "version-0.1.0.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_a_run_goes_on_from_a_checkpoint_of_version_0_1_0(stored, capsys):
    before = json.loads((stored / "mlp" / "metrics.json").read_text())["history"]["with"]
    options = ("--batch-size", 8, "--no-compare", "--hidden", "3,2", "--lr", 0.25, "--checkpoint-every", 2)
    keep = ("--data", "data.npz", *options, "--checkpoint-dir", "kept")
    call(capsys, "train", *keep, "--epochs", 3, "--out", "longer")
    history = json.loads((stored / "longer" / "metrics.json").read_text())["history"]["with"]
    assert len(history["loss"]) == 6
    assert history["loss"][:4] == before["loss"]
    assert history["test_loss"][:2] == before["test_loss"]
