"""Output that goes nowhere, or in an encoding that lacks γ, costs no result; and no signal is lost."""

import gc
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.saved_runs import two_classes

import jbn.cli.train
from jbn.cli import main

SMALL = ("--epochs", "1", "--batch-size", "32", "--hidden", "3", "--norm", "none")


def train(data, out, *arguments):
    return ["train", *map(str, ("--data", data, *SMALL, "--out", out, *arguments))]


class Terminal(io.TextIOWrapper):
    """A terminal of some encoding."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding)

    def isatty(self):
        return True

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding, "replace")


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_a_terminal_without_greek_shows_help_bars_and_tables(self, tmp_path, monkeypatch, encoding):
        data = two_classes(tmp_path)
        run = ["--norm", "z", "--no-compare"]
        for arguments in (["train", "--help"], train(data, tmp_path / "run", *run), ["inspect", str(tmp_path / "run")]):
            monkeypatch.setattr(sys, "stdout", terminal := Terminal(encoding))
            assert main(arguments) == 0
            assert terminal.shown().count("\n") > 5

    def test_file_names_that_are_no_text(self, tmp_path, capsys):
        folder = tmp_path / os.fsdecode(b"caf\xe9")
        folder.mkdir()
        data = two_classes(folder)
        assert main(train(data, folder / "run", "--norm", "z", "--no-compare")) == 0
        for command in ("inspect", "calibrate", "fold"):
            assert main([command, str(folder / "run")]) == 0
        capsys.readouterr()
        assert main(train(data, tmp_path / "run", "--checkpoint-dir", folder)) == 2
        assert "; expected a name in UTF-8, since Orbax takes no other; " in capsys.readouterr().err


class Full(io.StringIO):
    """Takes nothing, as /dev/full."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


class TestNowhere:
    def test_a_full_disk_behind_stdout_is_a_line_and_the_results_are_there(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdout", Full())
        data, run = two_classes(tmp_path), tmp_path / "run"
        message = (
            "jbn: stdout: got No space left on device; expected room for the report; what goes to files is saved.\n"
        )
        for arguments in (train(data, run, "--norm", "z", "--no-compare"), ["fold", str(run)], ["--help"]):
            assert main(arguments) == 1
            assert capsys.readouterr().err == message
        assert {"with.safetensors", "folded.safetensors", "metrics.json"} < set(os.listdir(run))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    @pytest.mark.parametrize(
        "redirection", [">&-", *(pytest.param(each, marks=pytest.mark.nightly) for each in (">/dev/full", ">&- 2>&-"))]
    )
    def test_a_closed_or_full_stdout_of_a_process(self, tmp_path, redirection):
        command = f"exec {sys.executable} -m jbn --help {redirection}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert len(lines) == (0 if "2>&-" in redirection else 1)
        assert all(line.startswith("jbn: stdout: got ") for line in lines)


SIGNALS = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "ended by SIGTERM"), "SIGHUP": (129, "ended by SIGHUP")}


@pytest.mark.parametrize("name", SIGNALS)
class TestSignals:
    @pytest.fixture(autouse=True)
    def as_in_the_foreground(self, name):
        """Also where the tests run in the background of a shell, which ignores Ctrl-C there."""
        number = getattr(signal, name)
        before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
        yield
        signal.signal(number, before)

    def test_it_ends_a_run_with_a_line_and_leaves_nothing(self, tmp_path, monkeypatch, capsys, name):
        data = two_classes(tmp_path)
        monkeypatch.setattr(jbn.cli.train, "fit", lambda *given: signal.raise_signal(getattr(signal, name)))
        code, said = SIGNALS[name]
        handler = signal.getsignal(getattr(signal, name))
        assert main(train(data, tmp_path / "a" / "run")) == code
        assert capsys.readouterr() == ("", f"jbn: {said}.\n")
        assert os.listdir(tmp_path) == ["data.npz"]
        assert signal.getsignal(getattr(signal, name)) is handler

    def test_it_is_sent_again_where_the_garbage_collector_drops_the_exception(
        self, tmp_path, monkeypatch, capsys, name
    ):
        def callback(phase, info):
            gc.callbacks.remove(callback)
            signal.raise_signal(getattr(signal, name))

        def dropped(*given):
            gc.callbacks.append(callback)
            gc.collect()
            for _ in range(1000):  # until it comes again
                time.sleep(0.05)

        monkeypatch.setattr(jbn.cli.train, "fit", dropped)
        assert main(train(two_classes(tmp_path), tmp_path / "run")) == SIGNALS[name][0]
        assert capsys.readouterr() == ("", f"jbn: {SIGNALS[name][1]}.\n")

    def test_it_counts_where_python_makes_another_error_of_it(self, tmp_path, monkeypatch, capsys, name):
        class Descriptor:
            def __set_name__(self, owner, name_):
                signal.raise_signal(getattr(signal, name))

        monkeypatch.setattr(jbn.cli.train, "fit", lambda *given: type("Made", (), {"attribute": Descriptor()}))
        assert main(train(two_classes(tmp_path), tmp_path / "run")) == SIGNALS[name][0]
        assert capsys.readouterr() == ("", f"jbn: {SIGNALS[name][1]}.\n")

    def test_it_is_heard_before_jax_is_imported(self, tmp_path, name):
        """A jax that gets the signal while it is imported, and would go on."""
        (tmp_path / "jax.py").write_text(f"import os, signal; os.kill(os.getpid(), signal.{name}); print('lost')")
        found = Path(sys.modules["jbn"].__file__).parents[1]
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(found)!r}]; import jbn_command; jbn_command.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (SIGNALS[name][0], "", f"jbn: {SIGNALS[name][1]}.\n")

    def test_one_that_the_user_ignores_is_ignored(self, tmp_path, capsys, name):
        number = getattr(signal, name)
        signal.signal(number, signal.SIG_IGN)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jbn.cli.train, "load_data", lambda *given, **more: signal.raise_signal(number) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                main(train(tmp_path, tmp_path / "run"))
