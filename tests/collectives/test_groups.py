"""Statistics synchronized within groups: each group is as if computed alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from support.closeness import assert_close, assert_same_bits
from support.counting import Hlo, compile_hlo
from support.eight import D, N, loss_of, mask_spec, mesh, problem, split
from support.nightly import by_day

from jbn import BNState, BNStats, bn_apply

PAIRS = tuple((i, i + 1) for i in range(0, D, 2))
GROUPS = {
    "pairs": PAIRS,
    "unequal": ((5, 0, 3), (7,), (1, 2, 4, 6)),
    "halves apart": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "all": (tuple(range(D)),),
}
ROWS = N // D


def rows_of(group):
    return np.concatenate([np.arange(i * ROWS, (i + 1) * ROWS) for i in group])


def each_alone(groups, params, x, weights, mask, ghost_size=None):
    """(gradients, (y, stats of each device)) by one unsharded call for each group, with every device's loss."""

    def loss(params, x):
        total, y, stats = 0.0, jnp.zeros_like(x), [None] * D
        for group in groups:
            rows = rows_of(group)
            seen = None if mask is None else mask[rows]
            part, of_group = bn_apply(params, None, x[rows], train=True, mask=seen, ghost_size=ghost_size)
            of_y, of_stats = loss_of(part, of_group, weights[rows], seen)
            total += of_y + len(group) * of_stats
            y = y.at[rows].set(part)
            for i in group:
                stats[i] = of_group
        return total, (y, jax.tree.map(lambda *v: jnp.stack(v), *stats))

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


def in_shard_map(groups, params, x, weights, mask, **options):
    @partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=(P(), P("data"), P("data"), mask_spec(mask)),
        out_specs=((P(), P("data")), (P("data"), BNStats(*(P("data"),) * 3))),
    )
    def run(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(
                params, None, x, train=True, mask=mask, axis_name="data", axis_index_groups=groups, **options
            )
            return lax.psum(sum(loss_of(y, stats, weights, mask)), "data"), (y, stats)

        gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return gradients, (y, jax.tree.map(lambda v: v[None], stats))

    return jax.jit(run)(params, x, weights, mask)


def by_rows(map_over, groups, params, x, weights, mask):
    def member(params, x, weights, mask=None):
        y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data", axis_index_groups=groups)
        return sum(loss_of(y, stats, weights, mask)), (y, stats)

    def loss(params, x):
        args = (params, split(x), split(weights)) + (() if mask is None else (split(mask),))
        axes = (None,) + (0,) * (len(args) - 1)
        losses, (y, stats) = map_over(member, axis_name="data", in_axes=axes)(*args)
        return jnp.sum(losses), (y.reshape(x.shape), stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


WAYS = {"shard_map": in_shard_map, "vmap": partial(by_rows, jax.vmap), "pmap": partial(by_rows, jax.pmap)}
MASKS = (None, "unequal masks", "an empty shard")
OTHERS = [("shard_map", groups, None) for groups in GROUPS if groups != "unequal"]


@pytest.mark.parametrize(
    ("way", "groups", "mask"),
    by_day(
        [(way, "unequal", mask) for way in WAYS for mask in MASKS] + OTHERS,
        [("shard_map", "unequal", mask) for mask in MASKS]
        + [("vmap", "unequal", "an empty shard"), ("pmap", "unequal", "unequal masks"), *OTHERS],
    ),
)
def test_values_gradients_and_statistics_are_those_of_each_group_alone(way, groups, mask):
    params, x, weights, mask = problem(mask=mask)
    groups = GROUPS[groups]
    got = WAYS[way](groups, params, x, weights, mask)
    assert_close(got, each_alone(groups, params, x, weights, mask))


def test_a_nan_stays_in_its_group():
    params, x, weights, _ = problem()
    bad = x.at[rows_of((7,))[0], 2].set(jnp.nan)  # alone in its group
    _, (y, stats) = in_shard_map(GROUPS["unequal"], params, bad, weights, None)
    hit = np.zeros(x.shape, bool)
    hit[rows_of((7,)), 2] = True
    np.testing.assert_array_equal(np.isnan(y), hit)
    assert np.isnan(stats.mean).sum() == 1


def test_blocks_on_devices_merge_their_statistics_within_the_group():
    params, x, weights, _ = problem()
    # Of each block three values count, of the first none; a gradient through one value alone is 300-fold rounding.
    mask = jnp.asarray((np.arange(N) % 4 < 3) & (np.arange(N) >= 4))[:, None]
    got = in_shard_map(GROUPS["unequal"], params, x, weights, mask, ghost_size=4)
    assert_close(got, each_alone(GROUPS["unequal"], params, x, weights, mask, ghost_size=4))


def test_renormalization_is_by_the_statistics_of_the_group():
    params, x, _, _ = problem()
    state = BNState(jnp.full(5, 0.3), jnp.full(5, 2.0), jnp.full(5, 7))
    groups = GROUPS["unequal"]

    def member(x):
        options = {"axis_name": "data", "axis_index_groups": groups, "renorm": (1.2, 0.1)}
        return bn_apply(params, state, x, train=True, **options)[0]

    y = jax.jit(jax.vmap(member, axis_name="data"))(split(x)).reshape(x.shape)
    for group in groups:
        alone, _ = bn_apply(params, state, x[rows_of(group)], train=True, renorm=(1.2, 0.1))
        assert_close(y[rows_of(group)], alone)


def test_one_value_a_device_is_enough_within_a_group():
    params, x, _, _ = problem()

    def member(x):
        return bn_apply(params, None, x, train=True, axis_name="data", axis_index_groups=PAIRS)[0]

    y = jax.vmap(member, axis_name="data")(x[:D, None])[:, 0]
    for pair in PAIRS:
        assert_close(y[np.array(pair)], bn_apply(params, None, x[np.array(pair)], train=True)[0])


def test_evaluation_ignores_groups():
    params, x, _, _ = problem()
    state = BNState(jnp.full(5, 0.3), jnp.full(5, 2.0), jnp.full(5, 7))
    got = bn_apply(params, state, x, train=False, axis_name="data", axis_index_groups=PAIRS)
    assert_same_bits(got, bn_apply(params, state, x, train=False))


def test_an_axis_of_a_mesh_of_its_own_is_the_same_as_groups():
    params, x, weights, mask = problem(mask="an empty shard")
    rows = P(("group", "member"))

    @partial(
        jax.shard_map,
        mesh=mesh((D // 2, 2), ("group", "member")),
        in_specs=(P(), rows, rows, rows),
        out_specs=((P(), rows), (rows, BNStats(*(P("group"),) * 3))),
    )
    def run(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="member")
            of_y, of_stats = loss_of(y, stats, weights, mask)
            return lax.psum(lax.psum(of_y, "member") + 2 * of_stats, "group"), (y, stats)

        gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return gradients, (y, jax.tree.map(lambda v: v[None], stats))

    gradients, (y, stats) = jax.jit(run)(params, x, weights, mask)
    of_each = jax.tree.map(lambda v: jnp.repeat(v, 2, 0), stats)  # replicated within a group: one row for each
    assert_close((gradients, (y, of_each)), in_shard_map(PAIRS, params, x, weights, mask))


@pytest.mark.parametrize("map_over", ["shard_map", "pmap"])
def test_one_collective_forward_and_one_backward_for_x(map_over):
    params, x, weights, _ = problem()

    def forward(x):
        return bn_apply(params, None, x, train=True, axis_name="data", axis_index_groups=GROUPS["unequal"])[0]

    def both(x, weights):
        y, vjp = jax.vjp(forward, x)
        return y, vjp(weights)[0]

    for fn, args, expected in ((forward, (x,), 1), (both, (x, weights), 2)):
        if map_over == "pmap":
            text = jax.pmap(fn, axis_name="data").lower(*map(split, args)).compile().as_text()
            hlo = Hlo(text)
        else:
            specs = (P("data"),) * len(args)
            run = jax.shard_map(fn, mesh=mesh(), in_specs=specs, out_specs=specs if fn is both else specs[0])
            hlo, _ = compile_hlo(run, *args)
        assert len(hlo.collectives()) == expected
