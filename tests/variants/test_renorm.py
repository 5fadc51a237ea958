"""Batch renormalization: Algorithm 1 of Ioffe 2017, with r and d held fixed by every derivative."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from support import eight, oracle, plain
from support.closeness import assert_close, assert_same_bits, bits
from support.counting import compilations
from support.nightly import by_day

from jbn import BNParams, BNState, bn_apply, bn_update_stats

N, C, EPS = 6, 4, 1e-5
LIMITS = {"tight": (1.2, 0.1), "wide": (3.0, 5.0), "infinite": (np.inf, np.inf), "r alone": (3.0, 0.0)}


def problem(dtype=jnp.float32):
    """(params, state, x, weights of the loss); the running statistics of the last channel are still empty."""
    rng = np.random.default_rng(0)
    gamma, beta, mean = (jnp.asarray(v, dtype) for v in rng.normal(size=(3, C)))
    x, weights = (jnp.asarray(v, dtype) for v in rng.normal(size=(2, N, C)) * [0.5, 1.0, 3.0, 1.0])
    state = BNState(mean, jnp.asarray([1.0, 0.7, 1.3, 1.0], dtype), jnp.asarray([1, 5, 9, 0], jnp.int32))
    return BNParams(gamma, beta), state, x, weights


def factors(state, mean, var, r_max, d_max, xp=np):
    """r and d, from Algorithm 1."""
    sigma = xp.sqrt(state.var + EPS)
    r = xp.clip(xp.sqrt(var + EPS) / sigma, 1 / r_max, r_max)
    d = xp.clip((mean - state.mean) / sigma, -d_max, d_max)
    return xp.where(state.count > 0, r, 1), xp.where(state.count > 0, d, 0)


def algorithm_1(params, state, x, limits, mask=None):
    """y in NumPy float64, what is hidden included."""
    params, state = (type(t)(*map(oracle.float64, t)) for t in (params, state))
    mean, var, _ = oracle.moments(x, mask=mask)
    r, d = factors(state, mean, var, *limits)
    xhat = (oracle.float64(x) - mean) / np.sqrt(var + EPS)
    return params.gamma * (xhat * r + d) + params.beta


def detached(limits, params, state, x, mask=None):
    """(y, mean, var) of the formula, for JAX to differentiate; r and d are constants of it."""
    row = lambda v: v[None]  # noqa: E731
    mean, var, _ = plain.moments(x, mask)
    r, d = lax.stop_gradient(factors(state, mean, var, *limits, xp=jnp))
    xhat = (x - row(mean)) / jnp.sqrt(row(var) + EPS)
    return row(params.gamma) * (xhat * row(r) + row(d)) + row(params.beta), mean, var


def loss(apply, weights, params, state, x, mask=None):
    y, mean, var = apply(params, state, x, mask)
    y = jnp.where(True if mask is None else mask, weights * jnp.sin(y), 0)
    return jnp.sum(y) + jnp.sum(mean * var)


def ours(limits, params, state, x, mask=None):
    y, stats = bn_apply(params, state, x, train=True, mask=mask, renorm=limits)
    return y, stats.mean, stats.var


MASK = np.array([True, True, False, True, False, True])[:, None]
MASKED = pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])


@MASKED
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_outputs_are_those_of_algorithm_1_and_statistics_those_of_the_batch(limits, mask):
    params, state, x, _ = problem()
    y, stats = bn_apply(params, state, x, train=True, renorm=limits, mask=mask)
    assert_close(y, algorithm_1(params, state, x, limits, mask))
    # In its last bits a statistic may depend on the state, which may be the shift of the sums.
    assert_close(stats, bn_apply(params, None, x, train=True, mask=mask)[1])


def test_the_problem_reaches_every_branch_of_the_limits():
    _, state, x, _ = problem()
    mean, var, _ = oracle.moments(x)
    r, d = factors(BNState(*map(oracle.float64, state)), mean, var, np.inf, np.inf)
    assert r[0] < 1 / 1.2
    assert r[2] > 1.2
    assert (np.abs(d[:3]) > 0.1).any()
    assert d[:3].min() < 0 < d[:3].max()


@MASKED
def test_every_derivative_is_that_of_the_formula_with_r_and_d_held_fixed(mask):
    with jax.enable_x64(True):
        params, state, x, weights = problem(jnp.float64)
        tangents = jax.tree.map(jnp.cos, (params, x))

        def derivatives(apply):
            def f(params, x):
                return loss(partial(apply, LIMITS["tight"]), weights, params, state, x, mask)

            gradient = jax.grad(f, (0, 1))
            return jax.jvp(f, (params, x), tangents), jax.jvp(gradient, (params, x), tangents)

        got, want = (jax.jit(partial(derivatives, apply))() for apply in (ours, detached))
        assert_close(got, want, roundings=2**19)


@pytest.mark.parametrize("limits", [LIMITS["tight"], LIMITS["infinite"]], ids=["tight", "infinite"])
def test_float32_gradients_are_those_of_float64(limits):
    params, state, x, weights = problem()
    got = jax.jit(jax.grad(lambda p, x: loss(partial(ours, limits), weights, p, state, x), (0, 1)))(params, x)
    with jax.enable_x64(True):
        p, s, x, w = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (params, state, x, weights))
        want = jax.grad(lambda p, x: loss(partial(detached, limits), w, p, s, x), (0, 1))(p, x)
        want = jax.tree.map(np.asarray, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_running_statistics_get_no_gradient():
    params, state, x, weights = problem()

    def f(mean, var):
        return loss(partial(ours, LIMITS["wide"]), weights, params, state._replace(mean=mean, var=var), x)

    for gradient in jax.grad(f, (0, 1))(state.mean, state.var):
        np.testing.assert_array_equal(gradient, 0)


def everything(options, params, state, x, weights):
    y, vjp, stats = jax.vjp(lambda p, x: bn_apply(p, state, x, train=True, **options), params, x, has_aux=True)
    return y, stats, vjp(weights.astype(y.dtype))


OPTIONS = {"plain": {}, "mask": {"mask": MASK}, "ghost": {"ghost_size": 3}}


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_day(
        itertools.product(OPTIONS, ["float32", "bfloat16"]),
        [("plain", "float32"), ("mask", "float32"), ("mask", "bfloat16"), ("ghost", "bfloat16")],
    ),
)
def test_limits_of_1_and_0_are_plain_batch_norm_bit_for_bit(name, dtype):
    options, dtype = OPTIONS[name], jnp.dtype(dtype)
    params, state, x, weights = problem()
    args = (params, state, x.astype(dtype), weights)
    unit = {**options, "renorm": (jnp.float32(1), jnp.float32(0))}
    for run in (lambda f: f, jax.jit):
        got, want = (jax.tree.leaves(run(partial(everything, o))(*args)) for o in (unit, options))
        assert list(map(bits, got[:4])) == list(map(bits, want[:4]))
        # Gradients are sums and products that XLA may contract in one program and not in the other.
        assert_close(got[4:], want[4:], roundings=1 if dtype == jnp.bfloat16 else 3, computed_in=dtype)


def test_a_channel_that_has_averaged_nothing_is_plain():
    params, state, x, _ = problem()
    y, _ = bn_apply(params, state, x, train=True, renorm=LIMITS["infinite"])
    alone, _ = bn_apply(params, None, x, train=True)
    assert_close(y[:, 3], alone[:, 3])
    empty = state._replace(count=jnp.zeros(C, jnp.int32), mean=jnp.full(C, jnp.nan))
    assert_close(bn_apply(params, empty, x, train=True, renorm=LIMITS["infinite"])[0], alone)


def test_without_limits_it_is_evaluation_with_the_running_statistics():
    params, state, x, _ = problem()
    state = state._replace(count=jnp.ones(C, jnp.int32))
    y, _ = bn_apply(params, state, x, train=True, renorm=(jnp.inf, jnp.inf))
    assert_close(y, bn_apply(params, state, x, train=False)[0])


def test_evaluation_ignores_the_limits():
    params, state, x, _ = problem()
    got = bn_apply(params, state, x, train=False, renorm=(3.0, 5.0))
    assert_same_bits(got, bn_apply(params, state, x, train=False))


def test_a_schedule_of_limits_runs_under_one_compilation():
    params, state, x, _ = problem()

    @jax.jit
    def step(state, t):
        limits = (1 + 0.1 * t, 0.2 * t)
        y, stats = bn_apply(params, state, x, train=True, renorm=limits)
        return bn_update_stats(state, stats, momentum=0.99), y

    ts = [jnp.float32(t) for t in range(5)]
    state, first = step(state, ts[0])
    with compilations() as seen:
        for t in ts[1:]:
            want_of = state
            state, y = step(state, t)
    assert not seen
    assert_close(first, bn_apply(params, None, x, train=True)[0])
    assert_close(y, algorithm_1(params, want_of, x, (1.4, 0.8)))


def test_blocks_are_renormalized_each_by_itself():
    params, state, x, weights = problem()
    limits = LIMITS["tight"]

    def blocks(params, x):
        apply = jax.vmap(lambda x: bn_apply(params, state, x, train=True, renorm=limits)[0])
        return apply(x.reshape(2, 3, C)).reshape(x.shape)

    y, vjp = jax.vjp(blocks, params, x)
    got_y, _, gradients = jax.jit(partial(everything, {"renorm": limits, "ghost_size": 3}))(params, state, x, weights)
    assert_close((got_y, gradients), (y, vjp(weights)))
    halves = [algorithm_1(params, state, half, limits) for half in (x[:3], x[3:])]
    assert_close(got_y, np.concatenate(halves))


@pytest.mark.parametrize("per_device", [1, 4])
@pytest.mark.parametrize("mask", [None, "an empty shard"], ids=str)
def test_synchronized_it_is_that_of_the_whole_batch_down_to_one_value_a_device(mask, per_device):
    params, x, weights, mask = eight.problem(mask=mask)
    rows = eight.D * per_device
    x, weights, mask = x[:rows], weights[:rows], None if mask is None else mask[:rows]
    state = BNState(*jnp.asarray(np.random.default_rng(1).random((2, eight.C)) + 0.5, jnp.float32), jnp.arange(eight.C))

    def loss(params, x, weights, mask, axis_name=None):
        y, stats = bn_apply(params, state, x, train=True, mask=mask, renorm=(1.5, 0.5), axis_name=axis_name)
        of_y, of_stats = eight.loss_of(y, stats, weights, mask)
        return (lax.psum(of_y, axis_name) if axis_name else of_y) + of_stats, (y, stats)

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    specs = (P(), P("data"), P("data"), eight.mask_spec(mask))
    out_specs = ((P(), P("data")), (P("data"), eight.STATS))
    shards = jax.shard_map(partial(gradient, axis_name="data"), mesh=eight.mesh(), in_specs=specs, out_specs=out_specs)
    assert_close(jax.jit(shards)(params, x, weights, mask), jax.jit(gradient)(params, x, weights, mask))


def test_a_nan_stays_in_its_channel():
    params, state, x, _ = problem()
    y, stats = bn_apply(params, state, x.at[1, 2].set(jnp.nan), train=True, renorm=LIMITS["wide"])
    clean, _ = bn_apply(params, state, x, train=True, renorm=LIMITS["wide"])
    assert np.isnan(y[:, 2]).all()
    kept = np.array([0, 1, 3])
    assert_close(y[:, kept], clean[:, kept])
    np.testing.assert_array_equal(bn_update_stats(state, stats).count, [2, 6, 9, 1])


def test_a_masked_nan_gives_gamma_times_d_plus_beta_and_moves_no_gradient():
    params, state, x, weights = problem()
    bad, limits = x.at[2, 1].set(jnp.nan), LIMITS["wide"]
    y, _ = bn_apply(params, state, bad, train=True, mask=MASK, renorm=limits)
    mean, var, _ = oracle.moments(x, mask=MASK)
    _, d = factors(BNState(*map(oracle.float64, state)), mean, var, *limits)
    gamma, beta = map(oracle.float64, params)
    np.testing.assert_allclose(y[2, 1], gamma[1] * d[1] + beta[1], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p, x: loss(partial(ours, limits), weights, p, state, x, MASK), (0, 1)))
    assert_close(gradient(params, bad), gradient(params, x))


def test_constant_channels_and_empty_masks_are_finite():
    params, state, x, _ = problem()
    constant = jnp.ones_like(x)
    y, stats = bn_apply(params, state, constant, train=True, renorm=LIMITS["wide"])
    assert_close(y, algorithm_1(params, state, constant, LIMITS["wide"]))
    np.testing.assert_array_equal(stats.var, 0)
    y, stats = bn_apply(params, state, x, train=True, renorm=LIMITS["wide"], mask=jnp.zeros((N, 1), bool))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(stats.count, 0)


def test_an_ensemble_by_vmap_takes_limits_of_its_own():
    params, state, x, _ = problem()
    limits = jnp.float32([[1.0, 0.0], [1.2, 0.1], [3.0, 5.0]])
    y = jax.jit(jax.vmap(lambda lim: bn_apply(params, state, x, train=True, renorm=(lim[0], lim[1]))[0]))(limits)
    for got, pair in zip(y, limits, strict=True):
        assert_close(got, algorithm_1(params, state, x, np.float64(pair)))
