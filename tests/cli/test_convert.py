"""``jbn convert``: a file of weights with another framework's names; what cannot be converted is one line."""

import io
import json
import os
import struct
import sys

import jax
import numpy as np
import pytest
from support import saved_runs
from support.saved_runs import call

from jbn import BNStats
from jbn.cli import main
from jbn.cli.models import load_model, save_model
from jbn.cli.network import NetworkSpec
from jbn.convert import read_file, write_file

STATE_DICT = {
    "conv1.weight": np.arange(24, dtype=np.float32).reshape(4, 3, 2, 1),
    "bn1.weight": np.arange(4, dtype=np.float32),
    "bn1.bias": np.ones(4, np.float32),
    "bn1.running_mean": np.arange(4, dtype=np.float32),
    "bn1.running_var": np.full(4, 2, np.float32),
    "bn1.num_batches_tracked": np.array(5, np.int64),
    "fc.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
    "fc.bias": np.ones(2, np.float32),
}


@pytest.fixture
def state_dict(tmp_path):
    file = tmp_path / "torch.safetensors"
    write_file(file, STATE_DICT, {"format": "pt"})
    return file


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].tobytes()) == (array.dtype, array.tobytes()), name


def test_a_state_dict_opens_as_variables_of_flax_and_comes_back(state_dict, tmp_path, capsys):
    printed = call(capsys, "convert", state_dict, tmp_path / "flax.safetensors")
    assert printed["source"] == {"file": str(state_dict), "pattern": "torch"}
    assert printed["target"] == {"file": str(tmp_path / "flax.safetensors"), "pattern": "flax"}
    assert printed["found"] == {"convolution": 1, "batch norm": 1, "dense": 1}
    moved = {"from": "conv1.weight", "to": "params/conv1/kernel", "kind": "convolution", "layout": "OIHW → HWIO"}
    assert {**moved, "shape": [2, 1, 3, 4]} in printed["arrays"]
    arrays, metadata = read_file(tmp_path / "flax.safetensors")
    assert metadata == {"format": "flax"}
    np.testing.assert_array_equal(arrays["params/conv1/kernel"], STATE_DICT["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(arrays["params/fc/kernel"], STATE_DICT["fc.weight"].T)
    call(capsys, "convert", tmp_path / "flax.safetensors", tmp_path / "again.safetensors")
    arrays, metadata = read_file(tmp_path / "again.safetensors")
    same(arrays, STATE_DICT)
    assert metadata == {"format": "pt"}


def test_a_model_of_a_run_goes_through_all_and_is_the_same(tmp_path, capsys):
    spec = NetworkSpec(inputs=4, hidden=(6,), classes=3, norm="z", activation="relu")
    params, state = spec.make().init(jax.random.key(0))
    model = tmp_path / "with.safetensors"
    save_model(model, spec, params, state, BNStats(*np.ones((3, 4), np.float32)))
    steps = ("torch.npz", "torch"), ("flax.npz", "flax"), ("jbn.safetensors", "jbn")
    last = model
    for name, pattern in steps:
        printed = call(capsys, "convert", last, tmp_path / name, "--to", pattern)
        assert printed["target"]["pattern"] == pattern
        last = tmp_path / name
    same(read_file(last)[0], read_file(model)[0])
    assert load_model(last)[0] == load_model(model)[0]
    assert "0.bn.running_mean" in read_file(tmp_path / "torch.npz")[0]


def test_names_may_stay_and_the_file_change(state_dict, tmp_path, capsys):
    call(capsys, "convert", state_dict, tmp_path / "same.npz", "--from", "torch", "--to", "torch")
    with np.load(tmp_path / "same.npz") as archive:
        same({name: archive[name] for name in STATE_DICT}, STATE_DICT)


def test_a_terminal_gets_a_table(state_dict, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["convert", str(state_dict), str(tmp_path / "flax.npz")]) == 0
    for text in ("conv1.weight", "params/conv1/kernel", "OIHW → HWIO", "(2, 1, 3, 4)", "batch norm"):
        assert text in terminal.getvalue()
    written = f"8 arrays (1 batch norm, 1 convolution, 1 dense) written to {tmp_path / 'flax.npz'}\n"
    assert terminal.getvalue().endswith(written)


def header(text, data=b"\0" * 8):
    encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(shape):
    return {"x.weight": {"dtype": "F64", "shape": shape, "data_offsets": [0, 8]}}


BAD = {
    "a header longer than the file": (
        struct.pack("<Q", 2**40) + b"{}",
        "damaged or no .safetensors file (a header",
    ),
    "shapes that overflow": (header(entry([2**40, 2**40])), "'x.weight' of shape [1099511627776, 1099511627776] does"),
    "nested metadata": (header({"__metadata__": {"a": {}}, **entry([1])}), "metadata that are not texts by name"),
    "depth": (header(b"[" * 10**6), "a header nested too deeply"),
    "pickle": (b"\x80\x04\x95", "(3 bytes)"),
}


class TestBadInput:
    def refused(self, capsys, folder, *arguments):
        return saved_runs.refused(capsys, folder, "convert", *arguments)

    @pytest.mark.parametrize("case", BAD)
    def test_damaged_and_hostile_files(self, case, tmp_path, capsys):
        (tmp_path / "a.safetensors").write_bytes(BAD[case][0])
        message = self.refused(capsys, tmp_path, tmp_path / "a.safetensors", tmp_path / "b.npz")
        assert message.startswith(f"SRC: got {tmp_path / 'a.safetensors'}, which is damaged")
        assert BAD[case][1] in message

    def test_object_arrays_and_half_a_zip(self, tmp_path, capsys):
        np.savez(tmp_path / "a.npz", x=np.array([{}], object))
        message = self.refused(capsys, tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
        assert message.startswith(f"SRC: got 'x' in {tmp_path / 'a.npz'}, which holds pickled objects; expected an")
        (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:99])
        message = self.refused(capsys, tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
        assert message.startswith(f"SRC: got {tmp_path / 'a.npz'}, which is damaged or no .npz file (File is not a zip")

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("bn1.running_var", [1, 1, -3, 1], "got -3; expected variances of 0 or more; look for damage to the file"),
            ("fc.bias", [1, np.nan], "got 1 of 2 values that are NaN or infinite; expected finite numbers; take"),
        ],
    )
    def test_numbers_that_cannot_be(self, name, value, reason, tmp_path, capsys):
        write_file(tmp_path / "a.npz", {**STATE_DICT, name: np.float32(value)})
        message = self.refused(capsys, tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
        assert message.startswith(f"{tmp_path / 'a.npz'}: arrays['{name}']: {reason}")

    def test_nothing_is_overwritten(self, state_dict, tmp_path, capsys):
        taken = f"DST: got {state_dict}, which exists already; expected a new file, so that nothing is lost; choose"
        assert self.refused(capsys, tmp_path, state_dict, state_dict).startswith(taken)

    def test_places_that_are_none(self, state_dict, tmp_path, capsys):
        message = self.refused(capsys, tmp_path, tmp_path / "none.npz", tmp_path / "b.npz")
        assert message.startswith(f"SRC: got {tmp_path / 'none.npz'} (No such file or directory); expected a file that")
        message = self.refused(capsys, tmp_path, state_dict, tmp_path / "no" / "b.npz")
        assert message.startswith(f"DST: got {tmp_path / 'no' / 'b.npz'} (No such file or directory); expected a new")

    def test_other_suffixes(self, state_dict, tmp_path, capsys):
        for arguments, name in (
            ((tmp_path / "a.pt", tmp_path / "b.npz"), "SRC"),
            ((state_dict, tmp_path / "b"), "DST"),
        ):
            message = self.refused(capsys, tmp_path, *arguments)
            assert message.startswith(f"{name}: got {arguments[name == 'DST']}; expected a name that ends in .safetens")

    def test_patterns(self, state_dict, tmp_path, capsys):
        message = self.refused(capsys, tmp_path, state_dict, tmp_path / "b.npz", "--to", "keras")
        assert message == "--to: got 'keras'; expected one of torch, flax, jbn; choose one of them."
        write_file(tmp_path / "a.npz", {"x": np.ones(2)})
        message = self.refused(capsys, tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
        assert message.startswith("--from: got None for 'x'; expected names that are clearly those of one of")

    def test_what_an_npz_cannot_hold(self, tmp_path, capsys):
        import jax.numpy as jnp

        write_file(tmp_path / "a.safetensors", {"fc.weight": jnp.ones((2, 2), jnp.bfloat16)})
        message = self.refused(capsys, tmp_path, tmp_path / "a.safetensors", tmp_path / "b.npz")
        assert message.startswith(f"{tmp_path / 'b.npz'}: arrays['params/fc/kernel']: got dtype bfloat16; expected one")
        assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]
