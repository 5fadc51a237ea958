"""The training step under jit, donation, scan, vmap, pmap and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.closeness import CHAIN, assert_close, assert_same_bits
from support.counting import compile_hlo
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

from jbn.training import TrainState, make_train_step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_second_step_is_not_traced_again(accumulate):
    network, traces = mlp(SIZES), []

    def loss_fn(outputs, y):
        traces.append(outputs.shape)
        return squared_error(outputs, y)

    optimizer = OPTIMIZERS["adam"]
    step = jax.jit(make_train_step(network.apply, loss_fn, optimizer, accumulate=accumulate))
    params, bn_state = network.init(jax.random.key(0))
    train_state = TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))
    train_state, _ = step(train_state, batch())
    once = len(traces)
    for seed in range(3):
        train_state, _ = step(train_state, batch(seed=seed))
    assert len(traces) == once >= 1
    assert step._cache_size() == 1


def test_the_train_state_can_be_donated():
    network, _, step = setup("z", "adam")
    params, bn_state = network.init(jax.random.key(0))
    old = TrainState(params, bn_state, OPTIMIZERS["adam"].init(params), jnp.zeros((), jnp.int32))
    want = step(old, batch())
    got = jax.jit(step, donate_argnums=0)(old, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert_same_bits(got, want)


def test_the_train_state_is_a_carry_of_scan():
    _, old, step = setup("z", "adam")
    batches = [batch(seed=seed) for seed in range(4)]
    want, losses = old, []
    for one in batches:
        want, metrics = step(want, one)
        losses.append(metrics["loss"])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    got, metrics = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(old, stacked)
    assert_close(got, want, roundings=CHAIN)
    assert_close(metrics["loss"], jnp.stack(losses), roundings=CHAIN)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_ensemble_of_train_states_is_a_vmap_and_each_member_skips_alone(accumulate):
    network, _, step = setup("z", "adam", accumulate=accumulate)
    members = [start(network, OPTIMIZERS["adam"], key) for key in (0, 10, 20)]
    x, y = batch()
    xs = jnp.stack([x, x.at[0, 0].set(jnp.inf), x + 1])
    got, metrics = jax.jit(jax.vmap(step, in_axes=(0, (0, None))))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), (xs, y)
    )
    np.testing.assert_array_equal(metrics["skipped"], [False, True, False])
    for i, member in enumerate(members):
        want, _ = step(member, (xs[i], y))
        assert_close(jax.tree.map(lambda leaf: leaf[i], got), want, roundings=CHAIN)  # noqa: B023


@pytest.mark.parametrize("norm", ["z", None])
def test_a_sharded_step_is_the_step_on_the_whole_batch(norm):
    network, old, step = setup(norm, "momentum")
    sharded = mapped(
        "shard_map", make_train_step(network.apply, squared_error, OPTIMIZERS["momentum"], axis_name="data")
    )
    got = want = (old, None)
    for seed in range(2):
        got, want = sharded(got[0], batch(32, seed)), step(want[0], batch(32, seed))
    assert_close(got, want, roundings=CHAIN)
    x, y = batch(32)
    bad, metrics = sharded(got[0], (x.at[9].set(jnp.nan), y))
    assert metrics["skipped"]
    assert_same_bits(bad[:3], got[0][:3])


@pytest.mark.parametrize("kind", ["vmap", "pmap", "unchecked"])
def test_other_ways_to_bind_the_axis_give_the_same_update(kind):
    network, old, step = setup()
    split = make_train_step(network.apply, squared_error, OPTIMIZERS["sgd"], axis_name="data")
    assert_close(mapped(kind, split)(old, batch(32)), step(old, batch(32)), roundings=CHAIN)


def test_accumulation_on_many_devices_merges_the_same_microbatch_of_all_of_them():
    network, old, step = setup(accumulate=2)
    split = make_train_step(network.apply, squared_error, OPTIMIZERS["sgd"], accumulate=2, axis_name="data")
    got = mapped("shard_map", split)(old, batch(32))
    # Microbatch j is the j-th half of every device's rows.
    by_micro = jax.tree.map(lambda leaf: leaf.reshape(8, 2, 2, -1).swapaxes(0, 1).reshape(leaf.shape), batch(32))
    assert_close(got, step(old, by_micro), roundings=CHAIN)


def test_devices_exchange_all_gradients_at_once_and_once_a_step():
    network, old, _ = setup(None)
    split = make_train_step(network.apply, squared_error, OPTIMIZERS["sgd"], accumulate=4, axis_name="data")
    mesh = jax.make_mesh((8,), ("data",))
    shard = jax.shard_map(split, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    sharded_batch = jax.device_put(batch(32), NamedSharding(mesh, P("data")))
    hlo, _ = compile_hlo(shard, old, sharded_batch)
    assert len(hlo.collectives()) <= 2  # and the loss, for each microbatch
    (of_gradients,) = (line for line in hlo.text.splitlines() if " all-reduce(" in line and "f32[4,6]" in line)
    assert "/while/" not in of_gradients
