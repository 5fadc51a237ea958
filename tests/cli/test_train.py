"""The command line: what a run shows and what it leaves behind."""

import contextlib
import io
import json
import os
import re
import signal
import sys

import numpy as np
import pytest

import jbn
import jbn.cli.train
from jbn.cli import display, main
from jbn.cli.documents import show, to_json
from jbn.cli.fit import fit
from jbn.cli.models import load_model

FILES = ["activations.png", "curves.png", "metrics.json", "with.safetensors", "without.safetensors"]
SMALL = ["--epochs", "2", "--batch-size", "32", "--hidden", "3"]  # as other tests have it, to be compiled once


def train(capsys, *arguments):
    """What a good run prints, parsed."""
    code = main(["train", *map(str, arguments)])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return json.loads(printed.out)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def run(default_run):
    return default_run


class TestDefaultRun:
    def test_reaches_97_percent_with_batch_norm(self, run):
        assert run[1]["summary"]["with"]["test_accuracy"] >= 0.97

    def test_batch_norm_needs_fewer_steps_to_the_target(self, run):
        summary = run[1]["summary"]
        assert summary["with"]["steps_to_target"] < 0.7 * summary["without"]["steps_to_target"]

    def test_says_what_was_held_equal(self, run):
        assert run[1]["held_equal"] == [
            "data",
            "order of batches",
            "initial W and b",
            "optimizer",
            "learning rate",
            "number of steps",
        ]

    def test_leaves_its_files_in_a_folder_of_its_own_under_runs(self, run):
        folder, printed = run
        (made,) = (folder / "runs").iterdir()
        assert printed["options"]["out"] == f"runs/{made.name}"
        assert sorted(os.listdir(made)) == FILES
        assert [path.name for path in folder.iterdir()] == ["runs"]

    def test_pictures_are_pictures(self, run):
        import matplotlib.image

        (made,) = (run[0] / "runs").iterdir()
        for name in ("curves.png", "activations.png"):
            pixels = matplotlib.image.imread(made / name)
            assert min(pixels.shape[:2]) > 400
            assert pixels[..., :3].std() > 0.05

    def test_metrics_hold_what_was_printed_and_the_history(self, run):
        folder, printed = run
        (made,) = (folder / "runs").iterdir()
        metrics = json.loads((made / "metrics.json").read_text())
        history = metrics.pop("history")
        assert metrics == printed
        for name, summary in printed["summary"].items():
            assert len(history[name]["loss"]) == printed["steps"]
            assert len(history[name]["test_accuracy"]) == printed["options"]["epochs"]
            assert history[name]["train_loss"][-1] == summary["train_loss"]

    def test_saved_model_gives_the_printed_accuracy_on_the_raw_test_set(self, run):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        folder, printed = run
        (made,) = (folder / "runs").iterdir()
        digits = load_digits()
        _, x, _, y = train_test_split(
            digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0
        )
        for name in ("with", "without"):
            spec, params, state, inputs = load_model(made / f"{name}.safetensors")
            z, _ = jbn.normalize_inputs(x.astype(np.float32)[..., None], inputs)
            outputs, _ = spec.make().apply(params, state, z.reshape(len(z), -1), train=False)
            accuracy = np.mean(np.argmax(np.asarray(outputs), -1) == y)
            assert accuracy == pytest.approx(printed["summary"][name]["test_accuracy"], abs=1e-9)


class TestOptions:
    def test_the_seed_determines_a_run(self, data, tmp_path, capsys):
        losses = []
        for i, seed in enumerate((3, 3, 4)):
            train(capsys, "--data", data, *SMALL, "--norm", "none", "--seed", seed, "--out", tmp_path / str(i))
            losses.append(json.loads((tmp_path / str(i) / "metrics.json").read_text())["history"]["without"]["loss"])
        assert losses[0] == losses[1]
        assert losses[0] != losses[2]

    @pytest.mark.parametrize(
        "arguments",
        [
            "--norm a --optimizer rmsprop --lr 0.02 --weight-decay 0.01 --activation tanh --accumulate 2 --no-compare",
            *(
                pytest.param(each, marks=pytest.mark.nightly)
                for each in (
                    "--norm a --optimizer adam --lr 0.05 --weight-decay 0.01 --activation tanh --accumulate 2",
                    "--norm z --optimizer rmsprop --lr 0.02 --activation relu --dtype bfloat16 --bn-momentum 1.0",
                    "--norm z --optimizer momentum --lr 0.1 --activation gelu --hidden 4 --no-compare",
                )
            ),
        ],
    )
    def test_networks_learn_with_every_kind_of_option(self, data, tmp_path, capsys, arguments):
        printed = train(capsys, "--data", data, *SMALL, "--epochs", 24, *arguments.split(), "--out", tmp_path / "run")
        assert list(printed["summary"]) == ["with"] + ["without"] * ("--no-compare" not in arguments)
        assert printed["summary"]["with"]["test_accuracy"] >= 0.8

    def test_norm_none_trains_one_network(self, data, tmp_path, capsys):
        (tmp_path / "run").mkdir()  # empty, so that it may be taken
        printed = train(capsys, "--data", data, *SMALL, "--norm", "none", "--out", tmp_path / "run")
        assert list(printed["summary"]) == ["without"]
        assert printed["held_equal"] == []
        assert sorted(os.listdir(tmp_path / "run")) == [name for name in FILES if name != "with.safetensors"]

    def test_a_diverging_run_is_reported_in_valid_json(self, data, tmp_path, capsys):
        options = ("--lr", 1e30, "--activation", "relu", "--norm", "none")
        printed = train(capsys, "--data", data, *SMALL, *options, "--out", tmp_path / "run")
        assert printed["summary"]["without"]["skipped_steps"] > 0
        assert printed["summary"]["without"]["steps_to_target"] is None

    def test_images_and_a_test_set_of_ones_own(self, tmp_path, capsys):
        rng = np.random.default_rng(1)
        y = np.arange(30) % 3
        x = rng.integers(0, 255, (30, 4, 5, 2), dtype=np.uint8)
        np.savez(tmp_path / "d.npz", x=x, y=y, x_test=x[:7], y_test=y[:7])
        options = (*SMALL, "--batch-size", 8, "--norm", "none")
        printed = train(capsys, "--data", tmp_path / "d.npz", *options, "--out", tmp_path / "run")
        assert printed["data"] == {
            "source": str(tmp_path / "d.npz"),
            "train": 30,
            "test": 7,
            "features": 40,
            "classes": 3,
        }

    def test_alone_it_shows_help_and_it_says_its_version(self, capsys):
        assert main([]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("Usage: jbn", "train", "inspect", "calibrate", "fold", "bench"))
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"jbn {jbn.__version__}\n"

    def test_help_names_every_option(self, capsys):
        assert main(["train", "--help"]) == 0
        shown = capsys.readouterr().out
        options = (
            "network data norm compare no-compare optimizer lr weight-decay hidden widths blocks activation epochs "
            "batch-size accumulate bn-momentum dtype seed devices stats coordinator num-processes process-id timeout "
            "out"
        )
        for option in options.split():
            assert f"--{option}" in shown


class TestTerminal:
    def test_shows_bars_and_a_table_instead_of_json(self, data, tmp_path, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        assert main(["train", "--data", str(data), *SMALL, "--out", str(tmp_path / "run")]) == 0
        shown = terminal.getvalue()
        for text in ("4/4", "test accuracy", "with batch norm", "without batch norm", "Held equal: data"):
            assert text in shown
        with pytest.raises(json.JSONDecodeError):
            json.loads(shown)

    def test_a_bar_says_compiling_before_the_first_step(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        with display.progress(["with", "without"], 8) as report:
            report("with", None)
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
        assert re.search(r"with .*0/8 compiling", shown)
        assert re.search(r"without .*0/8 waiting", shown)

    @pytest.mark.parametrize(("accuracies", "hint"), [((0.5, 0.9), True), ((0.9, 0.9), False)])
    def test_where_batch_norm_loses_there_is_a_hint(self, monkeypatch, accuracies, hint):
        names = ("train_loss", "test_accuracy", "steps_to_target", "ms_per_step", "compile_s", "skipped_steps")
        summary = {
            name: {**dict.fromkeys(names, 0), "test_accuracy": accuracy}
            for name, accuracy in zip(("with", "without"), accuracies, strict=True)
        }
        document = {"data": {"source": "some"}, "steps": 4, "devices": 1, "held_equal": [], "summary": summary}
        document["options"] = {"target_loss": 0.1, "lr": 0.25, "batch_size": 8, "out": "run"}
        monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "300")
        show(document, display.lines_of(document))
        assert ("(--lr, now 0.25), and batches that are not small (--batch-size, now 8)" in terminal.getvalue()) == hint


@pytest.mark.usefixtures("ctrl_c_is_heard")
class TestInterrupt:
    def interrupted(self, tmp_path, capsys, data):
        """What a run that should stop leaves behind and says."""
        before, handler = tree(tmp_path), signal.getsignal(signal.SIGINT)
        out = tmp_path / "a" / "b"
        assert main(["train", "--data", str(data), *SMALL, "--norm", "none", "--out", str(out)]) == 130
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", "jbn: interrupted.\n")
        assert tree(tmp_path) == before
        assert signal.getsignal(signal.SIGINT) is handler

    def test_exits_130_and_leaves_nothing(self, tmp_path, capsys, data, monkeypatch):
        def stopped(*arguments):
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(jbn.cli.train, "fit", stopped)
        self.interrupted(tmp_path, capsys, data)

    def test_is_not_lost_where_python_drops_the_exception(self, tmp_path, capsys, data, monkeypatch):
        def dropped(*arguments):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return fit(*arguments)

        monkeypatch.setattr(jbn.cli.train, "fit", dropped)
        self.interrupted(tmp_path, capsys, data)


def test_json_has_null_for_what_is_not_finite():
    document = {"a": [1.5, float("nan")], "b": np.float32("inf"), "c": np.arange(2)}
    assert json.loads(to_json(document)) == {"a": [1.5, None], "b": None, "c": [0, 1]}
