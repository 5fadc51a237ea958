"""Large groups: statistics by at most two all-reduces of the channels, as exact as those of the whole batch."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from support import oracle, plain, tpu
from support.closeness import assert_close, assert_same_bits, relative_error
from support.counting import compile_hlo
from support.eight import STATS, C, D, loss_of, mask_spec, mesh, problem, split, whole
from support.nightly import by_day

import jbn._pool
from jbn import BNState, BNStats, bn_apply

STATED = jbn._pool._MOST_GATHERED


@pytest.fixture(autouse=True, scope="module")
def _eight_are_many():
    """So that eight devices are summed over; what was traced before went the other way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jbn._pool, "_MOST_GATHERED", 4)
        jax.clear_caches()
        yield
    jax.clear_caches()


def on_devices(shard, mask, out_specs):
    specs = (P(), P("data"), P("data"), mask_spec(mask))
    return jax.jit(jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=out_specs))


@partial(jax.jit, static_argnames=("renorm", "ghost_size"))
def synchronized(params, x, mask=None, state=None, **options):
    """(y, stats) on eight devices."""

    def shard(params, state, x, mask):
        return bn_apply(params, state, x, train=True, mask=mask, axis_name="data", **options)

    specs = (P(), P(), P("data"), mask_spec(mask))
    return jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=(P("data"), STATS))(params, state, x, mask)


MASKS = (None, "unequal masks", "an empty shard", "one shard only")


@pytest.mark.parametrize(
    ("mask", "offset"),
    by_day(
        itertools.product(MASKS, [0.0, 100.0]),
        [*((mask, 0.0) for mask in MASKS), (None, 100.0), ("unequal masks", 100.0)],
    ),
)
def test_values_gradients_and_statistics_are_those_of_the_whole_batch(mask, offset):
    params, x, weights, mask = problem(mask=mask, offset=offset)

    def shard(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
            of_y, of_stats = loss_of(y, stats, weights, mask)
            return lax.psum(of_y, "data") + of_stats, (y, stats)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    run = on_devices(shard, mask, ((P(), P("data")), (P("data"), STATS)))
    roundings = 16 if offset == 0 else 128  # float32 values are pooled in another order than one batch is summed
    assert_close(run(params, x, weights, mask), whole(params, x, weights, mask), roundings=roundings)


@pytest.mark.parametrize("map_over", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_vmap_and_pmap_go_the_same_way(map_over):
    params, x, weights, mask = problem(mask="an empty shard")

    def member(params, x, weights, mask):
        y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
        return loss_of(y, stats, weights, mask), (y, stats)

    def loss(params, x):
        (of_y, of_stats), (y, stats) = map_over(member, axis_name="data", in_axes=(None, 0, 0, 0))(
            params, split(x), split(weights), split(mask)
        )
        return jnp.sum(of_y) + of_stats[0], (y.reshape(x.shape), jax.tree.map(lambda v: v[0], stats))

    gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    assert_close(gradients, whole(params, x, weights, mask))


@pytest.mark.parametrize("mask", [None, "unequal masks"], ids=str)
def test_the_variance_is_exact_to_1e_5_at_an_offset_of_1e4_deviations(mask):
    params, x, _, mask = problem(mask=mask, offset=1e4)
    y, stats = synchronized(params, x, mask)
    expected = oracle.moments(x, mask=mask)
    assert relative_error(stats.var, expected.var) < 1e-5
    assert relative_error(stats.mean, expected.mean) < 2e-7
    shown = np.broadcast_to(True if mask is None else mask, x.shape)
    normalized = oracle.batch_norm(x, *params, mask=mask)
    np.testing.assert_allclose(y[shown], normalized[shown], rtol=1e-4, atol=1e-4)


def test_shards_at_different_offsets_pool_to_the_variance_between_them():
    params, x, _, _ = problem()
    x = x + jnp.repeat(jnp.arange(D, dtype=jnp.float32) * 1e3, len(x) // D)[:, None]
    _, stats = synchronized(params, x)
    assert relative_error(stats.var, oracle.moments(x).var) < 1e-6


@pytest.mark.parametrize("value", [1e30, 1.5e37, -1.5e37])
def test_a_constant_near_the_end_of_the_range_has_a_finite_mean(value):
    params, x, _, _ = problem()
    x = x.at[:, 1].set(value)
    y, stats = synchronized(params, x)
    np.testing.assert_allclose(stats.mean[1], value, rtol=1e-6)
    assert np.isfinite(y).all()


def test_beyond_the_range_the_variance_is_infinite_and_nothing_is_nan():
    params, x, _, _ = problem()
    x = x.at[:, 1].multiply(3e37)
    y, stats = synchronized(params, x)
    assert np.isinf(stats.var[1])
    np.testing.assert_allclose(stats.mean[1], oracle.moments(x).mean[1], rtol=1e-5)
    assert np.isfinite(y).all()


def test_a_nan_stays_in_its_channel():
    params, x, _, _ = problem()
    y, stats = synchronized(params, x.at[3, 1].set(jnp.nan))
    clean, _ = synchronized(params, x)
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(stats.mean[1])
    np.testing.assert_array_equal(np.delete(y, 1, 1), np.delete(clean, 1, 1))


def test_all_shards_empty_is_count_0():
    params, x, _, _ = problem()
    mask = jnp.zeros((len(x), 1), bool)
    y, stats = synchronized(params, x, mask)
    assert_same_bits(stats, BNStats(*jnp.zeros((3, C), jnp.float32)))
    assert np.isfinite(y).all()


def test_second_derivatives_are_those_of_the_plain_formula():
    with jax.enable_x64(True):
        params, x, weights, mask = problem(jnp.float64, mask="an empty shard")
        params, weights = jax.tree.map(lambda v: v.astype(jnp.float64), (params, weights))

        def ours(params, x):
            def shard(params, x, _, mask):
                y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
                return y, stats.mean, stats.var

            return on_devices(shard, mask, (P("data"), P(), P()))(params, x, weights, mask)

        def hvp(fn):
            def loss(params, x):
                y, mean, var = fn(params, x)
                return jnp.sum(jnp.where(mask, weights * jnp.tanh(y), 0)) + jnp.sum(jnp.sin(mean) * var)

            return jax.jit(lambda p, x: jax.jvp(jax.grad(loss, (0, 1)), (p, x), (p, weights)))(params, x)

        assert_close(hvp(ours), hvp(lambda params, x: plain.train(x, *params, 1e-5, mask)), roundings=2**13)


@pytest.mark.parametrize("options", [{"renorm": (1.5, 0.5)}, {"ghost_size": 2}], ids=["renorm", "ghost"])
def test_variants_are_those_of_the_whole_batch(options):
    params, x, _, mask = problem(mask="an empty shard")
    state = BNState(*jnp.asarray(np.random.default_rng(1).random((2, C)) + 0.5, jnp.float32), jnp.arange(C))

    got = synchronized(params, x, mask, state, **options)
    assert_close(got, bn_apply(params, state, x, train=True, mask=mask, **options))


def forward(params, x, mask=None):
    return bn_apply(params, None, x, train=True, mask=mask, axis_name="data")


def forward_backward(params, x, mask=None):
    y, vjp, stats = jax.vjp(lambda x: forward(params, x, mask), x, has_aux=True)
    return vjp(y)[0], stats


@pytest.mark.parametrize("mask", [None, "unequal masks"], ids=str)
@pytest.mark.parametrize(("fn", "reduces"), [(forward, 2), (forward_backward, 3)], ids=["forward", "backward"])
def test_two_all_reduces_of_the_channels_forward_and_one_backward_for_x(fn, reduces, mask):
    params, x, _, mask = problem(mask=mask)
    run = jax.shard_map(fn, mesh=mesh(), in_specs=(P(), P("data"), mask_spec(mask)), out_specs=(P("data"), STATS))
    hlo, _ = compile_hlo(run, params, x, mask)
    assert [c.opcode for c in hlo.collectives()] == ["all-reduce"] * reduces
    assert all(max(c.sizes) <= 2 * C for c in hlo.collectives())


def test_each_of_256_chips_receives_a_few_numbers_for_each_channel():
    received = tpu.compiled("received_by_each_of_256_chips")
    assert 0 < received["forward"] <= 32
    assert 0 < received["both"] <= 48


def test_the_group_size_is_stated_where_users_read_of_it():
    assert f" {STATED} " in bn_apply.__doc__
