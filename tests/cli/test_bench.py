"""``jbn bench``: what it times is the same layer, its figures follow from the times, and bad input is one line."""

import io
import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.cli import main
from jbn.cli.bench import compare, contestants
from jbn.cli.bench.contestants import CONTESTANTS, IN_JAX, PASSES, Case, Contestant, Layer
from jbn.cli.bench.engine import interleave
from jbn.cli.bench.in_jax import jax_turn
from jbn.cli.bench.torch_process import torch_process

SMALL = ["bench", "--shape", "16,3,4", "--axis", "1", "--rounds", "7"]
TRAINING, EVALUATION = (Case((16, 3, 4), 1, "float32", mode) for mode in ("forward+backward", "evaluation"))
COMPARED = ("jbn", "linen")  # by `jbn bench`; the others, which are imported for it, by benchmarks/ alone


def rarely(names):
    return [name if name in COMPARED else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def not_installed(monkeypatch, *packages):
    found = contestants.find_spec
    monkeypatch.setattr(contestants, "find_spec", lambda name: None if name in packages else found(name))


@pytest.fixture
def without_torch(monkeypatch):
    """Its process takes seconds to start; also where it is installed."""
    not_installed(monkeypatch, "torch")


def reference(x, axis):
    """The plain formula in float64, with γ = 1 and β = 0."""
    x = np.asarray(x, np.float64)
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return (x - x.mean(others, keepdims=True)) / np.sqrt(x.var(others, keepdims=True) + 1e-5)


class TestContestants:
    @pytest.mark.parametrize("name", rarely(n for n in IN_JAX if not n.endswith(("_far", "_masked"))))
    def test_all_are_the_same_layer(self, name):
        pytest.importorskip(CONTESTANTS[name].package)
        build = CONTESTANTS[name].build
        x = 3 + 2 * jax.random.normal(jax.random.key(1), TRAINING.shape)
        layer = build(TRAINING, 0.0)
        y, state = layer.apply(layer.params, layer.state, x)
        np.testing.assert_allclose(y, reference(x, 1), atol=2e-5)
        np.testing.assert_allclose(layer.var(state).ravel(), np.var(x, (0, 2)), rtol=1e-4)
        np.testing.assert_array_equal([v.ravel() for v in layer.params_of(layer.params)], [[1] * 3, [0] * 3])
        layer = build(EVALUATION, 0.0)
        y, _ = layer.apply(layer.params, layer.state, x)
        np.testing.assert_allclose(y, np.asarray(x) / np.sqrt(1 + 1e-5), rtol=1e-6)

    @pytest.mark.parametrize("name", COMPARED)
    def test_all_keep_dtypes_and_move_their_running_statistics(self, name):
        x = jnp.ones((16, 3, 4), jnp.bfloat16).at[::2].set(3)
        layer = CONTESTANTS[name].build(TRAINING._replace(dtype="bfloat16"), 0.9)
        y, state = layer.apply(layer.params, layer.state, x)
        assert y.dtype == x.dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(layer.params)} == {jnp.dtype("float32")}
        assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, layer.state)), strict=True))

    @pytest.mark.parametrize("mode", PASSES)
    def test_a_turn_makes_every_call_that_it_is_said_to_make(self, mode, monkeypatch):
        """A layer that adds 1 for each call: nothing is hoisted, dropped or made twice."""
        seen = []

        def counting(case, momentum):
            def apply(params, state, x):
                jax.debug.callback(lambda: seen.append(mode))
                return x + 1, state

            return Layer(jnp.ones(3), jnp.ones(3), apply, lambda state: state)

        monkeypatch.setitem(CONTESTANTS, "counting", Contestant("counting", "jax", counting))
        turn = jax_turn("counting", TRAINING._replace(mode=mode, steps=5))
        assert turn(2) > 0
        turn(1)
        jax.effects_barrier()
        assert len(seen) == 15

    def test_a_copy_copies(self):
        turn = jax_turn("copy", TRAINING._replace(steps=3))
        turn(1)
        turn(2)


class TestFigures:
    def test_they_follow_from_the_times(self):
        seconds = {"jbn": [1.0, 2.0, 4.0], "linen": [2.0, 4.0, 4.0], "copy": [0.5, 1.0, 1.0]}
        rows = compare.summary(seconds, passes=8, nbytes=10**9)
        assert rows["linen"]["ms"] == 4000
        assert rows["linen"]["time_over_jbn"] == [1.5, 2.0, 2.0]  # of the rounds' ratios 2, 2, 1
        assert rows["jbn"]["time_over_jbn"] == [1, 1, 1]
        assert rows["jbn"]["gb_per_s"] == pytest.approx(4)  # 8 passes over 1 GB in 2 s
        assert rows["copy"]["gb_per_s"] == pytest.approx(2)
        assert rows["copy"]["share_of_copy"] == 1
        # 8, 4 and 2 GB/s where copies had 4, 2 and 2 in the same rounds.
        assert rows["jbn"]["share_of_copy"] == pytest.approx(2)
        assert rows["linen"]["seconds"] == seconds["linen"]

    def test_a_copy_too_short_to_measure_bandwidth_is_no_measure(self):
        rows = compare.summary({"jbn": [1.0], "copy": [1.0]}, passes=2, nbytes=1000)
        assert rows["jbn"]["share_of_copy"] is None
        assert rows["jbn"]["time_over_jbn"] == [1, 1, 1]


class TestRounds:
    """Contestants whose calls take a stated time, without anything being computed."""

    def measured(self, seconds, order, **options):
        def make(name):
            if seconds[name] is None:
                raise RuntimeError("RESOURCE_EXHAUSTED: no memory.\nDetails follow.")

            def turn(repeats):
                order.append(name)
                return repeats * 10 * seconds[name]

            return turn

        settings = {"rounds": 7, "turn_seconds": 0.02, "order": random.Random(0), "calls": 10} | options
        return interleave({name: partial(make, name) for name in seconds}, **settings)

    def test_all_take_one_turn_in_each_round_of_20_ms_or_more(self):
        order, told = [], []
        times = {"jbn": 1e-3, "linen": 2e-3, "copy": 1e-5}
        seconds, errors = self.measured(times, order, tell=told.append)
        turns = order[6:]  # behind two of each to warm up
        assert len(turns) == 21
        assert all(sorted(turns[i : i + 3]) == ["copy", "jbn", "linen"] for i in range(0, 21, 3))
        assert len({tuple(turns[i : i + 3]) for i in range(0, 21, 3)}) > 1  # in another order
        assert seconds == {name: [time] * 7 for name, time in times.items()}
        assert errors == {}
        assert told == [0] * 3 + [i for i in range(1, 8) for _ in range(3)]

    def test_a_turn_of_which_one_is_enough_is_not_repeated(self):
        order = []
        seconds, _ = self.measured({"jbn": 1e-6}, order, turn_seconds=0, rounds=2)
        assert seconds == {"jbn": [1e-6] * 2}
        assert len(order) == 3  # one to warm up

    def test_when_time_is_up_there_is_still_one_round(self):
        seconds, _ = self.measured({"jbn": 1.0, "copy": 1.0}, [], deadline=time.perf_counter() - 1)
        assert seconds == {"jbn": [1.0], "copy": [1.0]}

    def test_a_contestant_that_cannot_run_is_named_and_the_others_go_on(self):
        seconds, errors = self.measured({"jbn": 1.0, "linen": None, "copy": 1.0}, [])
        assert errors == {"linen": "RESOURCE_EXHAUSTED: no memory"}
        assert set(seconds) == {"jbn", "copy"}

    def test_an_error_that_none_is_expected_to_make_is_no_line(self):
        def make():
            raise TypeError("a bug")

        options = {"rounds": 1, "turn_seconds": 0, "order": random.Random(0)}
        assert interleave({"jbn": make}, **options) == ({}, {"jbn": "TypeError: a bug"})
        with pytest.raises(TypeError, match="a bug"):
            interleave({"jbn": make}, **options, expected=RuntimeError)


class TestRun:
    def test_prints_one_json_document(self, without_torch, capsys):
        assert main(SMALL) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        document = json.loads(printed.out)
        assert document["options"] == {"shape": [16, 3, 4], "dtype": "float32", "axis": 1, "rounds": 7, "json": False}
        assert document["skipped"] == {"torch": "torch is not installed"}
        assert {"jbn", "jax", "jaxlib", "flax", "python"} == set(document["versions"])
        assert list(document["modes"]) == ["forward", "forward+backward", "evaluation"]
        for mode in document["modes"].values():
            assert mode["errors"] == {}
            assert set(mode["contestants"]) == {"jbn", "linen", "copy"}
            assert mode["rounds"] == 7
            for row in mode["contestants"].values():
                assert len(row["seconds"]) == 7
                assert min(row["seconds"]) > 0
            assert mode["contestants"]["jbn"]["time_over_jbn"] == [1, 1, 1]

    def test_shows_a_table_on_a_terminal_and_names_who_is_missing(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        seconds = {"jbn": [1e-3] * 7, "copy": [5e-4] * 7}

        def measured(mode, names, options, *rest):
            assert names == ["jbn", "copy"]
            rows = compare.summary(seconds, PASSES[mode], options.nbytes)
            return {"passes": PASSES[mode], "rounds": 7, "contestants": rows, "errors": {}}

        monkeypatch.setattr(compare, "_measured", measured)
        not_installed(monkeypatch, "torch", "flax")
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        assert main(SMALL) == 0
        shown = terminal.getvalue()
        for text in (
            "Batch norm of 16×3×4 float32, axis 1",
            "forward+backward",
            "GB/s",
            "copy of x",
            "Skipped: flax.linen, flax is not installed.",
            "Skipped: torch, torch is not installed.",
            "To see them too: python -m pip install flax torch",
        ):
            assert text in shown
        with pytest.raises(json.JSONDecodeError):
            json.loads(shown)


FAKE_TORCH = {
    "that cannot be imported": ("raise ValueError('broken')", "ValueError: broken"),
    "that ends its process": ("import os; os._exit(3)", "its process ended with status 3"),
}


class TestTorch:
    @pytest.mark.parametrize(("code", "message"), FAKE_TORCH.values(), ids=FAKE_TORCH)
    def test_a_torch_that_fails_is_an_error_of_its_own(self, code, message, tmp_path, monkeypatch):
        (tmp_path / "torch.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with torch_process("cpu") as torch, pytest.raises(RuntimeError, match=message):
            torch.turn("torch", TRAINING)

    def test_its_process_ends_with_the_block(self):
        with torch_process("cpu") as torch:
            process = torch._process
            assert process.poll() is None
        assert process.poll() is not None

    def test_takes_turns(self):
        pytest.importorskip("torch")
        for tuned in (False, True):
            with torch_process("cpu", tuned=tuned) as torch:
                for mode in PASSES:
                    turn = torch.turn("torch", TRAINING._replace(mode=mode, steps=2))
                    assert 0 < turn(3) < 60


BAD_INPUT = {
    "--shape 32,a": "--shape: got '32,a'; expected widths of at least 1 between commas, one a dimension of x; "
    "as in --shape 32,56,56,64.",
    "--shape 4,0": "--shape: got '4,0'; expected widths of at least 1 between commas, one a dimension of x; "
    "as in --shape 32,56,56,64.",
    "--shape 4": "--shape: got 4 with --axis -1; expected at least 2 values in each channel, since the variance "
    "of one is 0; use a larger batch.",
    "--shape 1,8": "--shape: got 1,8 with --axis -1; expected at least 2 values in each channel, since the variance "
    "of one is 0; use a larger batch.",
    "--shape 4,8 --axis 2": "--axis: got 2 with --shape 4,8; expected -2 to 1; pass the axis of the features, "
    "as in --axis -1.",
    "--shape 4,8 --axis -3": "--axis: got -3 with --shape 4,8; expected -2 to 1; pass the axis of the features, "
    "as in --axis -1.",
    "--axis last": "--axis: got last; expected a whole number from -64 to 63; as in --axis -1.",
    "--dtype float64": "--dtype: got 'float64'; expected one of float32, bfloat16, float16; as in --dtype float32.",
    "--rounds 6": "--rounds: got 6; expected a whole number of at least 7; as in --rounds 11.",
}


class TestBadInput:
    @pytest.mark.parametrize("arguments", BAD_INPUT)
    def test_is_one_line_and_exit_code_2(self, arguments, capsys):
        assert main(["bench", *arguments.split()]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", f"jbn: {BAD_INPUT[arguments]}\n")

    def test_a_shape_beyond_memory_is_refused_before_anything_is_made(self, monkeypatch, capsys):
        monkeypatch.setattr(compare, "_free_memory", lambda device: 2**30)
        assert main(["bench", "--shape", "1048576,64"]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == (
            "jbn: --shape: got 1048576,64, which takes 4 GiB to compare; expected at most 1 GiB, what is free; "
            "use a smaller batch.\n"
        )

    def test_free_memory_is_found_where_the_system_tells(self):
        free = compare._free_memory(jax.devices()[0])
        assert free is None or 2**20 < free < 2**50

    def test_memory_that_runs_out_all_the_same_is_one_line(self, without_torch, monkeypatch, capsys):
        def build(case, momentum):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nand more")

        monkeypatch.setitem(CONTESTANTS, "jbn", CONTESTANTS["jbn"]._replace(build=build))
        assert main(SMALL) == 2
        assert capsys.readouterr().err == (
            "jbn: --shape: got 16,3,4; expected one that fits this device, which says of forward: "
            "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes; use a smaller batch.\n"
        )


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.processes
@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the scripts are not here")
class TestScripts:
    def script(self, name, *arguments):
        command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
        # They find each other in their own folder.
        left_out = ("PYTHONSAFEPATH", "JAX_ENABLE_X64")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_the_committed_median_is_that_of_the_committed_runs(self):
        results = BENCHMARKS / "results"
        files = [results / f"layer-2026-11-21{run}.json" for run in ("", "-run-2", "-run-3")]
        assert self.script("median.py", *files) == (results / "layer-2026-11-21-median.md").read_text()

    @pytest.mark.nightly
    @pytest.mark.parametrize("name", ["layer", "step", "costs", "accuracy", "fold"])
    def test_a_smoke_run_leaves_its_files(self, name, tmp_path):
        few = () if name == "fold" else ("--contestants", "jbn,linen")
        self.script(f"{name}.py", "--quick", "--out", tmp_path, *few)
        record = json.loads((tmp_path / f"{name}-quick.json").read_text())
        assert record["rows"]
        assert record["versions"]["jax"] in (tmp_path / f"{name}-quick.md").read_text()
