"""Runs, models and data that the commands for saved runs refuse: one line on stderr, nothing written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import saved_runs
from support.saved_runs import call, images

from jbn.cli.bad_input import BadInput
from jbn.cli.models import load_model, save_model
from jbn.cli.network import NetworkSpec
from jbn.cli.places import new_file, replaced_files

COMMANDS = ("inspect", "calibrate", "fold")


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
        "that are NaN or infinite, the first in x[0]; expected finite numbers; clean the data first.",
    ),
}


class TestBadInput:
    refused = staticmethod(saved_runs.refused)

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
                f"RUN_DIR: got {run / 'with.safetensors'} (damaged, or no safetensors file); "
                f"expected a model file that jbn saved; train it again."
            )

    def test_one_flipped_bit_of_any_array_or_of_what_it_says(self, run, capsys):
        file = run / "with.safetensors"
        whole = file.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        places = [start + header[name]["data_offsets"][0] for name in header if name != "__metadata__"]
        for place, bit in [(place, 1) for place in places] + [(whole.index(b"tanh") + 3, ord("h") ^ ord("i"))]:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert self.refused(capsys, run, "fold", run) == (
                f"RUN_DIR: got {file} (damaged: it is not as it was written); expected a model file that jbn saved; "
                f"train it again."
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
            ({"state/1/var": -np.ones(5, np.float32)}, "values in state/1/var are negative"),
            ({"state/0/count": np.full(7, -1, np.int32)}, "values in state/0/count are negative"),
            ({"inputs/mean": np.ones((), np.float32)}, "not the arrays of its network: inputs/count, inputs/var"),
        ],
    )
    def test_arrays_that_are_not_those_of_the_network(self, run, capsys, change, reason):
        file = run / "with.safetensors"
        arrays = {name: array for name, array in {**load_file(file), **change}.items() if array is not None}
        save_file(arrays, file, {"network": json.dumps(load_model(file)[0].stored)})
        message = f"RUN_DIR: got {file} ({reason}); expected a model file that jbn saved; train it again."
        assert self.refused(capsys, run, "calibrate", run) == message

    @pytest.mark.parametrize(
        "change",
        [{"network": "vit"}, {"sizes": []}, {"sizes": 3}, {"activation": "step"}, {"dtype": "int"}, {"new": 1}],
    )
    def test_a_network_that_is_not_known(self, run, capsys, change):
        file = run / "with.safetensors"
        save_file(load_file(file), file, {"network": json.dumps({**load_model(file)[0].stored, **change})})
        message = self.refused(capsys, run, "inspect", run)
        assert message == (
            f"RUN_DIR: got {file} (it does not say which network it holds); expected a model file that jbn saved; "
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
            f"RUN_DIR: got {tmp_path / 'other.npz'}, which has changed since the run in {run}; expected the data of "
            f"the run; put them back, or pass other data with --data FILE."
        )
        (tmp_path / "other.npz").unlink()
        message = self.refused(capsys, tmp_path, "calibrate", run)
        assert message.startswith(f"RUN_DIR: got no file at {tmp_path / 'other.npz'}; ")
        assert message.endswith("; put it back, or pass other data with --data FILE.")

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
        spec = NetworkSpec(inputs=48, hidden=(4,), classes=3, norm="z", activation="relu")
        params, state = spec.make().init(jax.random.key(0))
        params[0]["W"] = jnp.full_like(params[0]["W"], 3e38)
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
