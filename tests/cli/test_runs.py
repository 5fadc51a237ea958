"""What is done with saved runs: ``jbn inspect``, ``calibrate``, ``fold``, and ``train --network resnet``."""

import io
import os
import shutil
import sys

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from support.saved_runs import call, forward, images, split, standardized

import jbn
from jbn.cli import main
from jbn.cli.activations import of_one_layer
from jbn.cli.inspect import _as_table
from jbn.cli.models import load_model, save_model
from jbn.cli.network import NetworkSpec
from jbn.report import LayerSummary, Summary


class TestResnet:
    def test_learns_from_images(self, resnet_run):
        _, printed = resnet_run
        assert printed["summary"]["with"]["test_accuracy"] >= 0.8
        assert printed["options"]["hidden"] is None
        assert (printed["options"]["blocks"], printed["options"]["lr"]) == (1, 0.3)
        assert printed["data"]["features"] == 48

    def test_a_saved_network_is_built_again_and_gives_the_printed_accuracy(self, resnet_run):
        folder, printed = resnet_run
        _, x, _, y = split()
        spec, params, state, inputs = load_model(folder / "run" / "with.safetensors")
        assert spec == NetworkSpec("resnet", inputs=2, widths=(4, 5), blocks=1, classes=3, activation="relu")
        z, _ = jbn.normalize_inputs(x, inputs)
        outputs, _ = spec.make().apply(params, state, z, train=False)
        accuracy = np.mean(np.argmax(np.asarray(outputs), -1) == y)
        assert accuracy == pytest.approx(printed["summary"]["with"]["test_accuracy"])

    @pytest.mark.nightly
    def test_takes_the_digits_as_images_beside_the_network_without_norms(self, tmp_path, capsys):
        options = ("--widths", "2", "--epochs", 1, "--batch-size", 512)
        printed = call(capsys, "train", "--network", "resnet", *options, "--out", tmp_path / "run")
        assert load_model(tmp_path / "run" / "with.safetensors")[0].sizes == (1, 2, 10)
        assert printed["steps"] == 2
        assert set(printed["summary"]) == {"with", "without"}
        assert "initial W" in printed["held_equal"]
        files = {"activations.png", "curves.png", "metrics.json", "with.safetensors", "without.safetensors"}
        assert set(os.listdir(tmp_path / "run")) == files

    def test_every_command_takes_it(self, resnet_run, tmp_path, capsys):
        run = shutil.copytree(resnet_run[0] / "run", tmp_path / "run")
        accuracy = resnet_run[1]["summary"]["with"]["test_accuracy"]
        table = call(capsys, "inspect", run)
        paths = [f"['blocks'][{i}]['conv{j}']['bn']" for i in (0, 1) for j in (1, 2)]
        assert [row["path"] for row in table["layers"]] == [*paths, "['blocks'][1]['shortcut']['bn']", "['stem']['bn']"]
        assert table["test_accuracy"] == pytest.approx(accuracy)
        assert {row["updates"][0] for row in table["layers"]} == {resnet_run[1]["steps"]}
        calibrated = call(capsys, "calibrate", run)
        assert calibrated["test_accuracy"]["before"] == pytest.approx(accuracy)
        folded = call(capsys, "fold", run, "--model", "calibrated.safetensors")
        assert folded["test_accuracy"]["before"] == folded["test_accuracy"]["after"]
        assert folded["test_accuracy"]["after"] == pytest.approx(calibrated["test_accuracy"]["after"])
        assert 0 < folded["largest_difference"] < 1e-4 * folded["largest_output"]

    def test_pictures_show_the_values_on_both_sides_of_a_norm(self, resnet_run):
        spec, params, state, inputs = load_model(resnet_run[0] / "run" / "with.safetensors")
        z, _ = jbn.normalize_inputs(split()[1], inputs)
        before, after = of_one_layer(spec, params, state, z).values()
        layer, running = params["blocks"][1]["conv1"]["bn"], state["blocks"][1]["conv1"]
        assert before.shape == after.shape == (12 * 3 * 2, 5)
        wanted = (before - running.mean) / np.sqrt(running.var + 1e-5) * layer.gamma + layer.beta
        np.testing.assert_allclose(after, wanted, atol=1e-5)


class TestInspect:
    def test_tables_the_saved_arrays(self, run, capsys):
        arrays = load_file(run / "with.safetensors")
        printed = call(capsys, "inspect", run)
        for i, row in enumerate(printed["layers"]):
            assert row["path"] == f"[{i}]['bn']"
            for name, place in {"gamma": "params", "beta": "params", "mean": "state", "var": "state"}.items():
                array = arrays[f"{place}/{i}/{'bn/' * (place == 'params')}{name}"]
                assert row[name] == pytest.approx([array.min(), array.max()])
            assert row["updates"] == [9, 9]

    def test_drift_is_that_of_the_first_batch(self, run, capsys):
        _, params, state, inputs = load_model(run / "with.safetensors")
        x = split()[0][np.random.default_rng(0).permutation(48)[:16]]
        _, a = forward(params, state, standardized(x, inputs))
        mean, var = np.asarray(state[0].mean), np.asarray(state[0].var) + 1e-5
        row = call(capsys, "inspect", run)["layers"][0]
        assert row["drift_mean"] == pytest.approx(np.max(np.abs(a.mean(0) - mean) / np.sqrt(var)), rel=1e-3)
        ratio = np.log((a.var(0, ddof=1) + 1e-5) / var)
        assert row["drift_var"] == pytest.approx(np.max(np.abs(ratio)), rel=1e-3)

    def test_finds_dead_channels(self, run, capsys):
        spec, params, state, inputs = load_model(run / "with.safetensors")
        params[0]["bn"] = params[0]["bn"]._replace(gamma=params[0]["bn"].gamma.at[2].set(0.0))
        save_model(run / "dead.safetensors", spec, params, state, inputs)
        layers = call(capsys, "inspect", run, "--model", "dead.safetensors")["layers"]
        assert [row["dead"] for row in layers] == [1, 0]

    def test_draws_into_the_run_again_and_again_or_elsewhere(self, run, capsys, tmp_path):
        before = set(os.listdir(run))
        pictures = {"with-activations.png", "with-statistics.png"}
        for _ in range(2):
            printed = call(capsys, "inspect", run)
            assert set(os.listdir(run)) == before | pictures
        assert {os.path.basename(file) for file in printed["pictures"]} == pictures
        call(capsys, "inspect", run, "--out", tmp_path / "new" / "pictures")
        assert set(os.listdir(tmp_path / "new" / "pictures")) == pictures

    def test_reads_as_a_table_on_a_terminal(self, run, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["inspect", str(run)]) == 0
        for text in ("mlp 48–7–5–3, batch norm after tanh", "test accuracy", "│1    │5│", "drift", "Pictures: "):
            assert text in terminal.getvalue()

    def test_the_table_fits_80_columns(self, capsys):
        shape = (16,)
        values = dict.fromkeys(("gamma", "beta", "mean", "var"), (-0.00123, -1.23e-05))
        counts = {"dead_gamma": 1, "dead_var": 0, "dead": 1, "drift_mean": 1.23, "drift_var": 1234.5}
        paths = [f"['blocks'][{block}]['{name}']['bn']" for block in (0, 10) for name in ("conv1", "shortcut")]
        rows = [LayerSummary(path=path, features=shape, **values, **counts, updates=(0, 1000)) for path in paths]
        Console(width=80).print(_as_table(Summary(tuple(rows), 1e-5)))
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert [line.split("│")[1].strip() for line in lines if "blocks" in line] == [
            "blocks.0.conv1",
            "blocks.0.shortcut",
            "blocks.10.conv1",
            "blocks.10.shortcut",
        ]


class TestCalibrate:
    def test_statistics_are_those_of_the_training_set(self, run, capsys):
        printed = call(capsys, "calibrate", run)
        assert printed["out"] == str(run / "calibrated.safetensors")
        spec, params, state, inputs = load_model(run / "calibrated.safetensors")
        _, a = forward(params, state, standardized(split()[0], inputs))
        np.testing.assert_allclose(state[0].mean, a.mean(0), atol=1e-5)
        np.testing.assert_allclose(state[0].var, a.var(0, ddof=1), rtol=1e-4)
        assert set(np.asarray(state[0].count)) == {1}
        before = load_file(run / "with.safetensors")
        after = load_file(run / "calibrated.safetensors")
        assert spec == load_model(run / "with.safetensors")[0]
        for name in before:
            assert name.startswith("state/") != np.array_equal(before[name], after[name]), name

    def test_accuracies_are_those_of_the_two_models(self, run, mlp_run, capsys):
        printed = call(capsys, "calibrate", run)
        assert printed["test_accuracy"]["before"] == mlp_run[1]["summary"]["with"]["test_accuracy"]
        _, x, _, y = split()
        for name, told in (("with", "before"), ("calibrated", "after")):
            _, params, state, inputs = load_model(run / f"{name}.safetensors")
            outputs, _ = forward(params, state, standardized(x, inputs))
            assert np.mean(outputs.argmax(-1) == y) == pytest.approx(printed["test_accuracy"][told])

    def test_other_data_are_standardized_as_those_of_the_run(self, run, tmp_path, capsys):
        x, y = images(5).values()
        np.savez(tmp_path / "moved.npz", x=x + 0.5, y=y, x_test=x[:9], y_test=y[:9])
        printed = call(capsys, "calibrate", run, "--data", tmp_path / "moved.npz", "--out", tmp_path / "m.safetensors")
        assert printed["data"] == {"source": str(tmp_path / "moved.npz"), "train": 60, "test": 9}
        _, params, state, inputs = load_model(tmp_path / "m.safetensors")
        np.testing.assert_array_equal(inputs.mean, load_model(run / "with.safetensors")[3].mean)
        _, a = forward(params, state, standardized(x + 0.5, inputs))
        np.testing.assert_allclose(state[0].mean, a.mean(0), atol=1e-5)

    def test_makes_good_for_statistics_that_are_wrong(self, run, capsys):
        spec, params, state, inputs = load_model(run / "with.safetensors")
        worn = [each and each._replace(mean=each.mean + 2, var=100 * each.var) for each in state]
        save_model(run / "worn.safetensors", spec, params, worn, inputs)
        right = call(capsys, "calibrate", run)["test_accuracy"]["after"]
        out = run / "mended.safetensors"
        mended = call(capsys, "calibrate", run, "--model", "worn.safetensors", "--out", out)["test_accuracy"]
        assert mended["before"] < mended["after"] == right

    def test_large_sets_are_cut_evenly(self, run, capsys, monkeypatch):
        import jbn.cli.calibrate

        one = call(capsys, "calibrate", run)
        monkeypatch.setattr(jbn.cli.calibrate, "_BATCH", 47)  # 48 examples
        two = call(capsys, "calibrate", run, "--out", run / "two.safetensors")
        assert (one["batches"], two["batches"]) == (1, 2)
        files = [load_file(run / f"{name}.safetensors") for name in ("calibrated", "two")]
        np.testing.assert_allclose(*(arrays["state/0/var"] for arrays in files), rtol=1e-5)


class TestFold:
    def test_gives_the_outputs_of_the_network_without_its_norms(self, run, capsys):
        printed = call(capsys, "fold", run, "--out", run / "f.safetensors")
        _, x, _, _ = split()
        _, params, state, inputs = load_model(run / "with.safetensors")
        wanted, _ = forward(params, state, standardized(x, inputs))
        spec, params, state, inputs = load_model(run / "f.safetensors")
        assert spec.norm == "none"
        assert [layer["bn"] for layer in params] == [None] * 3
        assert state == [None] * 3
        got, _ = forward(params, state, standardized(x, inputs))
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
        assert printed["largest_output"] == pytest.approx(np.abs(wanted).max(), rel=1e-4)
        assert printed["largest_difference"] < 1e-5 * np.abs(wanted).max()
        assert printed["test_accuracy"]["before"] == printed["test_accuracy"]["after"]
