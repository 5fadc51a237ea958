"""`bn_merge_stats`: the moments of parts are those of their union, exactly."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, bits

from jbn import BNParams, BNStats, bn_apply, bn_merge_stats


def stats_of(x):
    """Moments of rows, computed in float64 and rounded once."""
    mean, var, count = oracle.moments(x)
    return BNStats(*(jnp.asarray(leaf, jnp.float32) for leaf in (mean, var, count)))


def nothing(size):
    return BNStats(*(jnp.zeros(size, jnp.float32) for _ in range(3)))


def random_stats(size, seed=0, counts=(0, 1, 2, 17)):
    rng = np.random.default_rng(seed)
    return BNStats(
        jnp.asarray(rng.normal(size=size), jnp.float32),
        jnp.asarray(rng.uniform(0, 2, size), jnp.float32),
        jnp.asarray(rng.choice(counts, size=size), jnp.float32),
    )


def assert_moments(got, want, roundings=16):
    assert isinstance(got, BNStats)
    for actual, desired in zip(got, want, strict=True):
        assert_close(actual, desired, roundings=roundings)


@pytest.mark.parametrize("cuts", [(20,), (1,), (1, 2, 3), (5, 5, 30), (0, 40)], ids=str)
def test_merging_parts_is_measuring_their_concatenation(cuts):
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.arange(1, 7) + np.arange(6)
    parts = [stats_of(part) for part in np.split(x, cuts)]
    assert_moments(bn_merge_stats(*parts), oracle.moments(x))


def test_merging_what_bn_apply_returns_is_measuring_the_whole_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 3, 6)) + 5, jnp.float32)
    parts = [bn_apply(BNParams(None, None), None, part, train=True)[1] for part in (x[:1], x[1:11], x[11:])]
    assert_moments(bn_merge_stats(*parts), oracle.moments(x))


def test_one_argument_is_returned_as_it_is():
    stats = random_stats(50, counts=(1, 3, 8))
    assert list(map(bits, bn_merge_stats(stats))) == list(map(bits, stats))


def test_merging_is_associative():
    a, b, c = (random_stats(50, seed) for seed in range(3))
    left = bn_merge_stats(bn_merge_stats(a, b), c)
    right = bn_merge_stats(a, bn_merge_stats(b, c))
    for first, second in itertools.combinations((left, right, bn_merge_stats(a, b, c)), 2):
        assert_moments(first, second)


def test_merging_is_commutative():
    a, b, c = (random_stats(50, seed) for seed in range(3))
    assert_moments(bn_merge_stats(c, a, b), bn_merge_stats(a, b, c))


def test_nothing_seen_is_the_neutral_element_bit_for_bit():
    a = random_stats(50, counts=(1, 3, 8))
    for merged in (bn_merge_stats(a, nothing(50)), bn_merge_stats(nothing(50), a, nothing(50))):
        assert list(map(bits, merged)) == list(map(bits, a))


def test_nothing_merged_with_nothing_is_nothing():
    merged = bn_merge_stats(nothing(3), nothing(3), nothing(3))
    assert list(map(bits, merged)) == list(map(bits, nothing(3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_an_empty_part_holds_does_not_matter(bad):
    a, empty = (
        random_stats(5, counts=(1, 3, 8)),
        BNStats(*jnp.full((2, 5), bad, jnp.float32), jnp.zeros(5, jnp.float32)),
    )
    merged = bn_merge_stats(empty, a)
    assert list(map(bits, merged)) == list(map(bits, a))


@pytest.mark.parametrize("field", ["mean", "var"])
def test_a_part_that_holds_nan_spoils_its_own_channel_alone(field):
    a, b = (random_stats(5, seed, counts=(1, 3, 8)) for seed in range(2))
    spoiled = b._replace(**{field: getattr(b, field).at[2].set(jnp.nan)})
    merged, clean = bn_merge_stats(a, spoiled), bn_merge_stats(a, b)
    assert not (np.isfinite(merged.mean[2]) and np.isfinite(merged.var[2]))
    for got, want in zip(merged, clean, strict=True):
        assert bits(jnp.delete(got, 2)) == bits(jnp.delete(want, 2))


def test_counts_of_each_channel_stand_alone():
    x = np.random.default_rng(0).normal(size=(40, 6)) + 3
    masks = np.random.default_rng(1).uniform(size=(4, 40, 6)) < np.array([0, 0.2, 0.5, 0.9])[:, None, None]
    masks &= np.cumsum(masks, axis=0) == 1  # disjoint
    assert (masks[1:].sum((1, 2)) > 0).all()
    parts = [BNStats(*(jnp.asarray(leaf, jnp.float32) for leaf in oracle.moments(x, mask=mask))) for mask in masks]
    assert_moments(bn_merge_stats(*parts), oracle.moments(x, mask=masks.any(0)))


@pytest.mark.parametrize("ratio", [1, 1e2, 1e4])
def test_parts_far_from_zero_merge_exactly(ratio):
    """The merge adds no cancellation of its own; the rounded means of the parts set the limit."""
    rng = np.random.default_rng(0)
    parts = [
        BNStats(
            jnp.asarray(rng.normal(size=6) * 0.3 + ratio, jnp.float32),
            jnp.asarray(rng.uniform(0.5, 2, 6), jnp.float32),
            jnp.full(6, m, jnp.float32),
        )
        for m in (1, 10, 1000, 3)
    ]
    got, want = bn_merge_stats(*parts), oracle.merge(parts)
    np.testing.assert_allclose(got.mean, want.mean, rtol=4e-7)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-6)


def test_the_spread_between_means_is_exact_where_the_parts_have_none():
    a = BNStats(*jnp.array([[1e4], [0], [1]], jnp.float32))
    b = BNStats(*jnp.array([[1e4 + 1], [0], [1]], jnp.float32))
    merged = bn_merge_stats(a, b)
    assert (merged.mean.item(), merged.var.item(), merged.count.item()) == (1e4 + 0.5, 0.25, 2)


def test_many_batches_of_one_value_each_merge_into_the_moments_of_all():
    x = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32) + 100
    stack = BNStats(jnp.asarray(x), jnp.zeros_like(x), jnp.ones_like(x))
    merged = bn_merge_stats(stack, axis=0)
    np.testing.assert_allclose(merged.var, oracle.moments(x).var, rtol=1e-5)


@pytest.mark.parametrize("size", [(5,), (2, 3)], ids=str)
def test_a_stack_along_axis_zero_merges_like_its_parts(size):
    parts = [random_stats(size, seed) for seed in range(4)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    assert_moments(bn_merge_stats(stack, axis=0), oracle.merge(parts))
    assert_moments(bn_merge_stats(stack, axis=0), bn_merge_stats(*parts), roundings=4)


def test_stacks_of_different_lengths_merge_with_each_other():
    parts = [random_stats(5, seed) for seed in range(5)]
    stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *group) for group in (parts[:2], parts[2:])]
    assert_moments(bn_merge_stats(*stacks, axis=0), oracle.merge(parts))


def test_another_axis_than_the_first_can_hold_the_stack():
    parts = [random_stats(5, seed) for seed in range(3)]
    for axis in (1, -1):
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *parts)
        assert_moments(bn_merge_stats(stack, axis=axis), oracle.merge(parts))


def test_an_empty_stack_is_nothing_seen():
    stack = nothing((0, 3))
    assert list(map(bits, bn_merge_stats(stack, axis=0))) == list(map(bits, nothing(3)))


@pytest.mark.parametrize("size", [(4, 4), (4, 3), (2, 4, 4)], ids=str)
def test_stacked_layers_equal_their_vmap(size):
    """(L, C) with L = C is the trap: without axis= nothing is a stack to be merged."""
    a, b = random_stats(size, 0), random_stats(size, 1)
    merged = bn_merge_stats(a, b)
    assert merged.mean.shape == size
    mapped = jax.vmap(bn_merge_stats)(a, b)
    assert list(map(bits, merged)) == list(map(bits, mapped))
    assert_moments(merged, oracle.merge((a, b)))


def test_stacks_of_stacked_layers_equal_their_vmap():
    stack = random_stats((4, 4, 4))
    merged = bn_merge_stats(stack, axis=0)
    mapped = jax.vmap(lambda s: bn_merge_stats(s, axis=0), in_axes=1)(stack)
    assert_moments(merged, mapped, roundings=2)
    assert_moments(merged, oracle.merge([jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(4)]))


class Pair(NamedTuple):
    first: Any
    second: Any


def test_networks_merge_node_by_node_and_none_stays_none():
    def network(seed):
        return {"blocks": [Pair(random_stats(3, seed), None), (random_stats(5, seed + 10),)], "head": None}

    merged = bn_merge_stats(*(network(seed) for seed in range(3)))
    assert jax.tree.structure(merged) == jax.tree.structure(network(0))
    assert_moments(merged["blocks"][0].first, oracle.merge([random_stats(3, seed) for seed in range(3)]))
    assert_moments(merged["blocks"][1][0], oracle.merge([random_stats(5, seed + 10) for seed in range(3)]))


def test_networks_of_stacks_merge_along_the_stack():
    parts = [{"a": random_stats(3, seed), "b": [random_stats(5, seed + 10), None]} for seed in range(4)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    merged = bn_merge_stats(stack, axis=0)
    assert_moments(merged["a"], oracle.merge([part["a"] for part in parts]))
    assert_moments(merged["b"][0], oracle.merge([part["b"][0] for part in parts]))
    assert merged["b"][1] is None


def test_statistics_gathered_by_scan_merge_into_those_of_all_microbatches():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 6)) + 2, jnp.float32)

    def step(carry, part):
        return carry, bn_apply(BNParams(None, None), None, part, train=True)[1]

    _, stack = jax.lax.scan(step, None, x.reshape(4, 6, 6))
    assert_moments(bn_merge_stats(stack, axis=0), oracle.moments(x))


def test_gradients_through_a_merge_are_those_of_the_whole_batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 4)) + 2, jnp.float32)
    g_mean, g_var = (rng.normal(size=4).astype(np.float32) for _ in range(2))

    def loss(x):
        parts = [bn_apply(BNParams(None, None), None, part, train=True)[1] for part in (x[:2], x[2:9], x[9:])]
        merged = bn_merge_stats(*parts)
        return jnp.vdot(merged.mean, g_mean) + jnp.vdot(merged.var, g_var)

    want = oracle.gradients(x, np.zeros_like(x), g_mean=g_mean, g_var=g_var)
    assert_close(jax.jit(jax.grad(loss))(x), want.x, roundings=64)


def test_gradients_through_a_merge_with_nothing_are_finite():
    a, empty = random_stats(4, counts=(3, 8)), nothing(4)

    def loss(a, empty):
        merged = bn_merge_stats(a, empty)
        return merged.mean.sum() + jnp.sqrt(merged.var).sum() + merged.count.sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(a, empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(grads[0].mean, 1, rtol=1e-6)
    nowhere = jax.grad(lambda e: bn_merge_stats(e, e).mean.sum())(empty)
    assert all(np.isfinite(leaf).all() for leaf in nowhere)


def test_counts_add_up_beyond_what_float32_counts_by_one():
    a = BNStats(*jnp.array([[0], [1], [2.0**24]], jnp.float32))
    merged = bn_merge_stats(a, a, a)
    assert merged.count.item() == 3 * 2.0**24


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="float64 is off")
def test_float64_statistics_merge_in_float64():
    x = np.random.default_rng(0).normal(size=(40, 6)) + 1e6
    parts = [bn_apply(BNParams(None, None), None, part, train=True)[1] for part in (x[:7], x[7:])]
    merged = bn_merge_stats(*parts)
    assert [leaf.dtype for leaf in merged] == ["float64", "float64", "float32"]
    np.testing.assert_allclose(merged.var, oracle.moments(x).var, rtol=1e-8)


def test_numpy_leaves_and_jit_give_the_same():
    a, b = random_stats(5, 0), random_stats(5, 1)
    want = bn_merge_stats(a, b)
    host = bn_merge_stats(*jax.tree.map(np.asarray, (a, b)))
    compiled = jax.jit(bn_merge_stats)(a, b)
    assert_moments(host, want, roundings=2)
    assert_moments(compiled, want, roundings=2)
    assert all(isinstance(leaf, jax.Array) for leaf in host)
