"""What is done with saved runs: ``jbn inspect``, ``calibrate``, ``fold``, and ``train --network resnet``."""

import io
import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jbn
from jbn.cli import main
from jbn.cli.activations import of_one_layer
from jbn.cli.bad_input import BadInput
from jbn.cli.network import NetworkSpec, build
from jbn.cli.saving import load_model, new_file, replaced_files, save_model

COMMANDS = ("inspect", "calibrate", "fold")
CLASSES = 3


def images(seed, n=60):
    """Noise with a bright row at the height of the class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    x = rng.normal(3, 0.5, (n, 6, 4, 2))
    x[np.arange(n), 2 * y] += 2
    return {"x": x, "y": y}


def call(capsys, *arguments):
    """What a good command prints, parsed."""
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return json.loads(printed.out)


def trained(folder, *arguments):
    np.savez(folder / "data.npz", **images(0))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        command = ["train", "--data", folder / "data.npz", "--batch-size", 16, "--out", folder / "run", *arguments]
        assert main(list(map(str, command))) == 0
    return folder, json.loads(out.getvalue())


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    return trained(folder, "--network", "resnet", "--widths", "4,5", "--epochs", 4)


@pytest.fixture(scope="module")
def mlp_run(tmp_path_factory):
    """With the norm after the activation, and the statistics of each batch forgotten slowly."""
    folder = tmp_path_factory.mktemp("mlp")
    options = ("--norm", "a", "--no-compare", "--hidden", "7,5", "--activation", "tanh", "--epochs", 3)
    return trained(folder, *options, "--lr", 0.3, "--bn-momentum", 0.99)


@pytest.fixture
def run(mlp_run, tmp_path):
    """A copy of the mlp's run, to write into."""
    return shutil.copytree(mlp_run[0] / "run", tmp_path / "run")


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


class TestResnet:
    def test_learns_from_images_beside_the_network_without_norms(self, resnet_run):
        _, printed = resnet_run
        assert printed["summary"]["with"]["test_accuracy"] >= 0.8
        assert set(printed["summary"]) == {"with", "without"}
        assert printed["options"]["hidden"] is None
        assert (printed["options"]["blocks"], printed["options"]["lr"]) == (1, 0.3)
        assert printed["data"]["features"] == 48
        assert "initial W" in printed["held_equal"]

    def test_leaves_the_files_of_a_run(self, resnet_run):
        files = {"activations.png", "curves.png", "metrics.json", "with.safetensors", "without.safetensors"}
        assert set(os.listdir(resnet_run[0] / "run")) == files

    def test_a_saved_network_is_built_again_and_gives_the_printed_accuracy(self, resnet_run):
        folder, printed = resnet_run
        _, x, _, y = split()
        for name in ("with", "without"):
            spec, params, state, inputs = load_model(folder / "run" / f"{name}.safetensors")
            assert spec == NetworkSpec("resnet", (2, 4, 5, 3), "z" if name == "with" else None, "relu", "float32", 1)
            z, _ = jbn.normalize_inputs(x, inputs)
            outputs, _ = build(spec).apply(params, state, z, train=False)
            accuracy = np.mean(np.argmax(np.asarray(outputs), -1) == y)
            assert accuracy == pytest.approx(printed["summary"][name]["test_accuracy"])

    def test_takes_the_digits_as_images(self, tmp_path, capsys):
        options = ("--widths", "2", "--epochs", 1, "--batch-size", 512, "--no-compare")
        printed = call(capsys, "train", "--network", "resnet", *options, "--out", tmp_path / "run")
        assert load_model(tmp_path / "run" / "with.safetensors")[0].sizes == (1, 2, 10)
        assert printed["steps"] == 2

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
        assert main(["inspect", str(run)]) == 0
        for text in ("mlp 48–7–5–3, batch norm after tanh", "test accuracy", "[1]['bn']", "drift σ²", "Pictures: "):
            assert text in terminal.getvalue()


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
        assert spec.norm is None
        assert [layer["bn"] for layer in params] == [None] * 3
        assert state == [None] * 3
        got, _ = forward(params, state, standardized(x, inputs))
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
        assert printed["largest_output"] == pytest.approx(np.abs(wanted).max(), rel=1e-4)
        assert printed["largest_difference"] < 1e-5 * np.abs(wanted).max()
        assert printed["test_accuracy"]["before"] == printed["test_accuracy"]["after"]


IMAGE = "images with 2 channels and 48 values"
BAD_DATA = {
    "vectors": ({"x": np.ones((9, 48)), "y": np.arange(9) % 3}, f"shape (48,) in x; expected {IMAGE}"),
    "larger images": ({"x": np.ones((9, 6, 5, 2)), "y": np.arange(9) % 3}, f"shape (6, 5, 2) in x; expected {IMAGE}"),
    "more classes": (
        {"x": np.ones((9, 6, 4, 2)), "y": np.arange(9) % 4},
        "--data: got label 3 in y; expected 0 to 2, the classes of the network; number them as it was trained.",
    ),
    "NaN": (
        {"x": np.full((9, 6, 4, 2), np.nan), "y": np.arange(9) % 3},
        "that are NaN or infinite in float32, the first in x[0]; expected finite numbers; clean the data first.",
    ),
}


class TestBadInput:
    def refused(self, capsys, folder, *arguments):
        """The line on stderr, after a look that nothing else was said or written."""
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert main(list(map(str, arguments))) == 2
        printed = capsys.readouterr()
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        assert printed.out == ""
        assert printed.err.startswith("jbn: ")
        assert printed.err.count("\n") == 1
        return printed.err[5:-1]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_what_is_no_run(self, command, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        expected = "expected the folder of a run, as jbn train makes it; check the path."
        for name, found in (
            ("none", ", no such folder"),
            ("file", ", a file"),
            ("empty", " without a metrics.json"),
        ):
            message = self.refused(capsys, tmp_path, command, tmp_path / name)
            assert message == f"RUN_DIR: got {tmp_path / name}{found}; {expected}"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "{}",
            '{"options": {"data": null}}',
            '{"options": {"data": 3, "seed": 0, "batch_size": 8}}',
            '{"options": {"data": null, "seed": -1, "batch_size": 8}}',
        ],
    )
    def test_damaged_metrics(self, run, capsys, text):
        (run / "metrics.json").write_text(text)
        assert self.refused(capsys, run, "fold", run) == (
            f"RUN_DIR: got {run} with a damaged metrics.json; expected the folder of a run, as jbn train makes it; "
            f"train it again."
        )

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_run_without_batch_norm(self, command, run, capsys):
        expected = "expected a network with batch norm; train one with jbn train --norm z."
        call(capsys, "fold", run, "--out", run / "without.safetensors")
        message = self.refused(capsys, run, command, run, "--model", "without.safetensors")
        assert message == f"--model: got {run / 'without.safetensors'}, a network without batch norm; {expected}"
        (run / "with.safetensors").unlink()
        message = self.refused(capsys, run, command, run)
        assert message == f"RUN_DIR: got {run}, a run without batch norm; {expected}"

    def test_no_such_model(self, run, capsys):
        assert self.refused(capsys, run, "inspect", run, "--model", "x") == (
            f"--model: got no x in {run}, which holds with.safetensors; "
            f"expected the folder of a run, as jbn train makes it; check the name."
        )

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_corrupt_model(self, command, run, capsys):
        whole = (run / "with.safetensors").read_bytes()
        for content in (b"", b"no tensors", whole[: len(whole) // 2], b"\xff" * 100, whole + b"more"):
            (run / "with.safetensors").write_bytes(content)
            assert self.refused(capsys, run, command, run) == (
                f"--model: got {run / 'with.safetensors'} (damaged, or no safetensors file); "
                f"expected a model file that jbn saved; train it again."
            )

    def test_a_folder_for_a_model(self, run, capsys):
        (run / "model").mkdir()
        assert self.refused(capsys, run, "fold", run, "--model", "model").startswith("--model: got ")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"params/0/W": None}, "not the arrays of its network: params/0/W"),
            ({"more": np.ones(2)}, "not the arrays of its network: more"),
            ({"state/0/mean": np.ones(3, np.float32)}, "not the arrays of its network: state/0/mean"),
            ({"state/0/count": np.ones(7, np.float32)}, "not the arrays of its network: state/0/count"),
            ({"params/1/b": np.full(5, np.nan, np.float32)}, "values in params/1/b are not finite"),
            ({"inputs/mean": np.ones((), np.float32)}, "not the arrays of its network: inputs/count, inputs/var"),
        ],
    )
    def test_arrays_that_are_not_those_of_the_network(self, run, capsys, change, reason):
        file = run / "with.safetensors"
        arrays = {name: array for name, array in {**load_file(file), **change}.items() if array is not None}
        save_file(arrays, file, {"network": json.dumps(load_model(file)[0]._asdict())})
        message = f"--model: got {file} ({reason}); expected a model file that jbn saved; train it again."
        assert self.refused(capsys, run, "calibrate", run) == message

    @pytest.mark.parametrize(
        "change",
        [{"network": "vit"}, {"sizes": []}, {"sizes": 3}, {"activation": "step"}, {"dtype": "int"}, {"new": 1}],
    )
    def test_a_network_that_is_not_known(self, run, capsys, change):
        file = run / "with.safetensors"
        save_file(load_file(file), file, {"network": json.dumps({**load_model(file)[0]._asdict(), **change})})
        message = self.refused(capsys, run, "inspect", run)
        assert message == (
            f"--model: got {file} (it does not say which network it holds); expected a model file that jbn saved; "
            f"train it again."
        )

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize("case", BAD_DATA)
    def test_data_that_do_not_fit(self, command, case, run, tmp_path, capsys):
        arrays, message = BAD_DATA[case]
        np.savez(tmp_path / "bad.npz", **arrays)
        said = self.refused(capsys, tmp_path, command, run, "--data", tmp_path / "bad.npz")
        assert said.startswith("--data: got ")
        assert message in said

    def test_data_that_changed_since_the_run(self, run, tmp_path, capsys):
        metrics = json.loads((run / "metrics.json").read_text())
        np.savez(tmp_path / "other.npz", **images(1))
        metrics["options"]["data"] = str(tmp_path / "other.npz")
        (run / "metrics.json").write_text(json.dumps(metrics))
        assert self.refused(capsys, tmp_path, "calibrate", run) == (
            f"--data: got {tmp_path / 'other.npz'}, which has changed since the run in {run}; expected the data of the "
            f"run; put them back, or pass other data with --data FILE."
        )
        (tmp_path / "other.npz").unlink()
        message = self.refused(capsys, tmp_path, "calibrate", run)
        assert message.startswith(f"--data: got no file at {tmp_path / 'other.npz'}; ")

    @pytest.mark.parametrize("command", ["calibrate", "fold"])
    def test_a_file_that_exists_is_not_overwritten(self, command, run, capsys):
        call(capsys, command, run)
        out = run / f"{command}{'d' if command[-1] == 'e' else 'ed'}.safetensors"
        for arguments in ((), ("--out", out), ("--out", run / "metrics.json")):
            told = arguments[1] if arguments else out
            assert self.refused(capsys, run, command, run, *arguments) == (
                f"--out: got {told}, which exists already; expected a new file, so that nothing is lost; "
                f"choose another FILE."
            )

    @pytest.mark.parametrize("command", ["calibrate", "fold"])
    def test_a_file_in_no_folder(self, command, run, tmp_path, capsys):
        out = tmp_path / "none" / "m.safetensors"
        assert self.refused(capsys, tmp_path, command, run, "--out", out) == (
            f"--out: got {out} (No such file or directory); expected a new file in a place that can be written to; "
            f"choose another FILE."
        )

    def test_weights_that_overflow(self, run, capsys):
        spec = NetworkSpec("mlp", (48, 4, 3), "z", "relu", "float32")
        params, state = build(spec).init(jax.random.key(0))
        params[0]["W"] = jnp.full((48, 4), 3e38)
        save_model(run / "huge.safetensors", spec, params, state, load_model(run / "with.safetensors")[3])
        message = self.refused(capsys, run, "calibrate", run, "--model", "huge.safetensors")
        assert message.startswith(f"{run / 'huge.safetensors'}: batches: got 1 without usable statistics")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                "--network cnn",
                "--network: got 'cnn'; expected one of mlp, resnet; as in --network mlp.",
            ),
            (
                "--network resnet --hidden 4",
                "--hidden: got it with --network resnet; expected --network mlp; leave it out, or pass --widths and "
                "--blocks.",
            ),
            (
                "--widths 4",
                "--widths: got it with --network mlp; expected --network resnet; leave it out, or pass --hidden.",
            ),
            (
                "--blocks 1",
                "--blocks: got it with --network mlp; expected --network resnet; leave it out, or pass --hidden.",
            ),
            (
                "--network resnet --norm a",
                "--norm: got a with --network resnet; expected z or none; a residual network normalizes before the "
                "activation, as in --norm z.",
            ),
            (
                "--network resnet --blocks 0",
                "--blocks: got 0; expected a whole number of at least 1; as in --blocks 1.",
            ),
            (
                "--network resnet --widths 4,0",
                "--widths: got '4,0'; expected widths of at least 1 between commas, one a stage; as in --widths 8,16.",
            ),
            (
                "--network resnet",
                "--network: got resnet with 3 features an example; expected images, x of shape (N, H, W) or "
                "(N, H, W, C); reshape x, or pass --network mlp.",
            ),
        ],
    )
    def test_options_of_another_network(self, tmp_path, capsys, arguments, message):
        np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(40, 3)), y=np.arange(40) % 2)
        command = ["train", "--data", tmp_path / "d.npz", *arguments.split(), "--out", tmp_path / "new"]
        assert self.refused(capsys, tmp_path, *command) == message


class TestFiles:
    def test_nothing_is_left_of_a_file_that_fails(self, tmp_path):
        def fail(context, name):
            with context as work:
                (work / name if name else work).write_bytes(b"half")
                raise KeyboardInterrupt

        for context, name in ((new_file(tmp_path / "m"), None), (replaced_files(tmp_path), "picture")):
            with pytest.raises(KeyboardInterrupt):
                fail(context, name)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_comes_up_meanwhile_stays(self, tmp_path):
        def collide():
            with new_file(tmp_path / "m") as work:
                work.write_bytes(b"new")
                (tmp_path / "m").write_bytes(b"other")

        with pytest.raises(BadInput, match="exists already"):
            collide()
        assert (tmp_path / "m").read_bytes() == b"other"
        assert list(tmp_path.iterdir()) == [tmp_path / "m"]
