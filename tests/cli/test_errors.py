"""Everything that the command line cannot run: one line on stderr, exit code 2, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import hostile_input

from jbn.cli import main

SMALL = ["--epochs", "2", "--batch-size", "8", "--hidden", "6,5"]

X = np.linspace(-1, 1, 40).reshape(20, 2)
Y = np.arange(20) % 2
WANTED = "expected an .npz file with arrays x and y"
MAKE = "make one with numpy.savez(FILE, x=…, y=…)."
RENUMBER = "expected 0, 1, … without a gap; renumber them with numpy.unique(y, return_inverse=True)[1]."


def with_value(value):
    x = X.copy()
    x[3, 1] = value
    return x


@pytest.fixture
def data(tmp_path):
    """A file with nothing wrong."""
    file = tmp_path / "data.npz"
    np.savez(file, x=X, y=Y)
    return file


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


BAD_DATA = {
    "x missing": ({"y": Y}, f"--data: got no array x in FILE, which holds y; {WANTED}; {MAKE}"),
    "y missing": ({"x": X}, f"--data: got no array y in FILE, which holds x; {WANTED}; {MAKE}"),
    "y_test missing": (
        {"x": X, "y": Y, "x_test": X},
        f"--data: got no array y_test in FILE, which holds x, x_test, y; {WANTED}; {MAKE}",
    ),
    "NaN": (
        {"x": with_value(np.nan), "y": Y},
        "--data: got 1 of 40 values in x that are NaN or infinite, the first in x[3]; "
        "expected finite numbers; clean the data first.",
    ),
    "infinity": (
        {"x": with_value(-np.inf), "y": Y},
        "--data: got 1 of 40 values in x that are NaN or infinite, the first in x[3]; "
        "expected finite numbers; clean the data first.",
    ),
    "far too large": (
        {"x": with_value(1e300), "y": Y},
        "--data: got values in x too large or too far apart to be standardized; "
        "expected values below 1e150 or so; rescale them.",
    ),
    "NaN in the test set": (
        {"x": X, "y": Y, "x_test": with_value(np.nan), "y_test": Y},
        "--data: got 1 of 40 values in x_test that are NaN or infinite, the first in x_test[3]; "
        "expected finite numbers; clean the data first.",
    ),
    "variance overflows": (
        {"x": with_value(1e160), "y": Y},
        "--data: got values in x too large or too far apart to be standardized; "
        "expected values below 1e150 or so; rescale them.",
    ),
    "a test set too far away": (
        {"x": X, "y": Y, "x_test": with_value(1e60), "y_test": Y},
        "--data: got values in x_test too large or too far apart to be standardized; "
        "expected values below 1e150 or so; rescale them.",
    ),
    "words in x": (
        {"x": X.astype(str), "y": Y},
        f"--data: got dtype {X.astype(str).dtype} in x; expected real numbers; convert it.",
    ),
    "x of rank 1": (
        {"x": X[:, 0], "y": Y},
        "--data: got x of shape (20,); expected (N, features), (N, H, W) or (N, H, W, C), not empty; reshape it.",
    ),
    "no examples": (
        {"x": X[:0], "y": Y[:0]},
        "--data: got x of shape (0, 2); expected (N, features), (N, H, W) or (N, H, W, C), not empty; reshape it.",
    ),
    "labels that are not whole": (
        {"x": X, "y": Y / 2},
        "--data: got y with numbers that are not whole; expected a class for each example, since this is "
        "classification only; make classes of them, say with numpy.digitize.",
    ),
    "labels that are no numbers": (
        {"x": X, "y": Y * np.nan},
        "--data: got y with numbers that are not whole; expected a class for each example, since this is "
        "classification only; make classes of them, say with numpy.digitize.",
    ),
    "one-hot labels": (
        {"x": X, "y": np.eye(2)[Y]},
        "--data: got one-hot rows of shape (20, 2) in y; expected (N,), a label for each example; "
        "pass numpy.argmax(y, axis=1).",
    ),
    "complex labels": (
        {"x": X, "y": Y * 1j},
        "--data: got dtype complex128 in y; expected labels; make them integers or words.",
    ),
    "a word in the test set alone": (
        {"x": X, "y": np.array(["cat", "dog"])[Y], "x_test": X, "y_test": np.array(["cat", "cow"])[Y]},
        "--data: got label 'cow' in y_test; expected labels of the training set, cat, dog; name both alike.",
    ),
    "labels of rank 2": (
        {"x": X, "y": Y[:, None]},
        "--data: got y of shape (20, 1); expected (N,), a label for each example; reshape it.",
    ),
    "too few labels": (
        {"x": X, "y": Y[:-1]},
        "--data: got 20 examples in x and 19 labels in y; expected as many of one as of the other; "
        "give each example its label.",
    ),
    "negative label": (
        {"x": X, "y": Y - 1},
        f"--data: got 2 different labels in y, from -1 to 0; {RENUMBER}",
    ),
    "gap in the labels": (
        {"x": X, "y": 10**9 * Y},
        f"--data: got 2 different labels in y, from 0 to 1000000000; {RENUMBER}",
    ),
    "one class": (
        {"x": X, "y": 3 + 0 * Y},
        "--data: got one class in y, 3 for all 20 examples; expected at least two; add examples of another.",
    ),
    "test label unseen": (
        {"x": X, "y": Y, "x_test": X, "y_test": Y + 1},
        "--data: got label 2 in y_test; expected labels of the training set, 0 to 1; number both alike.",
    ),
    "test set of another shape": (
        {"x": X, "y": Y, "x_test": X[:, :1], "y_test": Y},
        "--data: got examples of shape (1,) in x_test; expected (2,), that of x; reshape them.",
    ),
    "a class too rare to split": (
        {"x": X, "y": np.arange(20) // 19},
        "--data: got 20 examples of 2 classes, 1 of the rarest; expected at least 2 of each to split off a test "
        "set; add examples, or arrays x_test and y_test.",
    ),
    "objects": (
        {"x": np.array([X, None], dtype=object), "y": Y},
        f"--data: got FILE, which is no .npz file, is damaged or holds pickled objects; {WANTED}; {MAKE}",
    ),
}

TOGETHER = (
    "expected --coordinator, --num-processes and --process-id together; "
    "as in --coordinator localhost:1234 --num-processes 2 --process-id 0."
)

BAD_OPTIONS = {
    "--norm x": "--norm: got 'x'; expected one of z, a, none; as in --norm z.",
    "--optimizer lbfgs": "--optimizer: got 'lbfgs'; expected one of sgd, momentum, rmsprop, adam; "
    "as in --optimizer sgd.",
    "--activation step": "--activation: got 'step'; expected one of sigmoid, tanh, relu, gelu, silu; "
    "as in --activation sigmoid.",
    "--dtype float8": "--dtype: got 'float8'; expected one of float32, bfloat16; as in --dtype float32.",
    "--lr 0": "--lr: got 0; expected a finite number above 0; as in --lr 1.0.",
    "--lr fast": "--lr: got fast; expected a finite number above 0; as in --lr 1.0.",
    "--lr inf": "--lr: got inf; expected a finite number above 0; as in --lr 1.0.",
    "--weight-decay -1": "--weight-decay: got -1; expected a finite number of at least 0; as in --weight-decay 0.0001.",
    "--bn-momentum 1.5": "--bn-momentum: got 1.5; expected a finite number from 0 to 1; as in --bn-momentum 0.9.",
    "--bn-momentum nan": "--bn-momentum: got nan; expected a finite number from 0 to 1; as in --bn-momentum 0.9.",
    "--target-loss 0": "--target-loss: got 0; expected a finite number above 0; as in --target-loss 0.1.",
    "--hidden 4,,4": "--hidden: got '4,,4'; expected widths of at least 1 between commas, one a hidden layer; "
    "as in --hidden 128,128,128.",
    "--hidden 0": "--hidden: got '0'; expected widths of at least 1 between commas, one a hidden layer; "
    "as in --hidden 128,128,128.",
    "--epochs 0": "--epochs: got 0; expected a whole number of at least 1; as in --epochs 30.",
    "--epochs 1.5": "--epochs: got 1.5; expected a whole number of at least 1; as in --epochs 30.",
    "--batch-size 0": "--batch-size: got 0; expected a whole number of at least 1; as in --batch-size 64.",
    "--seed -1": "--seed: got -1; expected a whole number from 0 to 4294967295; as in --seed 0.",
    "--batch-size 6 --accumulate 4": "--accumulate: got 4; expected a divisor of --batch-size 6; "
    "pass sizes that divide, as in --batch-size 64 --accumulate 4.",
    "--batch-size 4 --accumulate 4": "--batch-size: got 4 with --accumulate 4; expected at least 2 examples in a "
    "microbatch, since the variance of one is 0; use a larger --batch-size.",
    "--batch-size 17": "--batch-size: got 17; expected at most 16, the size of the training set; use a smaller batch.",
    "--devices 0": "--devices: got 0; expected a whole number of at least 1; as in --devices 4.",
    "--batch-size 16 --accumulate 2 --devices 3": "--devices: got 3 for --batch-size 16 --accumulate 2; expected a "
    "number that divides the examples of a microbatch, 8; pass sizes that divide, as in --batch-size 64 --devices 4.",
    "--batch-size 16 --devices 16": "--devices: got 16; expected at most 8, as many as there are of cpu; "
    "pass --devices 8.",
    "--batch-size 4 --devices 4 --stats local": "--devices: got 4 for --batch-size 4 with --stats local; expected at "
    "least 2 examples a device, since the variance of one is 0; use fewer devices, or --stats global.",
    "--stats mine": "--stats: got 'mine'; expected one of global, local; as in --stats global.",
    "--coordinator localhost": "--coordinator: got 'localhost'; expected HOST:PORT; "
    "as in --coordinator localhost:1234.",
    "--coordinator localhost:65536": "--coordinator: got 'localhost:65536'; expected HOST:PORT; "
    "as in --coordinator localhost:1234.",
    "--process-id 0": f"--process-id: got --process-id alone; {TOGETHER}",
    "--coordinator a:1 --num-processes 2": f"--coordinator: got --coordinator and --num-processes alone; {TOGETHER}",
    "--coordinator a:1 --num-processes 2 --process-id 2": "--process-id: got 2 with --num-processes 2; "
    "expected 0 to 1; give each process a number of its own.",
    "--batch-size 16 --coordinator a:1 --num-processes 3 --process-id 0 --devices 2": "--devices: got 2 in each of 3 "
    "processes for --batch-size 16; expected a number that divides the examples of a microbatch, 16; pass sizes that "
    "divide, as in --batch-size 64 --devices 4.",
    "--timeout 0": "--timeout: got 0; expected a whole number of at least 1; as in --timeout 60.",
}


class TestBadInput:
    def refused(self, capsys, folder, *arguments):
        """The line on stderr, after a look that nothing else was said or written."""
        before = tree(folder)
        out = () if "--out" in arguments else ("--out", folder / "new" / "run")
        assert main(["train", *map(str, (*arguments, *out))]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert tree(folder) == before
        assert printed.err.startswith("jbn: ")
        assert printed.err.endswith("\n")
        assert printed.err.count("\n") == 1
        return printed.err[5:-1]

    @pytest.mark.parametrize("case", BAD_DATA)
    def test_arrays(self, tmp_path, capsys, case):
        arrays, message = BAD_DATA[case]
        file = tmp_path / "bad.npz"
        np.savez(file, allow_pickle=True, **arrays)
        assert self.refused(capsys, tmp_path, "--data", file) == message.replace("FILE", str(file), 1)

    @pytest.mark.parametrize("arguments", BAD_OPTIONS)
    def test_options(self, tmp_path, capsys, data, arguments):
        assert jax.device_count() == 8  # before a run could ask for another number
        message = self.refused(capsys, tmp_path, "--data", data, *arguments.split())
        assert message == BAD_OPTIONS[arguments]

    def test_a_missing_file(self, tmp_path, capsys):
        file = tmp_path / "none.npz"
        message = f"--data: got no file at {file}; {WANTED}; check the path."
        assert self.refused(capsys, tmp_path, "--data", file) == message

    def test_a_folder_for_a_file(self, tmp_path, capsys):
        message = f"--data: got {tmp_path} (Is a directory); {WANTED}; check the path."
        assert self.refused(capsys, tmp_path, "--data", tmp_path) == message

    @pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"PK\x03\x04broken"])
    def test_a_file_that_is_no_npz(self, tmp_path, capsys, content):
        file = tmp_path / "data.npz"
        file.write_bytes(content)
        message = f"--data: got {file}, which is no .npz file, is damaged or holds pickled objects; {WANTED}; {MAKE}"
        assert self.refused(capsys, tmp_path, "--data", file) == message

    def test_a_damaged_array(self, tmp_path, capsys, data):
        damaged = bytearray(data.read_bytes())
        damaged[200:400] = bytes(200)
        data.write_bytes(damaged)
        message = f"--data: got {data}, which is no .npz file, is damaged or holds pickled objects; {WANTED}; {MAKE}"
        assert self.refused(capsys, tmp_path, "--data", data) == message

    def test_a_single_array(self, tmp_path, capsys):
        file = tmp_path / "x.npy"
        np.save(file, X)
        message = f"--data: got a single array in {file}; {WANTED}; {MAKE}"
        assert self.refused(capsys, tmp_path, "--data", file) == message

    def test_a_folder_that_holds_something(self, tmp_path, capsys, data):
        message = (
            f"--out: got {tmp_path}, which is not empty; expected a new or empty folder, so that two runs never "
            f"mix; choose another DIR or remove this one."
        )
        assert self.refused(capsys, tmp_path, "--data", data, *SMALL, "--out", tmp_path) == message

    def test_a_file_in_the_place_of_the_folder(self, tmp_path, capsys, data):
        message = f"--out: got {data}, a file; expected a new or empty folder; choose another DIR."
        assert self.refused(capsys, tmp_path, "--data", data, *SMALL, "--out", data) == message

    def test_a_folder_inside_a_file(self, tmp_path, capsys, data):
        message = (
            f"--out: got {data}/run (Not a directory); expected a new or empty folder in a place that can be "
            f"written to; choose another DIR."
        )
        assert self.refused(capsys, tmp_path, "--data", data, *SMALL, "--out", data / "run") == message

    def test_a_name_too_long(self, tmp_path, capsys, data):
        out = tmp_path / ("x" * 300)
        message = (
            f"--out: got {out} (File name too long); expected a new or empty folder in a place that can be "
            f"written to; choose another DIR."
        )
        assert self.refused(capsys, tmp_path, "--data", data, *SMALL, "--out", out) == message

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_write_permission(self, tmp_path, capsys, data):
        (closed := tmp_path / "closed").mkdir(mode=0o500)
        message = (
            f"--out: got {closed}/run (Permission denied); expected a new or empty folder in a place that can be "
            f"written to; choose another DIR."
        )
        assert self.refused(capsys, tmp_path, "--data", data, *SMALL, "--out", closed / "run") == message

    @pytest.mark.parametrize("arguments", [["fly"], ["train", "--fly"], ["train", "--lr"], ["train", "x"]])
    def test_what_typer_refuses_is_one_line_too(self, capsys, arguments):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("jbn: ")
        assert printed.err.endswith(" --help.\n")
        assert printed.err.count("\n") == 1


class TestHostileInput:
    def test_what_claims_to_be_huge_ends_with_a_line_within_a_gigabyte(self, tmp_path):
        """Hundreds of gigabytes, hours of compilation or very deep recursion, if anyone tried."""
        done = subprocess.run(
            [sys.executable, Path(__file__).parents[1] / "support" / "hostile_input.py", tmp_path],
            capture_output=True,
            text=True,
            timeout=120,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        )
        assert done.returncode == 0, done.stderr
        *lines, memory = done.stdout.splitlines()
        for line, (_, message) in zip(lines, hostile_input.commands(tmp_path), strict=True):
            assert line.startswith(f"2 1 jbn: {message}")
        assert int(memory) < 2**30


class TestProcess:
    def test_without_the_extra_one_line_says_what_to_install(self):
        code = (
            "import importlib.util as u, sys; find = u.find_spec\n"
            "u.find_spec = lambda name, *rest: None if name in ('typer', 'rich') else find(name, *rest)\n"
            "from jbn.cli import main; sys.exit(main(['train']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "jbn: extra 'demo': got no module rich, typer; expected what the command line needs; "
            "install it with: pip install 'jbn[demo]'\n"
        )

    def test_python_m_jbn_is_the_command_line(self, tmp_path):
        command = [sys.executable, "-m", "jbn", "train", "--lr", "-1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "jbn: --lr: got -1; expected a finite number above 0; as in --lr 1.0.\n"
        assert os.listdir(tmp_path) == []
