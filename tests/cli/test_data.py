"""Data as they come: how they are standardized, what labels may be, and what is said about odd ones."""

import io
import json
import signal
import sys

import numpy as np
import pytest
from support.saved_runs import call

from jbn.cli import main
from jbn.cli.data import Fitted, load_data
from jbn.cli.models import load_model

SMALL = ("--epochs", 1, "--batch-size", 32, "--hidden", "3", "--no-compare")  # as other tests, to be compiled once


def loaded(folder, x, y, flat=True, **more):
    np.savez(folder / "d.npz", x=x, y=y, **more)
    return load_data(folder / "d.npz", 0, flat=flat)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape)


class TestStandardized:
    @pytest.mark.parametrize("dtype", ["float64", "int64"])
    def test_timestamps_keep_what_float32_would_round_away(self, tmp_path, dtype):
        seconds = np.arange(60).reshape(60, 1)
        data = loaded(tmp_path, (1_700_000_000 + seconds).astype(dtype), np.arange(60) % 2)
        plain = loaded(tmp_path, seconds, np.arange(60) % 2)
        np.testing.assert_allclose(data.x, plain.x, atol=1e-6)
        np.testing.assert_allclose(data.x_test, plain.x_test, atol=1e-6)
        assert data.inputs.mean == pytest.approx(1_700_000_000 + plain.inputs.mean, abs=1e-6)

    def test_the_statistics_of_large_values_are_kept_for_the_commands_that_read_a_run(self, tmp_path, capsys):
        y = np.arange(60) // 30
        np.savez(tmp_path / "d.npz", x=1.7e9 + np.arange(60.0).reshape(60, 1), y=y)
        arguments = ("--data", tmp_path / "d.npz", "--lr", 0.5, *SMALL, "--epochs", 60, "--batch-size", 16)
        trained = call(capsys, "train", *arguments, "--out", tmp_path / "run")["summary"]["with"]["test_accuracy"]
        assert trained >= 0.9
        _, _, _, inputs = load_model(tmp_path / "run" / "with.safetensors")
        assert inputs.var == pytest.approx(np.var(np.arange(60)), rel=0.3)
        for data in ((), ("--data", tmp_path / "d.npz")):
            assert call(capsys, "inspect", tmp_path / "run", *data)["test_accuracy"] == pytest.approx(trained)

    def test_a_set_larger_than_a_part_is_standardized_as_a_whole(self, tmp_path, monkeypatch):
        x, y = noise(50, 3), np.arange(50) % 2
        whole = loaded(tmp_path, x, y)
        monkeypatch.setattr("jbn.cli.data._VALUES_AT_A_TIME", 7)
        parts = loaded(tmp_path, x, y)
        assert parts.digest == whole.digest
        np.testing.assert_allclose(parts.x, whole.x, rtol=1e-6)

    def test_examples_that_are_alike_in_float32_have_another_digest(self, tmp_path):
        x, y = 1.7e9 + np.arange(60.0).reshape(60, 1), np.arange(60) % 2
        digests = {loaded(tmp_path, each, y).digest for each in (x, x[::-1].copy(), x.astype(np.float32))}
        assert len(digests) == 3
        assert (
            loaded(tmp_path, 0.1 + noise(60, 1), y).digest
            == loaded(tmp_path, (0.1 + noise(60, 1)).astype(np.float32), y).digest
        )  # as in the checkpoints of version 0.1.0

    def test_a_run_finds_its_data_from_anywhere(self, tmp_path, capsys, monkeypatch):
        np.savez(tmp_path / "d.npz", x=noise(80, 3), y=np.arange(80) % 2)
        monkeypatch.chdir(tmp_path)
        call(capsys, "train", "--data", "d.npz", *SMALL, "--out", "run")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert call(capsys, "inspect", tmp_path / "run")["data"]["train"] == 64

    def test_a_constant_is_0_and_said(self, tmp_path, capsys):
        x = noise(80, 3)
        x[:, 1:] = 0.1, 1e9 + 0.1
        data = loaded(tmp_path, x, np.arange(80) % 2)
        assert np.all(data.x[:, 1:] == 0)
        assert data.doubts == (
            "--data: got 2 of 3 features in x that are constant, feature 1 first; they become 0 and tell the network "
            "nothing.",
        )
        assert main(list(map(str, ["train", "--data", tmp_path / "d.npz", *SMALL, "--out", tmp_path / "run"]))) == 0
        printed = capsys.readouterr()
        assert printed.err == f"jbn: {data.doubts[0]}\n"
        assert json.loads(printed.out)["data"]["features"] == 3

    @pytest.mark.parametrize(("shape", "said"), [((3, 8, 8), 1), ((1, 8, 8), 1), ((3, 8, 3), 0), ((8, 8, 3), 0)])
    def test_images_that_look_as_if_their_channels_came_first(self, tmp_path, shape, said):
        data = loaded(tmp_path, noise(20, *shape), np.arange(20) % 2)
        assert ["numpy.moveaxis(x, 1, -1)" in doubt for doubt in data.doubts] == [True] * said

    def test_inputs_are_standardized_with_the_training_set(self, tmp_path):
        rng = np.random.default_rng(0)
        x, x_test, y = rng.normal(5, 3, (30, 4, 4, 2)), rng.normal(size=(6, 4, 4, 2)), np.arange(30) % 2
        data = loaded(tmp_path, x, y, flat=False, x_test=x_test, y_test=y[:6])
        mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
        np.testing.assert_allclose(data.x, (x - mean) / std, atol=1e-5)
        np.testing.assert_allclose(data.x_test, (x_test - mean) / std, atol=1e-5)
        flat = load_data(tmp_path / "d.npz", 0, flat=True)
        np.testing.assert_array_equal(flat.x, np.reshape(data.x, (30, 32)))


def test_splits_keep_the_share_of_each_class(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.arange(200.0).reshape(100, 2), y=(np.arange(100) % 10 == 0) * 1)
    one, again = (load_data(tmp_path / "d.npz", 7, flat=True) for _ in range(2))
    other = load_data(tmp_path / "d.npz", 8, flat=True)
    assert (np.sum(one.y == 1), np.sum(one.y_test == 1), len(one.y_test)) == (8, 2, 20)
    np.testing.assert_array_equal(one.x, again.x)
    assert not np.array_equal(one.x, other.x)


class TestLabels:
    @pytest.mark.parametrize("dtype", ["bool", "float32", "float16", "int8", "uint64"])
    def test_whole_numbers_of_any_kind(self, tmp_path, dtype):
        y = (np.arange(40) % 2).astype(dtype)
        data = loaded(tmp_path, noise(40, 2), y, x_test=noise(3, 2), y_test=y[:3])
        np.testing.assert_array_equal(data.y, np.arange(40) % 2)
        assert (data.y.dtype, data.classes, data.names) == (np.int32, 2, ())

    @pytest.mark.parametrize("kind", ["U", "S"])
    def test_words_are_numbered_in_their_order_and_kept(self, tmp_path, capsys, kind):
        y = np.array(["dog", "cat", "emu"] * 14).astype(kind)
        data = loaded(tmp_path, noise(42, 2), y, x_test=noise(3, 2), y_test=y[:3])
        assert (data.names, data.classes) == (("cat", "dog", "emu"), 3)
        np.testing.assert_array_equal(data.y_test, [1, 0, 2])
        if kind == "S":
            return
        call(capsys, "train", "--data", tmp_path / "d.npz", *SMALL, "--out", tmp_path / "run")
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["data"]["labels"] == ["cat", "dog", "emu"]
        np.savez(
            tmp_path / "other.npz", x=noise(8, 2), y=np.array(["emu", "dog"] * 4), x_test=noise(2, 2), y_test=y[:2]
        )
        call(capsys, "inspect", tmp_path / "run", "--data", tmp_path / "other.npz")
        fitted = Fitted(data.inputs, 3, 2, data.names)
        assert load_data(tmp_path / "other.npz", 0, flat=True, fitted=fitted).y[:2].tolist() == [2, 1]

    def test_a_terminal_says_first_how_the_data_were_understood(self, tmp_path, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        loaded(tmp_path, noise(30, 6, 4, 2), np.arange(30) % 3)
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        monkeypatch.setattr("jbn.cli.train._fits", lambda *given: signal.raise_signal(signal.SIGTERM))
        arguments = ["train", "--data", tmp_path / "d.npz", *SMALL, "--batch-size", 8, "--out", tmp_path / "run"]
        assert main(list(map(str, arguments))) == 143
        assert terminal.getvalue().startswith(f"{tmp_path}/d.npz: 24 train, 6 test, 6×4×2 images, 3 classes\n")
