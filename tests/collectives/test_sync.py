"""Synchronized statistics on eight devices: values, gradients and statistics are those of the whole batch."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from support import plain
from support.closeness import assert_close
from support.eight import (
    MASKS,
    STATS,
    C,
    D,
    N,
    loss_of,
    mask_spec,
    mesh,
    problem,
    split,
    unsharded,
    whole,
)
from support.nightly import by_day

from jbn import BNStats, bn_apply, bn_init, bn_merge_stats, bn_update_stats

MASKED = pytest.mark.parametrize("mask", MASKS, ids=str)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("mask", [None, "an empty shard"], ids=str)
def test_shard_map_equals_the_whole_batch_differentiated_from_outside(mask, offset):
    params, x, weights, mask = problem(mask=mask, offset=offset)

    def loss(params, x, weights, mask):
        def shard(params, x, weights, mask):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
            of_y, of_stats = loss_of(y, stats, weights, mask)
            return lax.psum(of_y, "data") + of_stats, (y, stats)

        specs = (P(), P("data"), P("data"), mask_spec(mask))
        return jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=(P(), (P("data"), STATS)))(
            params, x, weights, mask
        )

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x, weights, mask)
    # Moments of float32 shards at an offset are pooled in another order than one batch is summed.
    assert_close((gradients, out), whole(params, x, weights, mask), roundings=16 if offset == 0 else 128)


@MASKED
def test_shard_map_equals_the_whole_batch_differentiated_inside(mask):
    params, x, weights, mask = problem(mask=mask)

    def shard(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
            of_y, of_stats = loss_of(y, stats, weights, mask)
            return lax.psum(of_y, "data") + of_stats, (y, stats)

        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return gradients, out

    specs = (P(), P("data"), P("data"), mask_spec(mask))
    out_specs = ((P(), P("data")), (P("data"), STATS))
    got = jax.jit(jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=out_specs))(params, x, weights, mask)
    assert_close(got, whole(params, x, weights, mask))


def by_rows(map_over, params, x, weights, mask):
    """(gradients, (y, stats)) of ``vmap`` or ``pmap`` with an axis name, differentiated from outside."""

    def member(params, x, weights, mask=None):
        y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
        return *loss_of(y, stats, weights, mask), (y, stats)

    def loss(params, x):
        args = (params, split(x), split(weights)) + (() if mask is None else (split(mask),))
        axes = (None,) + (0,) * (len(args) - 1)
        of_y, of_stats, (y, stats) = map_over(member, axis_name="data", in_axes=axes)(*args)
        return jnp.sum(of_y) + of_stats[0], (y.reshape(x.shape), jax.tree.map(lambda v: v[0], stats))

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return gradients, out


@pytest.mark.parametrize(
    ("map_over", "mask"),
    by_day(
        itertools.product(["vmap", "pmap"], MASKS),
        [*(("vmap", mask) for mask in MASKS), ("pmap", None), ("pmap", "an empty shard")],
    ),
)
def test_vmap_and_pmap_equal_the_whole_batch(map_over, mask):
    params, x, weights, mask = problem(mask=mask)
    assert_close(by_rows(getattr(jax, map_over), params, x, weights, mask), whole(params, x, weights, mask))


@pytest.mark.parametrize("map_over", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_every_member_of_a_named_axis_gets_the_same_stats(map_over):
    params, x, _, _ = problem()
    _, stats = map_over(lambda x: bn_apply(params, None, x, train=True, axis_name="data"), axis_name="data")(split(x))
    for leaf in stats:
        leaf = np.asarray(leaf)
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_gradients_taken_inside_vmap_are_those_of_all_losses_together():
    params, x, weights, _ = problem()

    def gradient(x, weights, axis_name=None):
        return jax.grad(
            lambda x: loss_of(*bn_apply(params, None, x, train=True, axis_name=axis_name), weights, None)[0]
        )(x)

    inside = jax.vmap(partial(gradient, axis_name="data"), axis_name="data")
    got = jax.jit(inside)(split(x), split(weights)).reshape(x.shape)
    assert_close(got, jax.jit(gradient)(x, weights))


def test_float64_shards_agree_with_the_plain_formula_to_1e_12():
    with jax.enable_x64(True):
        params, x, weights, mask = problem(jnp.float64, mask="an empty shard")
        params, weights = jax.tree.map(lambda v: v.astype(jnp.float64), (params, weights))

        def loss(fn, params, x):
            y, mean, var = fn(params, x)
            return jnp.sum(jnp.where(mask, weights * jnp.tanh(y), 0)) + jnp.sum(jnp.sin(mean) + jnp.sqrt(var))

        def ours(params, x):
            def shard(params, x, mask):
                y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
                return y, stats.mean, stats.var

            specs = (P(), P("data"), P("data"))
            return jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=(P("data"), P(), P()))(params, x, mask)

        def formula(params, x):
            return plain.train(x, *params, 1e-5, mask)

        got, expected = (jax.jit(jax.grad(partial(loss, fn), (0, 1)))(params, x) for fn in (ours, formula))
        assert_close(got, expected, roundings=2**13)
        hvps = [
            jax.jit(lambda p, x, f=fn: jax.jvp(jax.grad(partial(loss, f), (0, 1)), (p, x), (p, weights)))(params, x)
            for fn in (ours, formula)
        ]
        assert_close(*hvps, roundings=2**13)


def test_bfloat16_shards_give_the_statistics_and_outputs_of_the_whole_batch():
    params, x, weights, mask = problem(jnp.bfloat16, mask="unequal masks")

    def shard(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
            return lax.psum(loss_of(y, stats, weights, mask)[0], "data"), (y, stats)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    specs = (P(), P("data"), P("data"), P("data"))
    out_specs = ((P(), P("data")), (P("data"), STATS))
    gradients, (y, stats) = jax.jit(jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=out_specs))(
        params, x, weights, mask
    )

    def of_the_whole(params, x):
        y, stats = bn_apply(params, None, x, train=True, mask=mask)
        return loss_of(y, stats, weights, mask)[0], (y, stats)

    expected, (y_whole, stats_whole) = jax.jit(jax.grad(of_the_whole, (0, 1), has_aux=True))(params, x)
    assert_close(stats, stats_whole)
    assert_close(y, y_whole)  # one unit in the last place of bfloat16
    assert_close(gradients[0], expected[0], roundings=3, computed_in="bfloat16")
    assert_close(gradients[1], expected[1], roundings=3, computed_in="bfloat16")


def test_x_that_is_the_same_on_all_devices_counts_once_for_each():
    params, x, _, _ = problem()

    def shard(params, x):
        y, stats = bn_apply(params, None, x, train=True, axis_name="data")
        return y, stats, lax.psum(jnp.sum(jnp.tanh(y)), "data")

    @partial(jax.shard_map, mesh=mesh(), in_specs=(P(), P()), out_specs=(P("data"), STATS, (P(), P())))
    def run(params, x):
        y, stats, _ = shard(params, x)
        return y, stats, jax.grad(lambda p, x: shard(p, x)[2], (0, 1))(params, x)

    y, stats, gradients = jax.jit(run)(params, x)
    tiled = jnp.tile(x, (D, 1))

    def total(params, x):
        return jnp.sum(jnp.tanh(bn_apply(params, None, jnp.tile(x, (D, 1)), train=True)[0]))

    assert_close((y, stats), bn_apply(params, None, tiled, train=True))
    assert_close(gradients, jax.jit(jax.grad(total, (0, 1)))(params, x), roundings=128)


@pytest.mark.parametrize("names", ["data", "model", ("data", "model"), ("model", "data")], ids=str)
def test_two_mesh_axes_are_synchronized_over_one_or_both(names):
    params, x, weights, mask = problem(mask="an empty shard")
    over = names if isinstance(names, tuple) else (names,)
    apart = tuple(n for n in ("data", "model") if n not in over)
    rows = P(("data", "model"))

    @partial(
        jax.shard_map,
        mesh=mesh((4, 2), ("data", "model")),
        in_specs=(P(), rows, rows, rows),
        out_specs=((P(), rows), (rows, BNStats(*(P(apart or None),) * 3))),
    )
    def run(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name=names)
            return lax.psum(loss_of(y, stats, weights, mask)[0], ("data", "model")), (y, stats)

        gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return gradients, (y, jax.tree.map(lambda v: v[None] if apart else v, stats))

    got = jax.jit(run)(params, x, weights, mask)

    def group(a):
        """(groups, members, …): devices that share their statistics."""
        a = a.reshape(4, 2, N // D, *a.shape[1:])
        a = {"data": jnp.swapaxes(a, 0, 1), "model": a}.get(names, a.reshape(1, 8, *a.shape[2:]))
        return a.reshape(a.shape[0], -1, a.shape[-1])

    def ungroup(a):
        a = a.reshape(a.shape[0], -1, N // D, a.shape[-1])
        return (jnp.swapaxes(a, 0, 1) if names == "data" else a).reshape(N, -1)

    def loss(params, x):
        y, stats = jax.vmap(lambda x, m: bn_apply(params, None, x, train=True, mask=m))(group(x), group(mask))
        return jnp.sum(jnp.where(mask, weights * jnp.tanh(ungroup(y)), 0)), (ungroup(y), stats)

    gradients, (y, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    stats = stats if apart else jax.tree.map(lambda v: v[0], stats)
    assert_close(got, (gradients, (y, stats)))


def test_channels_may_be_sharded_over_another_axis():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, 6)), jnp.float32)
    params, state = bn_init(6)
    channels = P("model")

    @partial(
        jax.shard_map,
        mesh=mesh((4, 2), ("data", "model")),
        in_specs=(channels, channels, P("data", "model")),
        out_specs=(P("data", "model"), channels),
    )
    def run(params, state, x):
        y, stats = bn_apply(params, state, x, train=True, axis_name="data")
        return y, bn_update_stats(state, stats)

    y, stats = bn_apply(params, state, x, train=True)
    assert_close(jax.jit(run)(params, state, x), (y, bn_update_stats(state, stats)))


@pytest.mark.parametrize("mode", ["jvp", "hvp"])
@pytest.mark.parametrize("mask", [None, "an empty shard"], ids=str)
def test_forward_mode_and_hessian_vector_products_inside_shard_map(mode, mask):
    params, x, weights, mask = problem(mask=mask)
    directions = (jax.tree.map(jnp.cos, params), jnp.sin(3 * x))

    def derivative(loss, primals, tangents):
        fn = loss if mode == "jvp" else jax.grad(loss, (0, 1))
        return jax.jvp(fn, primals, tangents)[1]

    def shard(params, x, weights, mask, tangents):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data")
            of_y, of_stats = loss_of(y, stats, weights, mask)
            return lax.psum(of_y, "data") + of_stats

        return derivative(loss, (params, x), tangents)

    specs = (P(), P("data"), P("data"), mask_spec(mask), (P(), P("data")))
    out_specs = P() if mode == "jvp" else (P(), P("data"))
    got = jax.jit(jax.shard_map(shard, mesh=mesh(), in_specs=specs, out_specs=out_specs))(
        params, x, weights, mask, directions
    )
    alone = partial(derivative, lambda p, x: unsharded(p, x, weights, mask)[0])
    expected = jax.jit(alone)((params, x), directions)
    assert_close(got, expected, roundings=128)


def test_stats_and_state_come_out_replicated_and_may_be_carried():
    params, x, _, _ = problem()
    _, state = bn_init(C)

    @partial(jax.shard_map, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())
    def run(state, x):
        def step(state, _):
            _, stats = bn_apply(params, state, x, train=True, axis_name="data")
            return bn_update_stats(state, stats), stats

        return lax.scan(step, state, length=3)[0]

    expected = state
    for _ in range(3):
        expected = bn_update_stats(expected, bn_apply(params, expected, x, train=True)[1])
    assert_close(jax.jit(run)(state, x), expected)


def test_local_statistics_are_merged_before_the_update():
    params, x, _, _ = problem()
    _, state = bn_init(C)

    @partial(jax.shard_map, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    def run(state, x):
        y, stats = bn_apply(params, state, x, train=True)
        gathered = jax.tree.map(lambda v: lax.all_gather(v, "data", to="invarying"), stats)
        return y, bn_update_stats(state, bn_merge_stats(gathered, axis=0))

    y, new = jax.jit(run)(state, x)
    local = jax.vmap(lambda x: bn_apply(params, state, x, train=True)[0])(split(x)).reshape(x.shape)
    assert_close((y, new), (local, bn_update_stats(state, bn_apply(params, state, x, train=True)[1])))
