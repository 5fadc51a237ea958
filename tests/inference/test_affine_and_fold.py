"""A folded batch norm gives the outputs of the one that was not: one layer, every kind of kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import oracle
from support.closeness import assert_close

from jbn import BNParams, BNState, bn_affine, bn_apply, bn_fold

C, EPS = 6, 1e-3
CONV = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
transposed = partial(lax.conv_transpose, strides=(2, 2), padding="SAME", dimension_numbers=NHWC)
# name: (shape of x, shape of the kernel, axis of the output features in the kernel and in y, the layer)
LAYERS = {
    "dense": ((5, 4), (4, C), -1, -1, jnp.matmul),
    "conv HWIO": ((2, 5, 5, 4), (3, 3, 4, C), -1, -1, partial(CONV, dimension_numbers=NHWC)),
    "conv OIHW": ((2, 4, 5, 5), (C, 4, 3, 3), 0, 1, partial(CONV, dimension_numbers=NCHW)),
    "grouped": ((2, 5, 5, 4), (3, 3, 2, C), 3, -1, partial(CONV, dimension_numbers=NHWC, feature_group_count=2)),
    "grouped OIHW": ((2, 4, 5, 5), (C, 2, 3, 3), -4, 1, partial(CONV, dimension_numbers=NCHW, feature_group_count=2)),
    "depthwise": ((2, 5, 5, 3), (3, 3, 1, C), -1, -1, partial(CONV, dimension_numbers=NHWC, feature_group_count=3)),
    "transposed": ((2, 3, 3, 4), (3, 3, 4, C), -1, -1, transposed),
    "transposed kernel": ((2, 3, 3, 4), (3, 3, C, 4), -2, -1, partial(transposed, transpose_kernel=True)),
    "transposed IOHW": (
        (2, 4, 3, 3),
        (4, C, 3, 3),
        1,
        1,
        partial(transposed, dimension_numbers=("NCHW", "IOHW", "NCHW")),
    ),
}


def layer(*members, gamma=True, beta=True, seed=0):
    """Params and state that are neither 0 nor 1, with a variance of 0 in one channel."""
    rng = np.random.default_rng(seed)
    g, b, mean, root = np.float32(rng.normal(size=(4, *members, C)))
    var = root**2 + np.float32(0.1)
    var[..., 1] = 0
    params = BNParams(jnp.asarray(g) if gamma else None, jnp.asarray(b) if beta else None)
    return params, BNState(jnp.asarray(mean), jnp.asarray(var), jnp.ones((*members, C), jnp.int32))


def normal(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_affine(params, state, eps):
    """(scale, shift) in float64, by the formula at 1 and at 0."""
    gamma, beta = (None if v is None else oracle.float64(v) for v in params)
    mean, var = oracle.float64(state.mean), oracle.float64(state.var)
    at = [
        oracle.normalize(np.full_like(mean, v), gamma, beta, mean, var, eps, axis=tuple(range(mean.ndim)))
        for v in (0, 1)
    ]
    return at[1] - at[0], at[0]


@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("members", [(), (3,)])
def test_the_affine_map_is_the_formula_of_inference(gamma, beta, members):
    params, state = layer(*members, gamma=gamma, beta=beta)
    for got, want in zip(bn_affine(params, state, eps=EPS), plain_affine(params, state, EPS), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_affine_map_is_float32_for_narrow_params(dtype):
    params, state = layer()
    narrow = jax.tree.map(lambda v: v.astype(dtype), params)
    for got, want in zip(bn_affine(narrow, state), plain_affine(narrow, state, 1e-5), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, want)


def test_with_64_bits_nothing_is_rounded_to_32():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        params = BNParams(*jnp.asarray(rng.normal(size=(2, C))))
        state = BNState(*jnp.asarray(rng.random((2, C))), jnp.ones(C, jnp.int32))
        kernel = jnp.asarray(rng.normal(size=(4, C)))
        scale, shift = plain_affine(params, state, 1e-5)
        for got, want in zip(bn_affine(params, state), (scale, shift), strict=True):
            assert got.dtype == jnp.float64
            assert_close(got, want)
        for got, want in zip(bn_fold(params, state, kernel), (oracle.float64(kernel) * scale, shift), strict=True):
            assert got.dtype == jnp.float64
            assert_close(got, want)
        narrow, _ = bn_fold(params, state, kernel.astype(jnp.float32))
        assert narrow.dtype == jnp.float32


@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_gives_the_outputs_of_the_layer_and_its_norm(name):
    x_shape, kernel_shape, kernel_axis, axis, forward = LAYERS[name]
    forward = jax.jit(forward)
    x, kernel = normal(*x_shape), normal(*kernel_shape, seed=2)
    y = oracle.float64(forward(x, kernel))
    for bias, options in ((normal(C), {}), (None, {}), (normal(C), {"gamma": False}), (None, {"beta": False})):
        params, state = layer(**options)
        given = 0 if bias is None else oracle.over(bias, y, axis)
        want = oracle.normalize(y + given, *params, *state[:2], EPS, axis)
        W, b = bn_fold(params, state, kernel, bias, eps=EPS, kernel_axis=kernel_axis)
        assert (W.shape, b.shape) == (kernel.shape, (C,))
        total = oracle.float64(forward(x, W)) + oracle.over(b, y, axis)
        assert_close(total, oracle.float64(want), roundings=64, computed_in=np.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_kernel_is_folded_in_float32_and_rounded_once(dtype):
    params, state = layer()
    kernel, bias = normal(4, C, dtype=dtype), normal(C, dtype=dtype)
    scale, shift = plain_affine(params, state, 1e-5)
    W, b = bn_fold(params, state, kernel, bias)
    assert W.dtype == b.dtype == dtype
    assert_close(W, oracle.float64(kernel) * scale, computed_in=jnp.float32)
    assert_close(b, oracle.float64(bias) * scale + shift, computed_in=jnp.float32)


def plain_fold(params, state, kernel, bias, eps):
    scale = params.gamma / jnp.sqrt(state.var + eps)
    return kernel * scale[None], (bias - state.mean) * scale + params.beta


def test_folding_works_under_jit_with_eps_traced_and_under_grad():
    params, state = layer()
    args = params, state, normal(4, C), normal(C), jnp.float32(EPS)

    def weighed(fold_fn, params, mean, var, kernel, bias, eps):
        W, b = fold_fn(params, BNState(mean, var, state.count), kernel, bias, eps=eps)
        return jnp.sum(jnp.sin(W)) + jnp.sum(jnp.cos(b))

    flat = params, state.mean, state.var, *args[2:]
    for got, want in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(partial(weighed, fn), argnums=range(6)))(*flat))
            for fn in (bn_fold, plain_fold)
        ),
        strict=True,
    ):
        assert_close(got, want, roundings=64)


def test_a_stack_of_layers_is_folded_by_vmap():
    (params, state), kernel, bias = layer(3), normal(3, 4, C), normal(3, C)
    stacked = jax.vmap(bn_fold)(params, state, kernel, bias)
    for i in range(3):
        alone = bn_fold(*jax.tree.map(lambda leaf: leaf[i], (params, state, kernel, bias)))  # noqa: B023
        for got, want in zip(stacked, alone, strict=True):
            assert_close(got[i], want)


def test_the_affine_map_is_what_evaluation_computes():
    params, state = layer()
    x = normal(7, C)
    scale, shift = bn_affine(params, state)
    assert_close(x * scale[None] + shift[None], bn_apply(params, state, x, train=False)[0])
