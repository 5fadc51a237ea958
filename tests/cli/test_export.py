"""``jbn export``: any network of a run as one file for JAX or ONNX, in the units of the data."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.saved_runs import call, forward, images, standardized

from jbn import BNStats, normalize_inputs
from jbn.cli import main
from jbn.cli.models import load_model, save_model
from jbn.cli.network import NetworkSpec
from jbn.export import Array, describe
from jbn.networks import fold

MLP = NetworkSpec(inputs=48, hidden=(7, 5), classes=3, norm="a", activation="tanh")
RESNET = NetworkSpec("resnet", inputs=2, widths=(3,), blocks=1, classes=3, activation="relu")
IMAGES = images(0)["x"].astype(np.float32)


def saved(folder, spec):
    """The folder of a run on the images, with running statistics that are not those of the start."""
    options = {"data": None, "seed": 0, "batch_size": 16}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"options": options}))
    _, inputs = normalize_inputs(IMAGES)
    for name, each in {"with": spec, "without": replace(spec, norm="none")}.items():
        params, state = each.make().init(jax.random.key(0))
        state = jax.tree.map(lambda v: v + 0.5 if v.dtype == jnp.float32 else v, state)
        save_model(folder / f"{name}.safetensors", each, params, state, inputs)
    return folder


@pytest.fixture
def run(tmp_path):
    return saved(tmp_path / "run", MLP)


@pytest.fixture
def resnet_run(tmp_path):
    return saved(tmp_path / "resnet", RESNET)


def read(file):
    return export.deserialize(bytearray(file.read_bytes()))


def test_the_file_takes_the_data_as_they_are(run, capsys):
    printed = call(capsys, "export", run)
    _, params, state, inputs = load_model(run / "with.safetensors")
    x = images(3)["x"].astype(np.float32)
    wanted, _ = forward(params, state, standardized(x, inputs))
    got = read(run / "exported.jax").call(x.reshape(len(x), -1))
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    assert printed["out"] == str(run / "exported.jax")
    assert printed["x"] == {"shape": ["n", 48], "dtype": "float32"}
    assert (printed["format"], printed["classes"], printed["network"]) == ("jax.export", 3, "mlp_48_7_5_3")
    assert printed["platforms"] == ["cpu", "cuda", "tpu"]
    assert printed["bytes"] == (run / "exported.jax").stat().st_size
    assert printed["largest_difference"] < 1e-5 * max(printed["largest_output"], 1)
    said = describe((run / "exported.jax").read_bytes())
    assert said == ("mlp_48_7_5_3", Array(("n", 48), "float32"), Array(("n", 3), "float32"), ("cpu", "cuda", "tpu"))


def test_what_was_folded_is_exported_too(run, capsys):
    _, params, state, inputs = load_model(run / "with.safetensors")
    _, params = fold(MLP.make, params, state)
    save_model(run / "folded.safetensors", replace(MLP, norm="none"), params, [None] * 3, inputs)
    whole = call(capsys, "export", run)
    folded = call(capsys, "export", run, "--model", "folded.safetensors", "--out", run / "folded.jax")
    assert folded["bytes"] < whole["bytes"]
    x = images(3)["x"].astype(np.float32).reshape(60, -1)
    wanted = np.asarray(read(run / "exported.jax").call(x))
    np.testing.assert_allclose(read(run / "folded.jax").call(x), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_residual_network_takes_images_of_any_size(resnet_run, tmp_path, capsys):
    printed = call(capsys, "export", resnet_run, "--out", tmp_path / "network")
    assert printed["x"]["shape"] == ["n", "h", "w", 2]
    spec, params, state, inputs = load_model(resnet_run / "with.safetensors")
    network = spec.make()
    for shape in ((60, 6, 4, 2), (1, 8, 9, 2)):
        x = np.random.default_rng(0).normal(3, 1, shape).astype(np.float32)
        wanted, _ = network.apply(params, state, normalize_inputs(x, inputs)[0], train=False)
        np.testing.assert_allclose(read(tmp_path / "network").call(x), wanted, atol=1e-4)


def test_a_run_without_batch_norm_is_exported(run, tmp_path, capsys):
    named = call(capsys, "export", run, "--model", "without.safetensors", "--out", tmp_path / "named.jax")
    (run / "with.safetensors").unlink()
    found = call(capsys, "export", run, "--out", tmp_path / "found.jax")
    assert named["model"] == found["model"] == "without.safetensors"
    x = IMAGES.reshape(60, -1)
    np.testing.assert_array_equal(*(read(tmp_path / f"{name}.jax").call(x) for name in ("named", "found")))


@pytest.fixture
def clock_run(run, monkeypatch):
    """A run on seconds since 1970, whose statistics are known in float64."""
    import jbn.cli.runs

    spec = NetworkSpec(inputs=2, hidden=(4,), classes=3, norm="z", activation="tanh")
    params, state = spec.make().init(jax.random.key(0))
    x = np.random.default_rng(0).uniform(1.7e9, 1.7e9 + 60, (30, 2))
    inputs = BNStats(x.mean(0), x.var(0), np.full(2, 30, np.float32))
    save_model(run / "clock.safetensors", spec, params, state, BNStats(*map(np.float32, inputs)))
    monkeypatch.setattr(jbn.cli.runs, "load_model", lambda file: (spec, params, state, inputs))
    return run, x, spec.make().apply(params, state, jnp.float32((x - x.mean(0)) / x.std(0)), train=False)[0]


def test_data_that_float32_would_lose_are_taken_in_float64(clock_run, capsys):
    run, x, wanted = clock_run
    printed = call(capsys, "export", run, "--model", "clock.safetensors")
    assert printed["x"] == {"shape": ["n", 2], "dtype": "float64"}
    assert printed["largest_difference"] < 1e-5
    with jax.enable_x64(True):
        np.testing.assert_allclose(read(run / "exported.jax").call(x), wanted, atol=1e-5)


READER = """
import sys
for name in ("jbn", "optax", "typer", "safetensors"):
    sys.modules[name] = None  # an import of it fails
import jax, jax.export, numpy as np
x = np.load(sys.argv[2])
np.save(sys.argv[3], jax.export.deserialize(open(sys.argv[1], "rb").read()).call(x))
"""


@pytest.mark.processes
def test_a_process_without_jbn_runs_the_file(run, capsys, tmp_path):
    call(capsys, "export", run, "--out", tmp_path / "network.jax")
    x = images(3)["x"].astype(np.float32).reshape(60, -1)
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("network.jax", "x.npy", "y.npy")]
    done = subprocess.run([sys.executable, "-c", READER, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), read(tmp_path / "network.jax").call(x), atol=1e-6)


def test_a_suffix_asks_for_onnx(run, capsys):
    pytest.importorskip("jax2onnx", reason="needs what converts to ONNX: pip install 'jbn[onnx]'")
    if tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12):
        pytest.skip(f"jax2onnx does not work with JAX {jax.__version__}")
    runtime = pytest.importorskip("onnxruntime", reason="needs what runs ONNX: pip install 'jbn[onnx]'")
    printed = call(capsys, "export", run, "--out", run / "network.onnx")
    assert (printed["format"], printed["platforms"]) == ("onnx", None)
    call(capsys, "export", run)
    x = images(3)["x"].astype(np.float32).reshape(60, -1)
    (got,) = runtime.InferenceSession(run / "network.onnx").run(None, {"x": x})
    wanted = np.asarray(read(run / "exported.jax").call(x))
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_terminal_is_told_how_to_run_it(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["export", str(run)]) == 0
    file = str(run / "exported.jax")
    for text in (
        "exported for JAX on cpu, cuda, tpu, input normalization inside",
        "Takes x of shape (n, 48) as float32, as the data were; gives 3 values for each example",
        f"To run it, with jax, flatbuffers: jax.export.deserialize(open({file!r}, 'rb').read()).call(x)\n",
    ):
        assert text in terminal.getvalue()


class TestBadInput:
    def refused(self, capsys, *arguments):
        folder = arguments[0]
        before = set(folder.rglob("*"))
        assert main(["export", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert set(folder.rglob("*")) == before
        return printed.err[5:-1]

    def test_nothing_is_overwritten(self, run, capsys):
        message = self.refused(capsys, run, "--out", run / "with.safetensors")
        assert message.startswith(f"--out: got {run / 'with.safetensors'}, which exists already; expected a new file")

    def test_no_such_model(self, run, capsys):
        assert self.refused(capsys, run, "--model", "no.safetensors").startswith("--model: got no no.safetensors in ")

    def test_without_flatbuffers(self, run, capsys, monkeypatch):
        monkeypatch.setattr("jbn.cli.export.find_spec", lambda name: None)
        assert self.refused(capsys, run) == (
            "extra 'demo': got no module flatbuffers; expected what jax.export writes with; install it with: "
            "pip install flatbuffers"
        )

    def test_onnx_without_what_writes_it(self, run, capsys, monkeypatch):
        monkeypatch.setattr("jbn.cli.export.find_spec", lambda name: None)
        out = run / "a.onnx"
        assert self.refused(capsys, run, "--out", out) == (
            f"--out: got {out} without the package jax2onnx and onnxruntime; expected what writes and checks "
            f"ONNX; install it with pip install 'jbn[onnx]', or choose another suffix, as in --out network.jax."
        )

    def test_onnx_of_what_it_has_no_arithmetic_for(self, run, clock_run, capsys, monkeypatch):
        monkeypatch.setattr("jbn.cli.export.find_spec", lambda name: name)
        message = self.refused(capsys, run, "--out", run / "a.onnx")
        assert message.startswith(
            f"--out: got {run / 'a.onnx'} for data that float32 cannot tell apart, so far is their"
        )
        spec, *arrays = load_model(run / "with.safetensors")
        monkeypatch.setattr("jbn.cli.runs.load_model", lambda file: (replace(spec, dtype="bfloat16"), *arrays))
        message = self.refused(capsys, run, "--out", run / "a.onnx")
        assert "for a network that computes in bfloat16; expected float32, since runtimes for ONNX lack" in message

    def test_an_onnx_file_whose_outputs_differ_is_not_written(self, run, capsys, monkeypatch):
        monkeypatch.setattr("jbn.cli.export.find_spec", lambda name: name)
        monkeypatch.setattr("jbn.cli.export.to_onnx", lambda *arguments, **options: b"")
        monkeypatch.setattr("jbn.cli.export._call_onnx", lambda data, x: np.full((len(x), 3), 100.0))
        message = self.refused(capsys, run, "--out", run / "a.onnx")
        assert "got outputs from onnxruntime that differ by " in message

    def test_what_the_converter_cannot_do_is_one_line(self, run, capsys, monkeypatch):
        def fail(*arguments, **options):
            raise ValueError("apply_fn: got one that it does not convert; use to_stablehlo.")

        monkeypatch.setattr("jbn.cli.export.find_spec", lambda name: name)
        monkeypatch.setattr("jbn.cli.export.to_onnx", fail)
        message = self.refused(capsys, run, "--out", run / "a.onnx")
        assert message == f"{run / 'with.safetensors'}: apply_fn: got one that it does not convert; use to_stablehlo."
