"""`bn_update_stats`: the weight of a batch, what it leaves alone, and whole networks at once."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, assert_same_bits, bits
from support.problems import pose

from jbn import BNState, BNStats, bn_apply, bn_init, bn_merge_stats, bn_update_stats

INT32_MAX = np.iinfo(np.int32).max


def state_of(size, seed=0, count=3, dtype="float32"):
    state = pose((2, *np.atleast_1d(size)), tuple(range(1, 1 + np.size(size))), dtype=dtype, seed=seed).state
    return state._replace(count=jnp.full(size, count, jnp.int32))


def stats_of(size, seed=1, count=8.0, dtype="float32"):
    """As good as any, and of the same ranges as the running statistics."""
    return BNStats(*state_of(size, seed, dtype=dtype)[:2], jnp.full(size, count, jnp.float32))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("traced", [False, True])
def test_the_first_debiased_update_is_the_batch_bit_for_bit(momentum, traced):
    _, state = bn_init(64)
    stats = stats_of(64)
    update = partial(bn_update_stats, unbiased=False)
    if traced:
        after = jax.jit(lambda d: update(state, stats, momentum=d))(momentum)
    else:
        after = update(state, stats, momentum=momentum)
    assert_same_bits(after, BNState(stats.mean, stats.var, jnp.ones(64, jnp.int32)))


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_momentum_zero_replaces_bit_for_bit(debias, count):
    stats = stats_of(64)
    after = bn_update_stats(state_of(64, count=count), stats, momentum=0.0, debias=debias, unbiased=False)
    assert_same_bits(after, BNState(stats.mean, stats.var, jnp.full(64, count + 1, jnp.int32)))


def test_momentum_one_without_debias_keeps_bit_for_bit_and_counts():
    state = state_of(64)
    after = bn_update_stats(state, stats_of(64), momentum=1.0, debias=False)
    assert_same_bits(after, state._replace(count=state.count + 1))


def test_momentum_one_with_debias_is_the_plain_average_of_all_batches():
    batches = [stats_of(5, seed) for seed in range(20)]
    _, state = bn_init(5)
    update = jax.jit(partial(bn_update_stats, momentum=1.0, unbiased=False))
    for batch in batches:
        state = update(state, batch)
    assert_close(state.mean, np.mean([oracle.float64(b.mean) for b in batches], axis=0))
    assert_close(state.var, np.mean([oracle.float64(b.var) for b in batches], axis=0))


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.999, 1 - 2.0**-20, 1.0])
@pytest.mark.parametrize("t", [1, 2, 3, 10, 100, 5000])
def test_the_weight_of_update_t_is_that_of_the_formula(t, momentum, debias):
    """Running statistics of 0 and batch statistics of 1 make the new mean the weight itself."""
    state = BNState(*jnp.zeros((2, 1), jnp.float32), jnp.full(1, t - 1, jnp.int32))
    stats = BNStats(*jnp.ones((2, 1), jnp.float32), jnp.full(1, 4, jnp.float32))
    for d in (momentum, jnp.float32(momentum)):
        want = oracle.weight(t, float(d), debias)  # a Python number keeps its digits, an array those of its dtype
        after = bn_update_stats(state, stats, momentum=d, debias=debias, unbiased=False)
        np.testing.assert_allclose(after.mean, want, rtol=4e-6)
        np.testing.assert_allclose(after.var, want, rtol=4e-6)
        assert after.count.tolist() == [t]


def test_a_constant_batch_is_a_fixed_point_of_debiased_updates():
    _, state = bn_init(4)
    stats = stats_of(4)
    update = jax.jit(partial(bn_update_stats, momentum=0.97, unbiased=False))
    for _ in range(50):
        state = update(state, stats)
    assert_close(state.mean, stats.mean)
    assert_close(state.var, stats.var)


@pytest.mark.parametrize("debias", [True, False])
def test_under_a_schedule_the_weight_uses_the_current_momentum_and_update(debias):
    schedule = np.linspace(0.5, 0.99, 12).astype(np.float32)
    batches = [stats_of(3, seed) for seed in range(12)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

    def step(state, inputs):
        batch, momentum = inputs
        return bn_update_stats(state, batch, momentum=momentum, debias=debias, unbiased=False), None

    state, _ = jax.lax.scan(step, bn_init(3)[1], (stacked, schedule))
    mean, var = np.zeros(3), np.ones(3)
    for t, (batch, momentum) in enumerate(zip(batches, schedule, strict=True), start=1):
        w = oracle.weight(t, float(momentum), debias)
        mean = (1 - w) * mean + w * oracle.float64(batch.mean)
        var = (1 - w) * var + w * oracle.float64(batch.var)
    assert_close(state.mean, mean)
    assert_close(state.var, var)
    assert state.count.tolist() == [12] * 3


@pytest.mark.parametrize("count", [2, 3, 8, 1e5])
def test_the_running_variance_takes_the_unbiased_estimate(count):
    stats = stats_of(5, count=count)
    after = bn_update_stats(bn_init(5)[1], stats)
    assert_close(after.var, oracle.float64(stats.var) * count / (count - 1), roundings=2)
    assert bits(after.mean) == bits(stats.mean)


@pytest.mark.parametrize("count", [0.25, 1.0])
def test_one_value_keeps_its_variance(count):
    stats = stats_of(5, count=count)
    assert bits(bn_update_stats(bn_init(5)[1], stats).var) == bits(stats.var)


def test_defaults_are_momentum_nine_tenths_debiased_unbiased():
    state, stats = state_of(5), stats_of(5)
    w = oracle.weight(4, 0.9)
    after = bn_update_stats(state, stats)
    assert_close(after.mean, (1 - w) * oracle.float64(state.mean) + w * oracle.float64(stats.mean))
    unbiased = oracle.float64(stats.var) * 8 / 7
    assert_close(after.var, (1 - w) * oracle.float64(state.var) + w * unbiased)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_count_saturates_and_never_wraps(momentum, debias):
    state = BNState(*jnp.ones((2, 3), jnp.float32), jnp.array([INT32_MAX - 1, INT32_MAX, 5], jnp.int32))
    after = state
    for _ in range(2):
        after = bn_update_stats(after, stats_of(3), momentum=momentum, debias=debias)
    assert after.count.tolist() == [INT32_MAX, INT32_MAX, 7]
    assert all(np.isfinite(leaf).all() for leaf in after)


def test_a_fully_warmed_up_count_is_the_plain_moving_average():
    state, stats = state_of(5, count=INT32_MAX), stats_of(5)
    after = bn_update_stats(state, stats, unbiased=False)
    plain = bn_update_stats(state, stats, unbiased=False, debias=False)
    assert_close(after.mean, plain.mean, roundings=2)
    assert_close(after.var, plain.var, roundings=2)


UNUSABLE = {
    "nothing seen": (1.0, 1.0, 0.0),
    "NaN mean": (np.nan, 1.0, 8.0),
    "NaN variance": (1.0, np.nan, 8.0),
    "infinite mean": (np.inf, 1.0, 8.0),
    "mean of minus infinity": (-np.inf, 1.0, 8.0),
    "infinite variance": (1.0, np.inf, 8.0),
    "NaN count": (1.0, 1.0, np.nan),
    "variance that overflows when unbiased": (1.0, 2e38, 2.0),
    "nothing seen, and NaN": (np.nan, np.nan, 0.0),
}


@pytest.mark.parametrize("unusable", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_an_unusable_channel_stays_bit_for_bit_and_does_not_hold_up_the_others(unusable, momentum):
    state, stats = state_of(5), stats_of(5)
    spoiled = BNStats(*(leaf.at[2].set(value) for leaf, value in zip(stats, unusable, strict=True)))
    after, clean = (bn_update_stats(state, s, momentum=momentum) for s in (spoiled, stats))
    for got, before, want in zip(after, state, clean, strict=True):
        assert bits(got[2]) == bits(before[2])
        assert bits(jnp.delete(got, 2)) == bits(jnp.delete(want, 2))


def test_a_variance_that_only_overflows_when_unbiased_is_usable_when_biased():
    stats = BNStats(*jnp.array([[1], [2e38], [2]], jnp.float32))
    assert bn_update_stats(bn_init(1)[1], stats, unbiased=False).count.tolist() == [1]
    assert bn_update_stats(bn_init(1)[1], stats, unbiased=True).count.tolist() == [0]


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="float64 is off")
def test_statistics_that_overflow_the_dtype_of_the_state_are_unusable():
    stats = BNStats(jnp.array([1e300, 1.0, 1.0]), jnp.array([1.0, 1e300, 1.0]), jnp.full(3, 8, jnp.float32))
    after = bn_update_stats(bn_init(3)[1], stats)
    assert after.count.tolist() == [0, 0, 1]
    assert np.isfinite(after.mean).all()
    assert np.isfinite(after.var).all()


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="float64 is off")
@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
def test_the_state_keeps_its_dtype_whatever_the_batch_has(state_dtype, stats_dtype):
    state, stats = state_of(5, dtype=state_dtype), stats_of(5, dtype=stats_dtype)
    after = bn_update_stats(state, stats, momentum=0.5)
    assert [leaf.dtype for leaf in after] == [state_dtype, state_dtype, "int32"]
    w = oracle.weight(4, 0.5)
    assert_close(after.mean, (1 - w) * oracle.float64(state.mean) + w * oracle.float64(stats.mean))


def test_an_overflowing_batch_never_destroys_a_running_statistic():
    params, state = bn_init(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32).at[:, 1].mul(1e30)
    _, stats = bn_apply(params, state, x, train=True)
    after = bn_update_stats(state, stats)
    assert after.count.tolist() == [1, 0, 1]
    assert (after.mean[1], after.var[1]) == (0, 1)


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    inner: Any
    outer: Any


CONTAINERS = {
    "dict": lambda a, b: {"a": a, "b": b},
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "NamedTuple": Pair,
    "dataclass": Block,
    "nested": lambda a, b: {"blocks": [Pair(a, None), Block((b,), {})], "head": None},
    "with None": lambda a, b: [None, a, None, (b, None)],
}


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_a_network_is_updated_node_by_node(wrap):
    states, batches = (state_of(3), state_of(5, 2)), (stats_of(3), stats_of(5, 4))
    after = bn_update_stats(wrap(*states), wrap(*batches), momentum=0.7)
    alone = [bn_update_stats(s, b, momentum=0.7) for s, b in zip(states, batches, strict=True)]
    assert type(after) is type(wrap(*states))
    assert_same_bits(after, wrap(*alone))


@pytest.mark.parametrize("taken", [stats_of(3), None, {"anything": [1, 2]}], ids=["stats", "None", "tree"])
def test_none_in_place_of_a_state_takes_anything_and_stays_none(taken):
    after = bn_update_stats([None, state_of(3)], [taken, stats_of(3)])
    assert after[0] is None
    assert bn_update_stats(None, taken) is None


def test_an_empty_network_stays_empty():
    assert bn_update_stats({}, {}) == {}
    assert bn_update_stats([(), {}], [(), {}]) == [(), {}]


@pytest.mark.parametrize("size", [(4, 4), (4, 3), (3, 4), (2, 4, 4)], ids=str)
def test_stacked_layers_equal_their_vmap(size):
    """(L, C) with L = C is the trap: nothing may broadcast a per-layer value along the channels."""
    state, stats = state_of(size), stats_of(size)
    state = state._replace(count=jnp.asarray(np.random.default_rng(3).integers(0, 9, size), jnp.int32))
    counts = np.random.default_rng(4).integers(0, 9, size).astype(np.float32)
    stats = stats._replace(mean=stats.mean.at[1, 2].set(jnp.nan), count=jnp.asarray(counts))
    assert_same_bits(bn_update_stats(state, stats), jax.vmap(bn_update_stats)(state, stats))


def test_no_gradient_is_carried_into_the_running_statistics():
    params, state = bn_init(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    def loss(x, mean, var, momentum):
        _, stats = bn_apply(params, state, x, train=True)
        after = bn_update_stats(BNState(mean, var, state.count + 2), stats, momentum=momentum)
        return (after.mean * after.var).sum()

    grads = jax.grad(loss, (0, 1, 2, 3))(x, state.mean, state.var, 0.9)
    assert all(not np.asarray(grad).any() for grad in grads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_structure_shape_and_dtype_are_kept_as_a_scan_carry(dtype):
    params, state = bn_init((2, 3), dtype=dtype)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 2, 3)), dtype)

    def step(state, x):
        y, stats = bn_apply(params, state, x, train=True, axis=(1, 2))
        return bn_update_stats(state, stats), y

    after, _ = jax.lax.scan(step, state, x)
    assert [(leaf.shape, leaf.dtype) for leaf in after] == [(leaf.shape, leaf.dtype) for leaf in state]
    assert (after.count == 5).all()
    one_by_one = state
    for batch in x:
        one_by_one, _ = step(one_by_one, batch)
    assert_close(after.mean, one_by_one.mean)
    assert_close(after.var, one_by_one.var)


def test_the_state_is_a_while_loop_carry():
    stats = stats_of(3)
    after = jax.lax.while_loop(lambda s: (s.count < 7).all(), lambda s: bn_update_stats(s, stats), bn_init(3)[1])
    assert after.count.tolist() == [7] * 3


def test_a_donated_state_is_reused_and_the_update_is_right():
    state, stats = bn_init(1024)[1], stats_of(1024)
    want = bn_update_stats(state, stats)
    update = jax.jit(bn_update_stats, donate_argnums=0)
    for _ in range(2):
        donated = jax.tree.map(jnp.copy, state)
        after = update(donated, stats)
        assert all(leaf.is_deleted() for leaf in donated)
        assert_same_bits(after, want)


def test_python_and_numpy_leaves_are_taken():
    state, stats = state_of(3), stats_of(3)
    assert_same_bits(bn_update_stats(*jax.tree.map(np.asarray, (state, stats))), bn_update_stats(state, stats))


def test_the_update_of_a_merge_is_the_update_of_the_whole_batch():
    params, state = bn_init(4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)) + 3, jnp.float32)
    _, whole = bn_apply(params, state, x, train=True)
    parts = [bn_apply(params, state, part, train=True)[1] for part in (x[:5], x[5:])]
    merged = bn_update_stats(state, bn_merge_stats(*parts))
    expected = bn_update_stats(state, whole)
    assert_close(merged.mean, expected.mean)
    assert_close(merged.var, expected.var)
