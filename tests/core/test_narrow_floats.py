"""Floats of 4 and 8 bits are normalized as the values that they hold; those that can only be stored are refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jbn import bn_apply, bn_fold, bn_init, normalize_inputs
from jbn.networks import mlp

C = 3
PARAMS, STATE = bn_init(C)
NARROW = [
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]
STORED = ["float6_e2m3fn", "float6_e3m2fn", "float8_e8m0fnu"]


def data(dtype):
    return jnp.asarray(2 * np.random.default_rng(0).normal(size=(8, C)), jnp.float32).astype(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_what_is_computed_is_that_of_float32_and_only_y_is_rounded(dtype, masked, train):
    x = data(dtype)
    mask = jnp.arange(8)[:, None] > 2 if masked else None
    y, stats = bn_apply(PARAMS, STATE, x, train=train, mask=mask)
    want, exact = bn_apply(PARAMS, STATE, x.astype(jnp.float32), train=train, mask=mask)
    assert y.dtype == x.dtype
    apart = np.abs(np.asarray(y).astype(np.float32) - np.asarray(want))
    eps, least = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal)
    assert np.all(apart <= eps / 2 * np.abs(want) * 1.001 + least)
    for got, wanted in zip(stats, exact, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", STORED)
def test_floats_that_can_only_be_stored_are_refused_in_one_line(dtype):
    x = np.ones((4, C), getattr(ml_dtypes, dtype))
    end = "expected a real floating-point array; convert it with {}.astype(jnp.float32)."
    calls = [
        ("x", lambda: bn_apply(PARAMS, STATE, x, train=True)),
        ("x", lambda: bn_apply(PARAMS, STATE, x, train=False, mask=np.ones((4, 1), bool))),
        ("x", lambda: normalize_inputs(x)),
        ("x", lambda: mlp((C, 4, 2)).apply(*mlp((C, 4, 2)).init(jax.random.key(0)), x, train=True)),
        ("kernel", lambda: bn_fold(PARAMS, STATE, x)),
    ]
    for name, call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == f"{name}: got dtype {dtype}, a storage format; {end.format(name)}"


@pytest.mark.parametrize("dtype", STORED)
def test_params_and_networks_of_such_floats_are_refused(dtype):
    for make in (lambda given: bn_init(C, dtype=given), lambda given: mlp((C, 2), dtype=given)):
        with pytest.raises(TypeError) as caught:
            make(getattr(ml_dtypes, dtype))
        assert str(caught.value) == (
            f"dtype: got {dtype}, a storage format; expected a floating-point dtype; pass jnp.float32."
        )
