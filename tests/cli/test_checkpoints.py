"""Checkpoints: the newest good one comes back bit for bit, whatever happened to the files."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from support.saved_checkpoints import IDENTITY, START, made, newest, saved

from jbn.cli.bad_input import BadInput
from jbn.cli.checkpoints import checkpoints

WRITABLE = "expected a folder that can be written to; choose another --checkpoint-dir."


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for array, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        array, other = np.asarray(array), np.asarray(other)
        assert (array.shape, array.dtype, array.tobytes()) == (other.shape, other.dtype, other.tobytes())


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flipped(content, count):
    for at in np.linspace(0, len(content) - 1, count).astype(int):
        yield content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def refused(folder, identity=IDENTITY):
    with pytest.raises(BadInput) as caught:
        newest(folder, identity)
    return str(caught.value)


class TestWhole:
    def test_the_newest_comes_back_bit_for_bit(self, tmp_path, capsys):
        same(newest(saved(tmp_path, 10, 20)), made(20))
        assert capsys.readouterr() == ("", "")

    def test_an_empty_folder_has_none_and_a_missing_one_is_made(self, tmp_path):
        assert newest(tmp_path / "a" / "b") is START
        assert (tmp_path / "a" / "b").is_dir()

    def test_three_are_kept(self, tmp_path):
        assert sorted(os.listdir(saved(tmp_path, 10, 20, 30, 40, 50))) == ["30", "40", "50"]


# A program that has no jbn.
READER = """
import sys
for name in ("jbn", "optax", "flax", "typer", "safetensors"):
    sys.modules[name] = None  # an import of it fails
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from orbax.checkpoint import CheckpointManager
from orbax.checkpoint.args import Composite, JsonRestore, StandardRestore
with CheckpointManager(sys.argv[1]) as manager:
    items = Composite(train_state=StandardRestore(), histories=StandardRestore(), record=JsonRestore())
    found = manager.restore(manager.latest_step(), args=items)
assert found.record["step"] == manager.latest_step(), found.record
leaves = tree_leaves_with_path({"train_state": found.train_state, "histories": found.histories})
np.savez(sys.argv[2], **{keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves})
"""


class TestOrbax:
    @pytest.mark.processes
    def test_a_program_without_jbn_restores_a_run_with_orbax_alone(self, finished, tmp_path):
        environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
        command = [sys.executable, "-c", READER, finished / "kept" / "with", tmp_path / "found.npz"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        history = json.loads((finished / "out" / "metrics.json").read_text())["history"]["with"]
        model = load_file(finished / "out" / "with.safetensors")
        with np.load(tmp_path / "found.npz") as found:
            assert found["train_state/step"] == 12
            np.testing.assert_array_equal(found["train_state/params/0/W"], model["params/0/W"])
            np.testing.assert_array_equal(found["train_state/params/0/bn/gamma"], model["params/0/bn/gamma"])
            np.testing.assert_array_equal(found["train_state/bn_state/0/var"], model["state/0/var"])
            np.testing.assert_array_equal(found["histories/loss"], np.float32(history["loss"]))
            np.testing.assert_array_equal(found["histories/test_accuracy"], history["test_accuracy"])

    def test_training_goes_on_while_a_checkpoint_is_written(self, tmp_path):
        """What makes it whole is held up, in a thread of its own, until the call that saves it has returned."""
        returned = threading.Event()

        def wait(event, arguments):
            if event == "os.rename" and str(tmp_path / "10.") in str(arguments[0]) and not returned.is_set():
                assert threading.current_thread() is not threading.main_thread()
                returned.wait(60)

        sys.addaudithook(wait)
        with checkpoints(tmp_path, IDENTITY) as each:
            each.save(made(10))
            assert not (tmp_path / "10").exists()
            returned.set()
        assert os.listdir(tmp_path) == ["10"]
        same(newest(tmp_path), made(10))

    def test_arrays_are_saved_as_they_lie_on_devices_and_restored_to_where_they_are_wanted(self, tmp_path):
        def laid_out(devices, spec):
            mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
            specs = {"params": [{"W": spec}], "step": P()}
            return jax.device_put(made(10).train_state, jax.tree.map(lambda each: NamedSharding(mesh, each), specs))

        with checkpoints(tmp_path, IDENTITY) as each:
            each.save(made(10)._replace(train_state=laid_out(3, P("data"))))
        for devices, spec in ((1, P()), (8, P()), (2, P("data"))):
            like = laid_out(devices, spec)
            found = newest(tmp_path, start=START._replace(train_state=like))
            same(found, made(10))
            for array, wanted in zip(jax.tree.leaves(found.train_state), jax.tree.leaves(like), strict=True):
                assert array.sharding == wanted.sharding


class TestDamaged:
    WARNING = "jbn: --checkpoint-dir: got {} with damage in 20; going on from 10.\n"

    @pytest.mark.parametrize("flips", [2, pytest.param(12, marks=pytest.mark.nightly)])
    def test_damage_of_any_file_is_noticed_or_without_effect(self, tmp_path, capsys, flips):
        """Files that are cut or not there, and flipped bits; where one is not read again the newest comes back."""
        folder, noticed = saved(tmp_path, 10, 20), set()
        for file in files_of(folder / "20"):
            content = file.read_bytes()
            for damaged in (None, content[: len(content) // 2], *flipped(content, flips)):
                if damaged is None:
                    file.unlink()
                else:
                    file.write_bytes(damaged)
                found, err = newest(folder), capsys.readouterr().err
                same(found, made(found.steps))
                assert err == ("" if found.steps == 20 else self.WARNING.format(folder))
                noticed |= {file.parent.name} if found.steps == 10 else set()
            file.write_bytes(content)
        assert {"record", "train_state", "histories", "d"} <= noticed
        same(newest(folder), made(20))

    @pytest.mark.parametrize("left", ["20.orbax-checkpoint-tmp", "20"])
    def test_a_half_written_one_is_never_loaded(self, tmp_path, left):
        folder = saved(tmp_path, 10, 20)
        (folder / "20").rename(folder / left)
        shutil.rmtree(folder / left / "record")
        same(newest(folder), made(10))

    def test_an_empty_one_is_no_checkpoint(self, tmp_path):
        folder = saved(tmp_path, 10)
        (folder / "20").mkdir()
        same(newest(folder), made(10))

    def test_one_that_was_renamed_is_not_taken_for_a_later_one(self, tmp_path):
        folder = saved(tmp_path, 10, 20)
        (folder / "20").rename(folder / "30")
        same(newest(folder), made(10))

    def test_after_damage_the_run_goes_on_over_it(self, tmp_path, capsys):
        folder = saved(tmp_path, 10, 20, 30)
        for step in (20, 30):
            (folder / str(step) / "train_state" / "manifest.ocdbt").write_bytes(b"")
        with checkpoints(folder, IDENTITY) as each:
            same(each.newest(START), made(10))
            each.save(made(20))
        assert " 30, 20; going on from 10.\n" in capsys.readouterr().err
        assert sorted(os.listdir(folder)) == ["10", "20"]
        same(newest(folder), made(20))

    def test_where_all_are_damaged_a_line_says_so_and_nothing_is_deleted(self, tmp_path):
        folder = saved(tmp_path, 10, 20)
        for step in (10, 20):
            (folder / str(step) / "record" / "metadata").unlink()
        before = files_of(folder)
        assert refused(folder) == (
            f"--checkpoint-dir: got {folder}, where every checkpoint is damaged (20, 10); expected one that is as it "
            f"was written; remove them to start again, or choose another --checkpoint-dir."
        )
        assert files_of(folder) == before


class TestRefused:
    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"--lr": 0.2}, "--lr: got 0.2; expected 0.1"),
            ({"--lr": 0.2, "--hidden": (7,)}, "--hidden: got 7; expected 6,5"),
            ({"--data": "examples 3c4d"}, "--data: got examples 3c4d; expected examples 1a2b"),
        ],
    )
    def test_another_run_is_refused_by_the_first_option_that_differs(self, tmp_path, other, message):
        folder = saved(tmp_path, 10)
        before = files_of(folder)
        assert refused(folder, IDENTITY | other) == (
            f"{message}, as in the checkpoints in {folder}; pass the same again, or choose another --checkpoint-dir."
        )
        assert files_of(folder) == before

    def test_an_option_that_the_checkpoints_do_not_know_counts_as_its_default(self, tmp_path):
        folder, defaults = saved(tmp_path, 10), {"--new": 3, "--lr": 0.5}
        with checkpoints(folder, {**IDENTITY, "--new": 3}, defaults) as each:
            same(each.newest(START), made(10))
        with (
            checkpoints(folder, {**IDENTITY, "--new": 4}, defaults) as each,
            pytest.raises(BadInput, match="--new: got 4; expected 3, as in the checkpoints"),
        ):
            each.newest(START)

    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (file := tmp_path / "file").write_bytes(b"")
        assert refused(file) == f"--checkpoint-dir: got {file} (File exists); {WRITABLE}"

    def test_a_folder_that_cannot_be_written_to(self, tmp_path, monkeypatch):
        def closed(*args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("jbn.cli.checkpoints.tempfile.TemporaryFile", closed)
        assert refused(tmp_path) == f"--checkpoint-dir: got {tmp_path} (Permission denied); {WRITABLE}"


class TestFullDisk:
    """It is found while the save goes on, and said by the next one, or at the end."""

    # Files may have so many bytes: none at all for the record, or too few for the arrays.
    @pytest.mark.parametrize("limit", [pytest.param(30, marks=pytest.mark.nightly), 450])
    def test_it_is_one_line_and_what_was_saved_before_stays(self, tmp_path, limit):
        folder = saved(tmp_path, 10)
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "from support.saved_checkpoints import IDENTITY, checkpoints, limit_files, made\n"
            "from jbn.cli import BadInput\n"
            "try:\n"
            "    with checkpoints(Path(sys.argv[2]), IDENTITY) as each:\n"
            "        limit_files(int(sys.argv[3]))\n"
            "        each.save(made(400))\n"
            "except BadInput as error: print(error)\n"
        )
        command = [sys.executable, "-c", code, Path(__file__).parents[1], folder, str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (
            f"--checkpoint-dir: got {folder} (File too large); expected room for 4 checkpoints; make room, and start "
            f"again to go on from the last one that is whole.\n"
        )
        assert os.listdir(folder) == ["10"]
        same(newest(folder), made(10))
