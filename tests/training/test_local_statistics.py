"""Each device with the statistics of its own share, and a batch that is bad on one device only."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.closeness import CHAIN, assert_close, assert_same_bits
from support.counting import compile_hlo
from support.nightly import by_day
from support.training import (
    OPTIMIZERS,
    SIZES,
    batch,
    mapped,
    mlp,
    setup,
    squared_error,
    start,
)

from jbn import _pool, bn_apply, networks
from jbn.training import make_train_step


def local_step(network, **options):
    options = {"axis_name": "data", "sync_stats": False} | options
    return make_train_step(network.apply, squared_error, OPTIMIZERS["momentum"], **options)


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    by_day(
        itertools.product(["shard_map", "unchecked", "vmap", "pmap"], [1, 2]),
        [("shard_map", 2), ("unchecked", 1), ("vmap", 2), ("pmap", 1)],
    ),
)
def test_local_statistics_are_ghost_batches_of_one_device(kind, accumulate):
    size = 64
    ghost = networks.mlp(SIZES, bn=partial(bn_apply, ghost_size=size // (8 * accumulate)))
    one = jax.jit(make_train_step(ghost.apply, squared_error, OPTIMIZERS["momentum"], accumulate=accumulate))
    many = mapped(kind, local_step(mlp(SIZES), accumulate=accumulate))
    got = want = (start(ghost, OPTIMIZERS["momentum"]), None)
    for seed in range(3):
        x, y = batch(size, seed)
        # Microbatch j on one device is the j-th part of every device's rows.
        by_micro = [v.reshape(8, accumulate, -1, v.shape[-1]).swapaxes(0, 1).reshape(v.shape) for v in (x, y)]
        got, want = many(got[0], (x, y)), one(want[0], tuple(by_micro))
        assert_close(got, want, roundings=CHAIN)


def test_local_statistics_differ_from_global_ones_in_what_normalizes_alone():
    """The running mean is that of the whole batch either way; what is learned from it is not."""
    network, old, _ = setup("z", "momentum")
    steps = [mapped("shard_map", local_step(network, sync_stats=sync)) for sync in (True, False)]
    (synced, _), (local, _) = (step(old, batch(64)) for step in steps)
    assert_close(local.bn_state[0], synced.bn_state[0], roundings=CHAIN)
    assert np.abs(local.params[0]["W"] - synced.params[0]["W"]).max() > 1e-3


def test_local_statistics_are_merged_over_two_mesh_axes():
    network, old, _ = setup("z", "momentum")
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = local_step(network, axis_name=("a", "b"))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(("a", "b"))), out_specs=P())
    assert_close(
        jax.jit(sharded)(old, batch(64)), mapped("shard_map", local_step(network))(old, batch(64)), roundings=CHAIN
    )


def test_a_network_without_statistics_has_none_to_merge():
    network, old, step = setup(None, "momentum")
    assert_close(mapped("shard_map", local_step(network))(old, batch(32)), step(old, batch(32)), roundings=CHAIN)


def test_local_statistics_of_all_layers_travel_together_and_once_a_step():
    network = networks.mlp((4, 6, 5, 2))
    old = start(network, OPTIMIZERS["momentum"])
    mesh = jax.make_mesh((8,), ("data",))
    step = local_step(network, accumulate=2)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    hlo, _ = compile_hlo(sharded, old, jax.device_put(batch(64), NamedSharding(mesh, P("data"))))
    (gathered,) = (line for line in hlo.text.splitlines() if " all-gather(" in line)
    assert "/while/" not in gathered


def test_many_devices_exchange_sums_rather_than_all_that_each_has_seen(monkeypatch):
    network, old, _ = setup("z", "momentum")
    gathered = mapped("shard_map", local_step(network))(old, batch(64))
    monkeypatch.setattr(_pool, "_MOST_GATHERED", 4)
    summing = mapped("shard_map", local_step(network))
    assert_close(summing(old, batch(64)), gathered, roundings=CHAIN)
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.shard_map(local_step(network), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    hlo, _ = compile_hlo(sharded, old, jax.device_put(batch(64), NamedSharding(mesh, P("data"))))
    assert " all-gather(" not in hlo.text


def test_without_an_axis_there_is_nothing_to_leave_apart():
    network, old, step = setup("z", "momentum")
    assert_same_bits(jax.jit(local_step(network, axis_name=None))(old, batch()), step(old, batch()))


@pytest.mark.parametrize(("devices", "sync_stats"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize(
    ("dtype", "bad"),
    by_day(
        [("float32", "nan"), ("bfloat16", "nan"), ("bfloat16", "3.4e38")], [("float32", "nan"), ("bfloat16", "3.4e38")]
    ),
)
def test_a_batch_that_is_bad_on_one_device_is_skipped_by_all_of_them(dtype, bad, devices, sync_stats):
    network = networks.mlp((4, 6, 2), dtype=jnp.dtype(dtype))
    old = start(network, OPTIMIZERS["momentum"])
    step = jax.jit(local_step(network, axis_name=None))
    if devices == 8:
        step = mapped("shard_map", local_step(network, sync_stats=sync_stats))
    before, metrics = step(old, batch(32))
    assert not metrics["skipped"]
    x, y = batch(32, seed=1)
    assert jnp.isinf(jnp.bfloat16(3.4e38))
    after, metrics = step(before, (x.at[9].set(float(bad)), y))
    assert metrics["skipped"]
    assert_same_bits(after[:3], before[:3])
    assert after.step == 2
    for leaf in jax.tree.leaves(after):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)
    goes_on, metrics = step(after, batch(32, seed=2))
    assert not metrics["skipped"]
    assert (goes_on.bn_state[0].count == 2).all()
    assert (goes_on.params[0]["W"] != after.params[0]["W"]).any()
