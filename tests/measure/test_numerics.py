"""Accuracy of a two-pass computation at every offset, spread and size, and the invariances of the formula.

Bounds here are those of the design, not multiples of eps: 1e-5 for variances, 1e-4 for gradients.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, bits, eps_of, relative_error

from jbn import BNParams, BNState, bn_apply, bn_init

VAR_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
FLOAT32_MAX = float(np.finfo(np.float32).max)

# 3.8² is just below the ratio at which a second pass starts, 4² just above it.
RATIOS = [0, 1, 3.8, 4.0, 10, 100, 1e3, 1e4]
SHAPES = {
    "8 rows": ((8, 16), -1),
    "1000 rows": ((1000, 4), -1),
    "256 rows": ((256, 16), -1),
    "1e5 rows": ((100_000, 2), -1),
    "NHWC": ((8, 5, 5, 6), -1),
    "large NHWC": ((3, 40, 25, 7), -1),
    "NCHW": ((8, 6, 5, 5), 1),
    "large NCHW": ((8, 8, 14, 14), 1),
    "two axes": ((100, 3, 7, 2), (1, 3)),
    "two large axes": ((1000, 3, 7, 2), (1, 3)),
}
SPIKES = [f"spikes every {n} rows" for n in (2, 8, 64, 128, 1000)]
shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES.keys())


@functools.cache
def measured(axis=-1):
    """(y, stats) of training without parameters, compiled once for each shape."""

    def run(x, mask=None):
        return bn_apply(BNParams(None, None), None, x, train=True, axis=axis, mask=mask)

    return jax.jit(run)


def draw(kind, shape, seed=0):
    """Mean about 0, standard deviation about 1."""
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "two values":
        return rng.permutation(np.resize([-1.0, 1.0], int(np.prod(shape)))).reshape(shape)
    if kind == "skewed":
        return rng.exponential(size=shape) - 1
    # Far out at every so many rows: the data against any shift that is guessed from a part of them.
    x = rng.normal(size=shape)
    x[:: int(kind.split()[-2])] += 100
    return (x - x.mean()) / x.std()


@shapes
@pytest.mark.parametrize("kind", ["normal", "two values", "skewed", *SPIKES])
def test_variance_is_exact_at_any_offset(shape, axis, kind):
    run = measured(axis)
    for ratio in RATIOS:
        for sign in (1, -1):
            x = (draw(kind, shape) + sign * ratio).astype(np.float32)
            want = oracle.moments(x, axis)
            _, stats = run(x)
            assert relative_error(stats.var, want.var) < VAR_BOUND, (ratio, sign)
            distance = np.abs(oracle.float64(stats.mean) - want.mean) / (np.abs(want.mean) + np.sqrt(want.var))
            assert distance.max() < 16 * eps_of(np.float32), (ratio, sign)


@shapes
def test_outputs_are_exact_at_any_offset(shape, axis):
    run = measured(axis)
    for ratio in RATIOS:
        x = (draw("normal", shape) + ratio).astype(np.float32)
        y, _ = run(x)
        assert np.abs(oracle.float64(y) - oracle.batch_norm(x, axis=axis)).max() < 3e-5, ratio


def test_each_channel_is_exact_beside_channels_of_other_offsets_and_spreads():
    rng = np.random.default_rng(0)
    scale = 10.0 ** np.arange(-6, 7)
    x = (scale * (rng.normal(size=(500, 13)) + rng.choice(RATIOS, size=13))).astype(np.float32)
    _, stats = measured()(x)
    assert relative_error(stats.var, oracle.moments(x).var) < VAR_BOUND


def test_masked_variance_is_exact_at_any_offset():
    shape = (600, 4)
    run = measured()
    mask = np.random.default_rng(1).uniform(size=shape) < 0.5
    for ratio in RATIOS:
        x = np.where(mask, draw("normal", shape) + ratio, 7e3).astype(np.float32)
        _, stats = run(x, jnp.asarray(mask))
        assert relative_error(stats.var, oracle.moments(x, mask=mask).var) < VAR_BOUND, ratio


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_variance_of_narrow_inputs_is_exact_at_any_offset(dtype):
    for ratio in RATIOS:
        x = jnp.asarray(draw("normal", (1000, 4)) + ratio, jnp.float32).astype(dtype)
        _, stats = measured()(x)
        want = oracle.moments(x)
        np.testing.assert_allclose(stats.var, want.var, rtol=VAR_BOUND, atol=0, err_msg=str(ratio))


def test_variance_is_exact_under_vmap():
    x = np.stack([(draw("normal", (256, 3), seed) + r).astype(np.float32) for seed, r in enumerate(RATIOS)])
    _, stats = jax.vmap(measured())(x)
    for got, batch in zip(stats.var, x, strict=True):
        assert relative_error(got, oracle.moments(batch).var) < VAR_BOUND


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="float64 is off")
def test_variance_in_float64_is_exact_at_offsets_that_only_float64_resolves():
    rng = np.random.default_rng(0)
    noise = rng.integers(-(2**20), 2**20, size=(1000, 4)).astype(float)
    _, stats = bn_apply(BNParams(None, None), None, noise + 2.0**50, train=True)
    assert relative_error(stats.var, oracle.moments(noise).var) < 1e-13


SIZES = {"8 rows": (8, 16), "1000 rows": (1000, 4), "1e5 rows": (100_000, 2)}
sizes = pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES.keys())


@sizes
def test_variance_is_exact_at_tiny_scale(shape):
    run = measured()
    for var in (1e-26, 1e-30, 2e-32):
        for ratio in RATIOS:
            x = (np.sqrt(var) * (draw("two values", shape) + ratio)).astype(np.float32)
            want = oracle.moments(x).var
            assert relative_error(run(x)[1].var, want) < VAR_BOUND, (var, ratio)


@sizes
@pytest.mark.parametrize("kind", ["normal", "skewed", "spikes every 128 rows"])
def test_variance_is_exact_up_to_the_largest_sum_of_squares(shape, kind):
    run = measured()
    for ratio in RATIOS:
        x = draw(kind, shape)
        x = (x - x.mean(0)) / x.std(0)
        x = (np.sqrt(2.9e38 / shape[0]) * (x + ratio)).astype(np.float32)
        want = oracle.moments(x).var
        assert shape[0] * want.max() < 3e38
        y, stats = run(x)
        assert relative_error(stats.var, want) < VAR_BOUND, ratio
        assert np.abs(oracle.float64(y) - oracle.batch_norm(x)).max() < 3e-5, ratio


EXTREMES = {
    "all at the top": [FLOAT32_MAX] * 8,
    "all at the bottom": [-FLOAT32_MAX] * 8,
    "both ends": [FLOAT32_MAX, -FLOAT32_MAX] * 4,
    "mostly top": [FLOAT32_MAX] * 7 + [-FLOAT32_MAX],
    "mostly bottom": [-FLOAT32_MAX] * 7 + [FLOAT32_MAX],
    "one at the top": [FLOAT32_MAX] + [0.0] * 7,
    "one at the bottom": [-FLOAT32_MAX] + [1.0] * 7,
    "sum overflows, spread does not": [2e38, 2.0000001e38] * 4,
    "sum overflows downwards": [-2e38, -2.0000001e38] * 4,
    "squares overflow": [1e20, -1e20] * 4,
    "all equal, large": [1e38] * 8,
    "subnormal": [1e-40, -1e-40] * 4,
}


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES.keys())
def test_statistics_of_finite_values_are_never_nan_and_beyond_the_range_the_variance_is_inf(values):
    x = np.array(values, np.float32)[:, None]
    _, stats = measured()(x)
    want = oracle.moments(x)
    assert not np.isnan(stats.mean).any()
    assert not np.isnan(stats.var).any()
    assert (np.asarray(stats.var) >= 0).all()
    spread = np.sqrt(want.var[0])
    if want.var[0] * len(values) > FLOAT32_MAX:
        assert stats.var[0] == np.inf
    elif spread > 1e-16 and abs(want.mean[0]) < 1e4 * spread:
        assert relative_error(stats.var, want.var) < VAR_BOUND


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES.keys())
def test_an_extreme_channel_does_not_touch_its_neighbours(values):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3)).astype(np.float32) + np.float32(50)
    x[:, 1] = values
    y, stats = measured()(x)
    others = x[:, [0, 2]]
    assert relative_error(stats.var[np.array([0, 2])], oracle.moments(others).var) < VAR_BOUND
    assert_close(y[:, np.array([0, 2])], oracle.batch_norm(others), roundings=64)


CONSTANTS = [0.0, 1.0, 0.1, -1e-20, 3.3e-7, 1e4 + 0.1, -12345.678, 7.77e8, -1e12]


@sizes
def test_a_constant_channel_has_a_variance_of_rounding_size_and_gives_beta(shape):
    run = measured()
    for constant in CONSTANTS:
        x = np.full(shape, constant, np.float32)
        y, stats = run(x)
        value = float(x[0, 0])
        assert (np.asarray(stats.var) >= 0).all()
        assert float(stats.var.max()) <= (4 * eps_of(np.float32) * value) ** 2, constant
        assert relative_error(stats.mean, np.full(shape[1], value)) < 1e-6, constant
        if abs(constant) < 1e6:
            assert np.abs(np.asarray(y)).max() < 1e-2, constant


@pytest.mark.parametrize("seed", range(3))
def test_variance_is_never_negative(seed):
    rng = np.random.default_rng(seed)
    run = measured()
    for ratio in (1e2, 1e5, 1e7, 1e9):  # far beyond what float32 resolves
        x = (rng.normal(size=(16, 64)) + ratio * rng.choice([-1, 1], size=64)).astype(np.float32)
        assert (np.asarray(run(x)[1].var) >= 0).all()


@functools.cache
def gradients_of(axis=-1):
    """Gradients of Σ g·y in γ and β, and in x, compiled once for each shape."""

    def loss(params, x, g, mask=None):
        y, _ = bn_apply(params, None, x, train=True, axis=axis, mask=mask)
        return jnp.vdot(y, g, precision="highest")

    return jax.jit(jax.grad(loss, (0, 1)))


@shapes
@pytest.mark.parametrize("cotangent", ["noise", "aligned with the output", "far from 0"])
def test_gradients_are_those_of_float64_at_any_offset(shape, axis, cotangent):
    run = gradients_of(axis)
    rng = np.random.default_rng(5)
    size = tuple(shape[a] for a in oracle.feature_axes(axis, len(shape)))
    params = BNParams(
        jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32), jnp.asarray(rng.normal(size=size), jnp.float32)
    )
    for ratio in RATIOS:
        x = (draw("normal", shape) + ratio).astype(np.float32)
        g = rng.normal(size=shape)
        if cotangent == "aligned with the output":
            g = g + oracle.batch_norm(x, axis=axis)
        elif cotangent == "far from 0":
            g = g + 5
        g = g.astype(np.float32)
        (gamma, beta), dx = run(params, x, g)
        want = oracle.gradients(x, g, params.gamma, axis=axis)
        for name, got, expected in zip(
            ("x", "gamma", "beta"), (dx, gamma, beta), (want.x, want.gamma, want.beta), strict=True
        ):
            error = np.abs(oracle.float64(got) - expected).max()
            bound = GRADIENT_BOUND * np.abs(expected).max()
            if name == "gamma":
                # Σg·x̂ holds (μ − its rounding)·Σg/σ: where Σg is far from 0 that is all there is to see of it.
                bound = max(bound, 1e-6 * np.abs(g).sum() / math.prod(size))
            assert error < bound, (ratio, name)


def test_masked_gradients_are_those_of_float64_at_a_large_offset():
    shape = (300, 4)
    rng = np.random.default_rng(6)
    mask = rng.uniform(size=shape) < 0.5
    x, g = (rng.normal(size=shape) + 1e4).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    _, dx = gradients_of()(BNParams(None, None), x, g, jnp.asarray(mask))
    want = oracle.gradients(x, g, mask=mask).x
    assert np.abs(oracle.float64(dx) - want).max() / np.abs(want).max() < GRADIENT_BOUND


def test_gradients_through_the_statistics_are_those_of_float64_at_a_large_offset():
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(300, 4)) + 1e4).astype(np.float32)
    g_mean, g_var = (rng.normal(size=4).astype(np.float32) for _ in range(2))

    def loss(x):
        _, stats = bn_apply(BNParams(None, None), None, x, train=True)
        return jnp.vdot(stats.mean, g_mean) + jnp.vdot(stats.var, g_var)

    want = oracle.gradients(x, np.zeros_like(x), g_mean=g_mean, g_var=g_var).x
    assert np.abs(oracle.float64(jax.grad(loss)(x)) - want).max() / np.abs(want).max() < GRADIENT_BOUND


def test_gradients_of_a_constant_channel_are_finite():
    x = jnp.full((8, 3), 12345.678, jnp.float32)
    grads = gradients_of()(bn_init(3)[0], x, jnp.ones_like(x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_evaluation_at_a_large_offset_subtracts_before_it_scales():
    rng = np.random.default_rng(8)
    x = (rng.normal(size=(300, 4)) + 1e4).astype(np.float32)
    mean, var, _ = oracle.moments(x)
    state = BNState(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.ones(4, jnp.int32))
    y, _ = bn_apply(BNParams(None, None), state, x, train=False)
    assert_close(y, oracle.normalize(x, None, None, oracle.float64(state.mean), oracle.float64(state.var)))


def integers(shape):
    """Values whose shifts float32 represents exactly."""
    return np.random.default_rng(9).integers(-1000, 1000, size=shape).astype(np.float32)


def test_shifting_the_batch_shifts_the_mean_and_nothing_else():
    x = integers((64, 4))
    run = measured()
    y, stats = run(x)
    for shift in (1.0, -4096.0, 2.0**22):
        moved, moved_stats = run(x + np.float32(shift))
        assert_close(moved, y, roundings=64)
        assert_close(moved_stats.var, stats.var)
        assert_close(moved_stats.mean, oracle.float64(stats.mean) + shift, roundings=4)


def test_scaling_the_batch_by_a_power_of_two_and_eps_by_its_square_changes_no_bit_of_the_output():
    x = integers((64, 4)) + 777
    params, _ = bn_init(4)
    run = jax.jit(lambda x, eps: bn_apply(params, None, x, train=True, eps=eps))
    y, stats = run(x, np.float32(2.0**-10))
    for factor in (2.0**-20, 0.5, 2.0**20):
        scaled, scaled_stats = run(x * np.float32(factor), np.float32(2.0**-10 * factor**2))
        assert bits(scaled) == bits(y)
        assert bits(scaled_stats.var) == bits(stats.var * np.float32(factor**2))


def test_reflecting_the_batch_reflects_the_output_bit_for_bit():
    x = integers((64, 4)) + 777
    run = measured()
    np.testing.assert_array_equal(run(-x)[0], -run(x)[0])


def test_permuting_the_rows_permutes_the_output():
    x = integers((64, 4)) + 777
    order = np.random.default_rng(1).permutation(64)
    run = measured()
    assert_close(run(x[order])[0], np.asarray(run(x)[0])[order])


def test_permuting_the_channels_permutes_everything_bit_for_bit():
    x = integers((64, 8)) + 777
    order = np.random.default_rng(1).permutation(8)
    run = measured()
    (y, stats), (moved, moved_stats) = run(x), run(x[:, order])
    np.testing.assert_array_equal(moved, np.asarray(y)[:, order])
    for got, want in zip(moved_stats, stats, strict=True):
        np.testing.assert_array_equal(got, np.asarray(want)[order])


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_a_mask_equals_the_selection_of_its_rows(ratio):
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(50, 4)) + ratio).astype(np.float32)
    keep = rng.uniform(size=50) < 0.5
    g = rng.normal(size=x.shape).astype(np.float32) * keep[:, None]

    def loss(x, g, mask):
        y, stats = bn_apply(BNParams(None, None), None, x, train=True, mask=mask)
        return jnp.vdot(y, g), (y, stats)

    run = jax.grad(loss, has_aux=True)
    dx, (y, stats) = run(x, g, jnp.asarray(keep[:, None]))
    selected_dx, (selected_y, selected_stats) = run(x[keep], g[keep], None)
    tolerance = VAR_BOUND if ratio else 2e-6
    np.testing.assert_allclose(np.asarray(y)[keep], selected_y, atol=10 * tolerance, rtol=0)
    np.testing.assert_allclose(np.asarray(dx)[keep], selected_dx, atol=10 * tolerance, rtol=0)
    assert not np.asarray(dx)[~keep].any()
    for got, want in zip(stats, selected_stats, strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * (ratio == 0))


def test_output_has_mean_zero_and_variance_one_then_gamma_and_beta():
    x = jnp.asarray(draw("skewed", (512, 3)) * 30 + 100, jnp.float32)
    params = BNParams(jnp.array([2.0, -3.0, 0.0]), jnp.array([1.0, 0.0, 5.0]))
    y, _ = bn_apply(params, None, x, train=True, eps=1e-12)
    got = oracle.moments(y)
    np.testing.assert_allclose(got.mean, params.beta, atol=1e-5)
    np.testing.assert_allclose(got.var, np.square(params.gamma), rtol=1e-5, atol=1e-12)
