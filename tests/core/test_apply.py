"""`bn_init` and `bn_apply`: values against the plain formula over layouts, dtypes and options."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, bits
from support.problems import pose

from jbn import BNParams, BNState, bn_apply, bn_init, bn_update_stats

X64 = jax.config.jax_enable_x64
DTYPES = ["float16", "bfloat16", "float32"] + ["float64"] * X64
WIDEST = "float64" if X64 else "float32"
# (shape, axis): what people feed it, and what they might.
LAYOUTS = {
    "NC": ((6, 5), -1),
    "CN": ((5, 6), 0),
    "NHWC": ((4, 3, 2, 5), -1),
    "NCHW": ((4, 5, 3, 2), 1),
    "NLC": ((3, 4, 5), 2),
    "two last axes": ((6, 3, 5), (1, -1)),
    "two axes, unordered": ((4, 5, 2, 3), (-1, 1)),
    "first and last axis": ((2, 4, 3, 5), (0, 3)),
    "three axes": ((6, 2, 3, 2), (1, 2, 3)),
}
layouts = pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS.keys())
both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def features(shape, axis):
    return tuple(shape[a] for a in oracle.feature_axes(axis, len(shape)))


def case(shape, axis, dtype="float32"):
    return pose(shape, axis, dtype=dtype)[:3]


def wide(dtype):
    return "float64" if dtype == "float64" else "float32"


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_normalizes_by_the_moments_of_the_batch(shape, axis, dtype):
    params, state, x = case(shape, axis, dtype)
    y, stats = bn_apply(params, state, x, train=True, axis=axis)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert (stats.mean.dtype, stats.var.dtype, stats.count.dtype) == (wide(dtype), wide(dtype), "float32")
    expected = oracle.moments(x, axis)
    for got, want in zip(stats, expected, strict=True):
        assert_close(got, want)
    assert_close(y, oracle.batch_norm(x, *params, axis=axis))


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_normalizes_by_the_state_and_observes_nothing(shape, axis, dtype):
    params, state, x = case(shape, axis, dtype)
    y, stats = bn_apply(params, state, x, train=False, axis=axis)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert_close(y, oracle.normalize(x, *params, state.mean, state.var, axis=axis))
    assert bits(stats.mean) == bits(state.mean)
    assert bits(stats.var) == bits(state.var)
    assert bits(stats.count) == bits(np.zeros(features(shape, axis), np.float32))
    after = bn_update_stats(state, stats)
    assert [bits(leaf) for leaf in after] == [bits(leaf) for leaf in state]


@both_modes
@pytest.mark.parametrize(("use_gamma", "use_beta"), [(True, False), (False, True), (False, False)])
def test_gamma_and_beta_left_out_are_one_and_zero(use_gamma, use_beta, train):
    given, state, x = case((6, 5), -1)
    params = BNParams(given.gamma if use_gamma else None, given.beta if use_beta else None)
    y, _ = bn_apply(params, state, x, train=train)
    mean, var = oracle.moments(x)[:2] if train else state[:2]
    assert_close(y, oracle.normalize(x, *params, mean, var))


@both_modes
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", DTYPES)
def test_any_float_parameters_meet_any_float_input_and_its_dtype_comes_back(x_dtype, param_dtype, train):
    params, state, x = case((8, 3), -1, x_dtype)
    params = BNParams(*(jnp.asarray(leaf, param_dtype) for leaf in params))
    state = BNState(*(jnp.asarray(leaf, wide(param_dtype)) for leaf in state[:2]), state.count)
    y, stats = bn_apply(params, state, x, train=train)
    assert (y.dtype, stats.mean.dtype, stats.var.dtype) == (x_dtype, wide(x_dtype), wide(x_dtype))
    mean, var = oracle.moments(x)[:2] if train else state[:2]
    assert_close(y, oracle.normalize(x, *params, mean, var))


MASK_SHAPES = [tuple(sizes) for sizes in itertools.product((1, 4), (1, 3), (1, 2), (1, 5))]


@pytest.mark.parametrize("mask_shape", MASK_SHAPES, ids=str)
def test_a_mask_selects_what_moves_the_statistics(mask_shape):
    params, state, x = case((4, 3, 2, 5), -1)
    mask = np.random.default_rng(1).uniform(size=mask_shape) < 0.6
    y, stats = bn_apply(params, state, x, train=True, mask=jnp.asarray(mask))
    for got, want in zip(stats, oracle.moments(x, -1, mask), strict=True):
        assert_close(got, want)
    assert_close(y, oracle.batch_norm(x, *params, mask=mask))


@layouts
def test_a_full_mask_works_in_every_layout(shape, axis):
    params, state, x = case(shape, axis)
    mask = np.random.default_rng(1).uniform(size=shape) < 0.7
    y, stats = bn_apply(params, state, x, train=True, axis=axis, mask=jnp.asarray(mask))
    for got, want in zip(stats, oracle.moments(x, axis, mask), strict=True):
        assert_close(got, want)
    assert_close(y, oracle.batch_norm(x, *params, axis=axis, mask=mask))


@both_modes
def test_a_mask_of_ones_is_no_mask(train):
    params, state, x = case((6, 5), -1)
    y, stats = bn_apply(params, state, x, train=train, mask=jnp.ones((1, 1), bool))
    plain, plain_stats = bn_apply(params, state, x, train=train)
    assert_close(y, plain)
    for got, want in zip(stats, plain_stats, strict=True):
        assert_close(got, want)


@both_modes
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0, 100])
def test_eps_is_added_to_the_variance_and_may_be_traced(eps, train):
    params, state, x = case((6, 5), -1)
    mean, var = oracle.moments(x)[:2] if train else state[:2]
    expected = oracle.normalize(x, *params, mean, var, eps)
    assert_close(bn_apply(params, state, x, train=train, eps=eps)[0], expected)
    traced = jax.jit(lambda e: bn_apply(params, state, x, train=train, eps=e)[0])(eps)
    assert_close(traced, expected)


@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (-1, 1), [1, 2], (-2, -1)], ids=str)
def test_feature_axes_are_a_set_and_features_ascend(axes):
    params, state, x = case((6, 3, 5), (1, 2))
    y, stats = bn_apply(params, state, x, train=True, axis=axes)
    assert stats.mean.shape == (3, 5)
    assert_close(y, oracle.batch_norm(x, *params, axis=(1, 2)))


def test_training_needs_no_state():
    params, state, x = case((6, 5), -1)
    with_state, without = (bn_apply(params, s, x, train=True) for s in (state, None))
    assert list(map(bits, jax.tree.leaves(with_state))) == list(map(bits, jax.tree.leaves(without)))


@both_modes
@pytest.mark.parametrize("convert", [lambda a: a.tolist(), np.asarray], ids=["list", "numpy"])
def test_lists_and_numpy_arrays_are_arrays(convert, train):
    params, state, x = case((6, 5), -1, WIDEST)
    mask = np.arange(6)[:, None] < 4
    y, stats = bn_apply(params, state, convert(x), train=train, mask=convert(mask))
    assert y.dtype == WIDEST
    mean, var = oracle.moments(x, mask=mask)[:2] if train else state[:2]
    assert_close(y, oracle.normalize(x, *params, mean, var), computed_in=np.float32)
    assert all(isinstance(leaf, jax.Array) for leaf in (y, *stats))


def test_state_and_parameters_may_be_numpy():
    params, state, x = case((6, 5), -1)
    host = jax.tree.map(np.asarray, (params, state))
    for train in (True, False):
        y, stats = bn_apply(*host, x, train=train)
        assert bits(y) == bits(bn_apply(params, state, x, train=train)[0])
    assert isinstance(bn_update_stats(host[1], stats), BNState)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 2, 5), (4, 0, 2, 5)], ids=str)
@both_modes
def test_an_empty_batch_is_nothing_seen(shape, train):
    params, state, _ = case((6, 5), -1)
    x = jnp.zeros(shape, jnp.float32)
    y, stats = bn_apply(params, state, x, train=train)
    assert y.shape == shape
    if train:
        assert all(not leaf.any() for leaf in stats)
    assert all(np.array_equal(a, b) for a, b in zip(bn_update_stats(state, stats), state, strict=True))
    grads = jax.grad(lambda p: bn_apply(p, state, x, train=train)[0].sum())(params)
    assert all(not leaf.any() for leaf in grads)


def test_an_empty_mask_is_nothing_seen_and_outputs_and_gradients_stay_finite():
    params, state, x = case((6, 5), -1)
    mask = jnp.zeros((6, 1), bool)

    def loss(params, x):
        y, stats = bn_apply(params, state, x, train=True, mask=mask)
        return (y**2).sum() + stats.mean.sum() + stats.var.sum(), (y, stats)

    grads, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    assert all(not leaf.any() for leaf in stats)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, grads)))


def test_a_channel_that_is_masked_out_alone_sees_nothing_alone():
    params, state, x = case((6, 5), -1)
    mask = jnp.array([[True, True, False, True, True]])
    _, stats = bn_apply(params, state, x, train=True, mask=mask)
    for got, want in zip(stats, oracle.moments(x, mask=mask), strict=True):
        assert_close(got, want)
    assert (stats.mean[2], stats.var[2], stats.count[2]) == (0, 0, 0)


BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@both_modes
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_masked_value_that_is_not_finite_gives_beta_and_moves_nothing(dtype, train):
    params, state, x = case((6, 5), -1, dtype)
    keep = np.array([1, 1, 0, 1, 1, 0], bool)

    @jax.jit
    def run(x):
        def loss(params, state, x, eps):
            mask = jnp.asarray(keep)[:, None]
            y, stats = bn_apply(params, state, x, train=train, eps=eps, mask=mask)
            seen = jnp.where(mask, y, 0).astype(jnp.float32)
            return jnp.sum(jnp.sin(seen)) + stats.mean.sum() + stats.var.sum(), (y, stats)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True, allow_int=True)(params, state, x, 1e-5)

    (value, (y, stats)), grads = run(x.at[~keep].set(0))
    for bad in BAD.values():
        (bad_value, (bad_y, bad_stats)), bad_grads = run(x.at[~keep].set(bad))
        np.testing.assert_array_equal(bad_y[keep], y[keep])
        np.testing.assert_array_equal(bad_y[~keep], np.broadcast_to(params.beta.astype(dtype), (2, 5)))
        for got, want in zip(
            jax.tree.leaves((bad_value, bad_stats, bad_grads)),
            jax.tree.leaves((value, stats, grads)),
            strict=True,
        ):
            assert bits(got) == bits(want)


@both_modes
def test_a_masked_value_whose_normalized_value_overflows_gives_beta_and_moves_nothing(train):
    params, _, x = case((6, 5), -1)
    x = x * 1e-3
    state = BNState(jnp.zeros(5), jnp.zeros(5), jnp.ones(5, jnp.int32))  # r = 1/√ε ≈ 316: 3e38·r overflows
    keep = np.arange(6)[:, None] != 2
    spoiled = jnp.where(keep, x, 3e38)

    def loss(params, x):
        y, _ = bn_apply(params, state, x, train=train, mask=jnp.asarray(keep))
        return jnp.sum(jnp.where(keep, y, 0) ** 2), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, spoiled)
    (_, _), want = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, jnp.where(keep, x, 0))
    np.testing.assert_array_equal(y[2], params.beta)
    assert list(map(bits, jax.tree.leaves(grads))) == list(map(bits, jax.tree.leaves(want)))


def test_finite_masked_outputs_are_normalized_like_the_others_and_so_are_their_gradients():
    params, state, x = case((6, 5), -1)
    mask = np.random.default_rng(2).uniform(size=(6, 5)) < 0.6
    g = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)

    def loss(params, x, eps):
        return jnp.vdot(bn_apply(params, state, x, train=True, eps=eps, mask=jnp.asarray(mask))[0], g)

    (gamma, beta), dx, eps = jax.grad(loss, (0, 1, 2))(params, x, 1e-2)
    want = oracle.gradients(x, g, params.gamma, 1e-2, mask=mask)
    for got, expected in zip((dx, gamma, beta, eps), want, strict=True):
        assert_close(got, expected, roundings=64, computed_in=np.float32)


@pytest.mark.parametrize("layout", ["NC", "NHWC", "NCHW", "first and last axis"])
def test_gradients_flow_through_y_and_through_the_statistics(layout):
    shape, axis = LAYOUTS[layout]
    params, state, x = case(shape, axis)
    rng = np.random.default_rng(4)
    g, g_mean, g_var = (
        rng.normal(size=s).astype(np.float32) for s in (shape, features(shape, axis), features(shape, axis))
    )

    def loss(params, x, eps):
        y, stats = bn_apply(params, state, x, train=True, axis=axis, eps=eps)
        return jnp.vdot(y, g) + jnp.vdot(stats.mean, g_mean) + jnp.vdot(stats.var, g_var)

    (gamma, beta), dx, eps = jax.grad(loss, (0, 1, 2))(params, x, 1e-2)
    want = oracle.gradients(x, g, params.gamma, 1e-2, axis, g_mean=g_mean, g_var=g_var)
    for got, expected in zip((dx, gamma, beta, eps), want, strict=True):
        assert_close(got, expected, roundings=64, computed_in=np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_come_back_in_the_dtype_of_what_they_belong_to(dtype):
    params, state, x = case((8, 5), -1, dtype)
    params = BNParams(params.gamma.astype("bfloat16"), params.beta)
    g = jnp.asarray(np.random.default_rng(4).normal(size=x.shape), dtype)
    grads, dx = jax.vjp(lambda p, x: bn_apply(p, state, x, train=True)[0], params, x)[1](g)
    assert (grads.gamma.dtype, grads.beta.dtype, dx.dtype) == ("bfloat16", wide(dtype), dtype)
    want = oracle.gradients(x, g, params.gamma)
    for got, expected in zip((dx, grads.gamma, grads.beta), (want.x, want.gamma, want.beta), strict=True):
        assert_close(got, expected, roundings=64)


@both_modes
def test_gradients_reach_the_running_statistics_in_evaluation_only(train):
    params, state, x = case((6, 5), -1)

    def loss(mean, var):
        return (bn_apply(params, BNState(mean, var, state.count), x, train=train)[0] ** 3).sum()

    grads = jax.grad(loss, (0, 1))(state.mean, state.var)
    y = oracle.normalize(x, *params, state.mean, state.var)
    r = 1 / np.sqrt(oracle.float64(state.var) + 1e-5)
    centred = oracle.float64(x) - oracle.float64(state.mean)
    gamma = oracle.float64(params.gamma)
    want = ((3 * y**2 * -gamma * r).sum(0), (3 * y**2 * gamma * centred * -0.5 * r**3).sum(0))
    for got, expected in zip(grads, want, strict=True):
        assert_close(got, 0 * expected if train else expected, roundings=64)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_a_bad_channel_is_bad_alone(bad, masked):
    params, state, x = case((6, 5), -1)
    mask = jnp.arange(6)[:, None] != 5 if masked else None
    y, stats = bn_apply(params, state, x.at[1, 2].set(bad), train=True, mask=mask)
    others = np.array([0, 1, 3, 4])
    assert not np.isfinite(stats.mean[2])
    assert not np.isfinite(stats.var[2])
    assert_close(y[:, others], oracle.batch_norm(x, *params, mask=mask)[:, others])
    for got, want in zip(stats, oracle.moments(x, mask=mask), strict=True):
        assert_close(got[others], want[others])


def test_count_is_the_number_of_values_seen_in_each_channel():
    params, state = bn_init(3)
    x = jnp.zeros((4, 5, 2, 3))
    assert bn_apply(params, state, x, train=True)[1].count.tolist() == [40, 40, 40]
    rows = jnp.array([1, 0, 1, 1], bool).reshape(4, 1, 1, 1)
    assert bn_apply(params, state, x, train=True, mask=rows)[1].count.tolist() == [30, 30, 30]
    per_channel = jnp.array([1, 0, 1], bool).reshape(1, 1, 1, 3)
    assert bn_apply(params, state, x, train=True, mask=rows & per_channel)[1].count.tolist() == [30, 0, 30]


def test_evaluation_takes_one_value_per_channel_and_any_axis_name():
    params, state, x = case((6, 5), -1)
    y, _ = bn_apply(params, state, x, train=False)
    alone, _ = bn_apply(params, state, x[:1], train=False, axis_name="nobody binds this")
    assert_close(alone, np.asarray(y)[:1])
    y, _ = bn_apply(params, state, x[0], train=False, axis=0)
    assert_close(y, np.asarray(alone)[0])


def test_one_value_left_by_a_mask_is_no_error_and_gives_beta():
    params, state, x = case((6, 5), -1)
    y, stats = bn_apply(params, state, x, train=True, mask=jnp.arange(6)[:, None] == 3)
    assert_close(stats.mean, np.asarray(x)[3])
    np.testing.assert_array_equal(stats.var, 0)
    np.testing.assert_array_equal(y[3], params.beta)


@pytest.mark.parametrize("num_features", [7, (7,), (2, 3), [2, 3], np.int64(7)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_init_starts_at_the_identity(num_features, dtype):
    params, state = bn_init(num_features, dtype=dtype)
    size = (7,) if np.ndim(num_features) == 0 else tuple(num_features)
    for leaf, value, kind in zip(
        (*params, *state), (1, 0, 0, 1, 0), (dtype, dtype, wide(dtype), wide(dtype), "int32"), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (size, kind)
        assert (leaf == value).all()


def test_no_two_leaves_of_init_share_a_buffer():
    leaves = jax.tree.leaves(bn_init(4))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == 5


def test_init_leaves_out_what_is_not_used():
    params, _ = bn_init(4, use_gamma=False, use_beta=False)
    assert params == BNParams(None, None)
    assert jax.tree.leaves(params) == []
