"""A run that was cut short and started again ends as one that was not, bit for bit."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from subprocess import PIPE

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.saved_runs import images

import jbn.cli.fit
from jbn.cli import main
from jbn.cli.checkpoints import Checkpoints

MLP = ("--hidden", "3", "--batch-size", "16", "--epochs", "4")  # of 3 steps
RESNET = ("--network", "resnet", "--widths", "3", "--batch-size", "16", "--epochs", "4")
ALONE = ("--no-compare",)
TIMES = ("compile_s", "ms_per_step")


@pytest.fixture
def data(finished):
    return finished / "data.npz"


def command(data, out, *arguments):
    return ["train", *map(str, ("--data", data, "--out", out, *arguments))]


def train(capsys, data, out, *arguments):
    """A run that comes to its end; the folder of its results."""
    code = main(command(data, out, *arguments))
    assert (code, capsys.readouterr().err) == (0, "")
    return out


def refused(capsys, data, tmp_path, *arguments):
    """The line that a run ends with."""
    code = main(command(data, tmp_path / "refused", *arguments))
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err[:5], printed.err.count("\n")) == (2, "", "jbn: ", 1)
    assert not (tmp_path / "refused").exists()
    return printed.err[5:-1]


def read(folder):
    """Every array that a run leaves, and its metrics apart from times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    summary = {name: {k: v for k, v in run.items() if k not in TIMES} for name, run in metrics["summary"].items()}
    return {name.stem: load_file(name) for name in sorted(folder.glob("*.safetensors"))}, summary, metrics["history"]


def same(left, right):
    (models, *metrics), (other_models, *other_metrics) = read(left), read(right)
    assert metrics == other_metrics
    assert models.keys() == other_models.keys()
    for name, arrays in models.items():
        assert arrays.keys() == other_models[name].keys()
        for path, array in arrays.items():
            assert array.tobytes() == other_models[name][path].tobytes(), (name, path)


def alike(left, right):
    """To rounding, which adds up over the steps."""
    (models, *_), (other_models, *_) = read(left), read(right)
    for name, arrays in models.items():
        for path, array in arrays.items():
            np.testing.assert_allclose(array, other_models[name][path], rtol=2e-3, atol=2e-4, err_msg=path)


def cut_short(monkeypatch, saves, error=KeyboardInterrupt):
    """Makes the next run end in its save after so many, which is half done or not begun."""
    save, done = Checkpoints.save, []

    def fails(self, checkpoint):
        if len(done) == saves:
            monkeypatch.setattr(Checkpoints, "save", save)
            raise error
        done.append(save(self, checkpoint))

    monkeypatch.setattr(Checkpoints, "save", fails)


class TestInOneProcess:
    @pytest.mark.parametrize(
        ("arguments", "cuts"),
        [
            (MLP, (1, 6)),
            ((*MLP, *ALONE, "--optimizer", "adam", "--accumulate", "4", "--dtype", "bfloat16"), (0, 3)),
            pytest.param(
                (*RESNET, *ALONE, "--optimizer", "momentum", "--weight-decay", "0.1"), (1, 2), marks=pytest.mark.nightly
            ),
        ],
    )
    def test_cut_short_twice_it_ends_the_same(self, data, tmp_path, capsys, monkeypatch, arguments, cuts):
        """In the middle of an epoch, at its end, in the second network."""
        plain = train(capsys, data, tmp_path / "plain", *arguments)
        keep = (*arguments, "--checkpoint-dir", tmp_path / "kept", "--checkpoint-every", "2")
        for saves in cuts:
            cut_short(monkeypatch, saves)
            assert main(command(data, tmp_path / "out", *keep)) == 130
            assert not (tmp_path / "out").exists()
        capsys.readouterr()
        same(train(capsys, data, tmp_path / "out", *keep), plain)

    def test_a_finished_network_is_not_trained_again_and_more_epochs_train_on(
        self, data, kept, tmp_path, capsys, monkeypatch
    ):
        keep, made = ("--checkpoint-dir", shutil.copytree(kept, tmp_path / "kept")), []
        compiled = jbn.cli.fit._compiled
        monkeypatch.setattr(jbn.cli.fit, "_compiled", lambda *rest: made.append(rest) or compiled(*rest))
        same(train(capsys, data, tmp_path / "again", *MLP, *keep, *ALONE), kept.parent / "out")
        assert len(made) == 0
        both = train(capsys, data, tmp_path / "both", *MLP, *keep)
        assert len(made) == 1
        assert sorted(os.listdir(tmp_path / "kept" / "with")) == ["12", "6", "9"]
        longer = train(capsys, data, tmp_path / "longer", *MLP, "--epochs", "6", *keep)
        same(longer, train(capsys, data, tmp_path / "plain", *MLP, "--epochs", "6"))
        assert read(both)[2]["with"]["test_loss"] == read(longer)[2]["with"]["test_loss"][:4]

    def test_it_goes_on_with_other_devices_to_rounding(self, data, tmp_path, capsys, monkeypatch):
        arguments = (*MLP, *ALONE, "--accumulate", "2", "--checkpoint-dir", tmp_path / "kept")
        cut_short(monkeypatch, 2)
        assert main(command(data, tmp_path / "cut", *arguments)) == 130
        capsys.readouterr()
        alike(
            train(capsys, data, tmp_path / "two", *arguments, "--devices", "2"),
            train(capsys, data, tmp_path / "plain", *arguments[:-2]),
        )

    def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(self, finished, data, tmp_path, capsys):
        arguments, kept = (*MLP, *ALONE), shutil.copytree(finished / "kept", tmp_path / "kept")
        (kept / "with" / "12" / "train_state" / "manifest.ocdbt").write_bytes(b"")
        assert main(command(data, tmp_path / "resumed", *arguments, "--checkpoint-dir", kept)) == 0
        assert capsys.readouterr().err == (
            f"jbn: --checkpoint-dir: got {kept}/with with damage in 12; going on from 9.\n"
        )
        same(tmp_path / "resumed", finished / "out")

    def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(self, finished, data, tmp_path, capsys, monkeypatch):
        from orbax.checkpoint import CheckpointManager

        save, keep = CheckpointManager.save, (*MLP, *ALONE, "--checkpoint-dir", tmp_path / "kept")

        def full(self, step, *rest, **options):
            if step == 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return save(self, step, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointManager, "save", full)
            line = refused(capsys, data, tmp_path, *keep)
        assert line.startswith(f"--checkpoint-dir: got {tmp_path}/kept/with (No space left on device); expected room ")
        assert sorted(os.listdir(tmp_path / "kept" / "with")) == ["3", "6"]
        same(train(capsys, data, tmp_path / "resumed", *keep), finished / "out")


@pytest.fixture
def kept(finished):
    return finished / "kept"


class TestRefused:
    @pytest.mark.parametrize(
        ("option", "got", "expected"),
        [
            ("--lr", "0.5", "1.0"),
            ("--hidden", "4", "3"),
            ("--batch-size", "12", "16"),
            ("--optimizer", "adam", "sgd"),
            ("--norm", "a", "z"),
            ("--seed", "1", "0"),
            ("--dtype", "bfloat16", "float32"),
            ("--stats", "local", "global"),
        ],
    )
    def test_another_option(self, kept, data, tmp_path, capsys, option, got, expected):
        message = refused(capsys, data, tmp_path, *MLP, "--checkpoint-dir", kept, option, got)
        # The seed splits the data too.
        assert f"{option}: got {got}; expected {expected}, as in" in message or option == "--seed"
        assert message.endswith(
            f", as in the checkpoints in {kept}/with; pass the same again, or choose another --checkpoint-dir."
        )

    def test_other_data(self, kept, tmp_path, capsys):
        changed = images(0)
        changed["x"][0, 0, 0, 0] += 1
        np.savez(tmp_path / "other.npz", **changed)
        message = refused(capsys, tmp_path / "other.npz", tmp_path, *MLP, "--checkpoint-dir", kept)
        assert message.startswith("--data: got examples with the digest ")

    def test_fewer_epochs(self, kept, data, tmp_path, capsys):
        assert refused(capsys, data, tmp_path, *MLP, "--epochs", "2", "--checkpoint-dir", kept) == (
            f"--epochs: got 2; expected at least 4, since the checkpoints in {kept}/with are 12 steps on; pass more, "
            f"or choose another --checkpoint-dir."
        )

    def test_how_often_without_where(self, data, tmp_path, capsys):
        assert refused(capsys, data, tmp_path, "--checkpoint-every", "9") == (
            "--checkpoint-every: got 9 without --checkpoint-dir; expected both; pass --checkpoint-dir DIR."
        )

    @pytest.mark.parametrize("inside", [".", "kept"])
    def test_a_place_in_the_results(self, data, tmp_path, capsys, inside):
        folder = tmp_path / "refused" / inside
        assert refused(capsys, data, tmp_path, "--checkpoint-dir", folder) == (
            f"--checkpoint-dir: got {folder}, which is in --out {tmp_path}/refused; expected a folder outside of it, "
            f"since it is new and appears at the end; choose another DIR."
        )


@contextlib.contextmanager
def started(*lines):
    """Processes of the command line, which are gone afterwards."""
    processes = []
    try:
        for line in lines:
            call = [sys.executable, "-m", "jbn", *line]
            processes.append(subprocess.Popen(call, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True))
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)


def killed(condition, *lines, pause=0.0):
    """Starts processes and kills all of them as soon as a condition holds; looks often, since a save is short."""
    with started(*lines) as processes:
        until = time.monotonic() + 120
        while not condition():
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            assert time.monotonic() < until
            time.sleep(0.0005)
        time.sleep(pause)
    assert {process.returncode for process in processes} == {-signal.SIGKILL}


def run_to_the_end(*lines):
    with started(*lines) as processes:
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err


def names(folder):
    """What is in a folder of checkpoints: whole ones by their steps, others."""
    found = os.listdir(folder) if folder.exists() else []
    return {int(name) for name in found if name.isdigit()}, {name for name in found if not name.isdigit()}


@pytest.mark.processes
class TestKilled:
    @pytest.mark.nightly  # by day, one moment is enough: the next test
    def test_at_any_moment_it_ends_the_same(self, data, tmp_path, capsys):
        """While it compiles, in the middle of a save, and in the second network."""
        arguments = (*MLP, "--epochs", "60", "--checkpoint-every", "2")
        plain, kept = train(capsys, data, tmp_path / "plain", *arguments[:-2]), tmp_path / "kept"
        line = command(data, tmp_path / "out", *arguments, "--checkpoint-dir", kept)
        killed((kept / "with").is_dir, line, pause=0.05)
        assert names(kept / "with") == (set(), set())
        for _ in range(5):  # the save may be over when the signal comes
            killed(lambda: all(names(kept / "with")), line)
            if all(names(kept / "with")):
                break
        assert all(names(kept / "with"))
        killed(lambda: names(kept / "without")[0], line)
        run_to_the_end(line)
        assert names(kept / "without") == ({176, 178, 180}, set())
        same(tmp_path / "out", plain)

    @pytest.mark.nightly
    def test_where_one_of_several_processes_has_no_room_all_end_with_a_line(self, data, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = f"127.0.0.1:{free.getsockname()[1]}"
        together = (*MLP, *ALONE, "--checkpoint-dir", tmp_path / "kept", "--coordinator", meeting, "--num-processes", 2)
        lines = [command(data, tmp_path / "out", *together, "--process-id", i) for i in range(2)]
        calls = [[sys.executable, "-m", "jbn", *line] for line in lines]
        # Its files may have 1024 bytes, fewer than a checkpoint needs.
        calls[0] = ["sh", "-c", 'trap "" XFSZ; ulimit -f 2; exec "$@"', "sh", *calls[0]]
        processes = [subprocess.Popen(call, stdout=PIPE, stderr=PIPE, text=True) for call in calls]
        errors = [process.communicate(timeout=120)[1].splitlines()[-1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
        assert errors[0].startswith(f"jbn: --checkpoint-dir: got {tmp_path}/kept/with (File too large); expected room ")
        assert errors[1].startswith("jbn: --process-id: got process 1 of 2 ")
        assert not (tmp_path / "out").exists()
        assert names(tmp_path / "kept" / "with") == (set(), set())

    @pytest.mark.nightly
    def test_several_processes_go_on_together(self, data, tmp_path, capsys):
        arguments = (*MLP, *ALONE, "--epochs", "24", "--lr", "0.1")
        plain, kept = train(capsys, data, tmp_path / "plain", *arguments), tmp_path / "kept"

        def lines():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                meeting = f"127.0.0.1:{free.getsockname()[1]}"
            keep = ("--checkpoint-dir", kept, "--checkpoint-every", 24)
            together = (*arguments, *keep, "--coordinator", meeting, "--num-processes", 2)
            return [command(data, tmp_path / "out", *together, "--process-id", i) for i in range(2)]

        killed(lambda: names(kept / "with")[0], *lines())
        whole, _ = names(kept / "with")
        assert 72 not in whole
        made = (kept / "with" / "24").stat().st_mtime_ns
        run_to_the_end(*lines())
        assert names(kept / "with") == ({24, 48, 72}, set())
        assert (kept / "with" / "24").stat().st_mtime_ns == made
        alike(tmp_path / "out", plain)
