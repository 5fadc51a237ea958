"""What each framework stored and computed, from the files of golden/make.py: no framework is needed."""

from pathlib import Path

import jax
import numpy as np
import pytest
from support import golden
from support.beside_stock import bits

import jbn
from jbn import convert

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
MOMENTUM = 0.9
PLAIN = {"momentum": MOMENTUM, "debias": False, "unbiased": False}  # Flax's and Keras's rule
RULES = {
    "torch": {"momentum": MOMENTUM, "debias": False},
    "flax": PLAIN,
    "nnx": PLAIN,
    "keras": PLAIN,
    "haiku": {"momentum": MOMENTUM, "unbiased": False},
    "equinox_batch": {"momentum": MOMENTUM, "unbiased": False},
    "equinox_ema": {"momentum": MOMENTUM, "unbiased": False},
}


def as_haiku(arrays):
    modules = golden.nested(arrays, ":")
    return {"batch_norm": modules.pop("batch_norm")}, modules


def as_equinox(arrays):
    tree = golden.nested(arrays, "/")
    return {k: (v["0"], v["1"]) if isinstance(v, dict) else v for k, v in tree.items()}


READ = {
    "torch": (dict, convert.from_torch, convert.to_torch),
    "flax": (lambda a: golden.nested(a, "/"), convert.from_flax, convert.to_flax),
    "nnx": (dict, convert.from_nnx, convert.to_nnx),
    "keras": (dict, convert.from_keras, lambda p, s: convert.to_keras(p, s, "bn")),
    "haiku": (
        as_haiku,
        lambda v: convert.from_haiku(v, "batch_norm"),
        lambda p, s: convert.to_haiku(p, s, momentum=MOMENTUM),
    ),
    "equinox_batch": (
        as_equinox,
        lambda v: convert.from_equinox(v, momentum=MOMENTUM),
        lambda p, s: convert.to_equinox(p, s, momentum=MOMENTUM),
    ),
    "equinox_ema": (as_equinox, convert.from_equinox, lambda p, s: convert.to_equinox(p, s, mode="ema")),
}


@pytest.fixture(params=FILES)
def name(request):
    return request.param


def stored(name):
    """(variables before, variables after, all arrays of the file)."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    parts = [{k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)} for p in ("before:", "after:")]
    return *(READ[name][0](part) for part in parts), arrays


def test_there_is_a_file_for_each_format():
    assert set(FILES) == set(READ) == set(RULES)
    assert max((GOLDEN / f"{name}.npz").stat().st_size for name in FILES) < 8000


def test_evaluation_is_that_of_the_framework(name):
    before, _, arrays = stored(name)
    params, state = READ[name][1](before)
    y, _ = jbn.bn_apply(params, state, arrays["x"], train=False, eps=1e-3 if name == "keras" else 1e-5)
    np.testing.assert_allclose(y, arrays["y"], rtol=1e-6, atol=1e-6)


def test_the_next_batch_moves_the_statistics_as_there(name):
    before, after, arrays = stored(name)
    params, state = READ[name][1](before)
    _, stats = jbn.bn_apply(params, state, arrays["last"], train=True)
    state = jbn.bn_update_stats(state, stats, **RULES[name])
    expected = READ[name][1](after)[1]
    np.testing.assert_allclose(state.mean, expected.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state.var, expected.var, rtol=1e-6)
    np.testing.assert_array_equal(state.count, expected.count)


def test_a_layer_goes_back_as_it_was_stored(name):
    before, _, _ = stored(name)
    back = READ[name][2](*READ[name][1](before))
    if name not in ("haiku", "equinox_batch"):
        assert jax.tree.structure(back) == jax.tree.structure(before)
        assert bits(back) == bits(before)
        return
    assert jax.tree.structure(back) == jax.tree.structure(before)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(before), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(got, want, rtol=2e-7)  # hidden averages: another that reads the same
