"""Model files: what is read equals what was written, in the same bytes each time, under names that can be told."""

import jax
import numpy as np

import jbn
from jbn.cli.models import load_model, save_model
from jbn.cli.network import NetworkSpec


def test_a_model_reloads_to_equal_arrays(tmp_path):
    spec = NetworkSpec(inputs=3, hidden=(4,), classes=2, norm="z", activation="tanh", dtype="bfloat16")
    params, state = spec.make().init(jax.random.key(5))
    _, inputs = jbn.normalize_inputs(np.eye(3, dtype=np.float32))
    save_model(tmp_path / "m.safetensors", spec, params, state, inputs)
    again = load_model(tmp_path / "m.safetensors")
    assert again[0] == spec
    for before, after in zip((params, state, inputs), again[1:], strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_model_files_of_identical_runs_are_the_same_bytes(tmp_path):
    """Some tens of writes: the order of metadata was drawn anew for each."""
    spec = NetworkSpec(inputs=3, hidden=(4,), classes=2, norm="z", activation="tanh")
    params, state = spec.make().init(jax.random.key(5))
    written = set()
    for _ in range(20):
        save_model(tmp_path / "m", spec, params, state, jbn.BNStats(*np.zeros((3, 3))))
        written.add((tmp_path / "m").read_bytes())
    assert len(written) == 1


def test_model_files_name_their_arrays(tmp_path):
    from safetensors.numpy import load_file

    spec = NetworkSpec(inputs=3, hidden=(4,), classes=2, norm="z", activation="tanh")
    params, state = spec.make().init(jax.random.key(5))
    save_model(tmp_path / "m.safetensors", spec, params, state, jbn.BNStats(*np.zeros((3, 3), np.float32)))
    assert sorted(load_file(tmp_path / "m.safetensors")) == [
        "inputs/count",
        "inputs/mean",
        "inputs/var",
        "params/0/W",
        "params/0/b",
        "params/0/bn/beta",
        "params/0/bn/gamma",
        "params/1/W",
        "params/1/b",
        "state/0/count",
        "state/0/mean",
        "state/0/var",
    ]
