"""Runs of several processes on this machine: as one of a single process, and what is left when one ends early.

By day each way to end is tried once; what each process checks of the others is tried without them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jbn.cli import child, commands, main, processes, supervision
from jbn.cli.bad_input import BadInput
from jbn.cli.options import TrainOptions

pytestmark = pytest.mark.processes

SMALL = ("--batch-size", "16", "--epochs", "1", "--hidden", "4", "--accumulate", "2", "--no-compare")
ENDLESS = ("--batch-size", "24", "--epochs", "100000", "--hidden", "4", "--no-compare", "--checkpoint-every", "1")
AGAIN = "expected all of them to stay to the end; start them all again, with the same options."


def training(data, folder):
    """Options of a run that does not end, whose first checkpoint says that it has begun."""
    return ("--data", data, *ENDLESS, "--checkpoint-dir", folder / "kept", "--out", folder / "out")


class Run:
    """Processes that train together, each with its output in files."""

    def __init__(self, folder, count, arguments, own=None):
        self.folder = folder
        with socket.create_server(("localhost", 0)) as free:
            address = f"localhost:{free.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.all = []
        # Where the tests run in the background they ignore Ctrl-C, and so would what they start.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        for i in range(count):
            several = ("--coordinator", address, "--num-processes", count, "--process-id", i)
            command = [sys.executable, "-m", "jbn", "train", *map(str, (*several, *arguments, *(own or {}).get(i, ())))]
            with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as err:
                self.all.append(
                    subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
                )
        signal.signal(signal.SIGINT, before)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def codes(self, timeout):
        """Exit codes, when all have ended."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.all]

    def printed(self, which):
        return [(self.folder / f"{i}.{which}").read_text() for i in range(len(self.all))]

    def wait_for(self, found, timeout=90):
        deadline = time.monotonic() + timeout
        while not found():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.all), self.printed("err")
            time.sleep(0.05)

    def children(self, i):
        """Of one of the processes, where the system tells."""
        pid = self.all[i].pid
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def wait_until_gone(pid, timeout=20):
    deadline = time.monotonic() + timeout
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            assert time.monotonic() < deadline
            time.sleep(0.05)


def losses(folder):
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return history["with"]["loss"] + history["with"]["test_loss"]


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.nightly)])
def test_processes_train_as_one_does_and_the_first_alone_speaks(data, tmp_path, processes, devices):
    assert main(["train", "--data", str(data), *SMALL, "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "logs").mkdir()
    arguments = ("--data", data, *SMALL, "--devices", devices, "--out", tmp_path / "many")
    with Run(tmp_path / "logs", processes, arguments) as run:
        assert run.codes(120) == [0] * processes, run.printed("err")
    document, *others = run.printed("out")
    assert others == [""] * (processes - 1)
    assert run.printed("err") == [""] * processes
    printed = json.loads(document)
    assert [printed[key] for key in ("devices", "processes", "stats")] == [4, processes, "global"]
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    assert sorted(os.listdir(tmp_path / "many")) == sorted(os.listdir(tmp_path / "one"))
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "logs", "many", "one"]


@pytest.mark.parametrize(
    ("victim", "processes"),
    [(0, 2), pytest.param(2, 3, marks=pytest.mark.nightly)],
    ids=["the coordinator", "another"],
)
def test_when_one_is_killed_its_child_ends_and_all_others_with_one_line_that_says_so(data, tmp_path, victim, processes):
    (tmp_path / "logs").mkdir()
    with Run(tmp_path / "logs", processes, training(data, tmp_path)) as run:
        run.wait_for(lambda: any((tmp_path / "kept" / "with").glob("[0-9]*")))
        orphans = run.children(victim)
        run.all[victim].kill()
        codes = run.codes(120)
        for orphan in orphans:
            wait_until_gone(orphan)
    assert codes == [-signal.SIGKILL if i == victim else 2 for i in range(processes)]
    for i, err in enumerate(run.printed("err")):
        if i != victim:
            assert err.count("\n") == 1
            assert err.startswith(f"jbn: --process-id: got process {i} of {processes} ")
            assert err.endswith(f"{AGAIN}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted"),
        pytest.param(signal.SIGTERM, "ended by SIGTERM", marks=pytest.mark.nightly),
    ],
)
def test_ctrl_c_in_one_process_ends_it_as_always_and_the_others_with_a_line(data, tmp_path, number, said):
    (tmp_path / "logs").mkdir()
    with Run(tmp_path / "logs", 2, training(data, tmp_path)) as run:
        run.wait_for(lambda: any((tmp_path / "kept" / "with").glob("[0-9]*")))
        run.all[0].send_signal(number)
        assert run.codes(120) == [128 + number, 2]
    first, second = run.printed("err")
    assert first == f"jbn: {said}.\n"
    assert second.count("\n") == 1
    assert second.endswith(f"{AGAIN}\n")
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "kept", "logs"]


@pytest.mark.parametrize("finder", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_bad_input_that_one_process_finds_ends_all_of_them_alike(data, tmp_path, finder):
    (tmp_path / "logs").mkdir()
    wrong = {0: ("--out", data), 1: ("--data", tmp_path / "none.npz")}[finder]
    arguments = ("--data", data, *SMALL, "--out", tmp_path / "out")
    with Run(tmp_path / "logs", 2, arguments, {finder: wrong}) as run:
        assert run.codes(120) == [2, 2]
    first, second = run.printed("err")
    assert first == second
    assert first.count("\n") == 1
    assert first.startswith(f"jbn: {wrong[0]}: got ")
    assert run.printed("out") == ["", ""]
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "logs"]


@pytest.mark.nightly
def test_data_that_are_not_the_same_everywhere_are_refused(data, tmp_path):
    (tmp_path / "logs").mkdir()
    other = tmp_path / "other.npz"
    np.savez(other, x=np.random.default_rng(1).normal(size=(90, 3)), y=np.arange(90) % 2)
    arguments = ("--data", data, *SMALL, "--out", tmp_path / "out")
    with Run(tmp_path / "logs", 2, arguments, {1: ("--data", other)}) as run:
        assert run.codes(120) == [2, 2]
    message = (
        "jbn: --data: got something else in process 1 than in process 0; expected the same everywhere; "
        "give all processes the same.\n"
    )
    assert run.printed("err") == [message] * 2


@pytest.mark.parametrize(
    "process", [pytest.param(0, marks=pytest.mark.nightly), 1], ids=["nobody comes", "nobody is there"]
)
def test_a_process_that_meets_no_other_says_so_in_time(tmp_path, process):
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    command = ["--num-processes", "2", "--process-id", str(process), "--timeout", "2", "--coordinator"]
    done = subprocess.run(
        [sys.executable, "-m", "jbn", "train", *command, address],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    met = f"jbn: --coordinator: got {address}, where process {process} did not meet all 2 processes within 2 s; "
    assert done.stderr.startswith(met)
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lr", "0.5", "--lr: got 0.5 in process 1; expected 1.0, as in process 0; start all processes alike."),
        ("--num-processes", "4", "--num-processes: got 4 in process 1; expected 2, as in process 0; start all"),
        ("--process-id", "0", "--coordinator: got localhost:"),
    ],
)
def test_processes_that_were_not_told_the_same_end_alike(data, tmp_path, option, value, message):
    (tmp_path / "logs").mkdir()
    arguments = ("--data", data, *SMALL, "--timeout", "10", "--out", tmp_path / "out")
    with Run(tmp_path / "logs", 2, arguments, {1: (option, value)}) as run:
        assert run.codes(120) == [2, 2]
    for err in run.printed("err"):
        assert err.count("\n") == 1
        assert err.startswith(f"jbn: {message}")
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "logs"]


def told(monkeypatch, change):
    """Makes another process say what this one says, but for a change."""
    monkeypatch.setattr(processes, "_told", lambda text: [text, change(text)])
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: None)


def test_what_one_process_finds_or_has_otherwise_is_what_all_of_them_say(monkeypatch):
    told(monkeypatch, lambda text: text.replace('"--lr": 1.0', '"--lr": 0.5'))
    options = TrainOptions(lr=1.0, coordinator="localhost:1", num_processes=2, process_id=0)
    with pytest.raises(BadInput, match=r"--lr: got 0[.]5 in process 1; expected 1[.]0, as in process 0; start all"):
        processes._compare(options)
    told(monkeypatch, lambda text: text or "--data: got nothing.")
    with pytest.raises(BadInput, match="--data: got nothing"), processes.agreed():
        pass
    told(monkeypatch, lambda text: text.replace("mine", "other"))
    with pytest.raises(BadInput, match="--data: got something else in process 1 than in process 0; expected the same"):
        processes.same("--data", "mine")
    processes.same("--data", "ours")


def test_the_child_is_asked_for_the_same_run():
    def asked(*argv):
        return TrainOptions.of(**commands.parse(["train", *argv]).keywords)

    given = ["--network", "resnet", "--widths", "3,4", "--no-compare", "--lr", "1e-05", "--data", "a b.npz"]
    together = ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "1", "--seed", "7"]
    options = asked(*given, *together)
    assert asked(*supervision._typed(options)) == options


IN_CHILD = """
import os, sys
from jbn.cli import supervision
assert supervision.is_child()
os.write(1, b"of gloo")
print("shown:", sys.stdout.isatty(), flush=True)
print("said", file=sys.stderr, flush=True)
import time
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the system has no terminals of its own to give")
def test_a_child_prints_on_the_terminal_keeps_what_libraries_print_from_it_and_ends_with_its_stdin():
    ours, terminal = os.openpty()
    process = child.start(["-c", IN_CHILD], {"JBN_CHILD": "1"}, stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    assert process.stderr.readline() == "said\n"
    assert os.read(ours, 100) == b"shown: True\r\n"
    assert os.getpgid(process.pid) != os.getpgid(0)  # a terminal's Ctrl-C is not for it
    process.stdin.close()
    assert process.wait(20) == 1
    process.stderr.close()
    os.close(ours)
