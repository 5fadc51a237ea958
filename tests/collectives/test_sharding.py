"""Sharded arrays without an axis name, explicit meshes, evaluation, and errors on several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.closeness import assert_close
from support.counting import compile_hlo
from support.eight import STATS, C, D, N, mesh, problem, unsharded, whole

from jbn import BNState, bn_apply, bn_init, bn_update_stats


@pytest.mark.parametrize("mask", [None, "an empty shard"], ids=str)
def test_jit_over_sharded_arrays_needs_no_axis_name_and_gathers_no_activations(mask):
    params, x, weights, mask = problem(mask=mask)
    over = NamedSharding(mesh(), P("data"))
    placed = [None if a is None else jax.device_put(a, over) for a in (x, weights, mask)]
    params_there = jax.device_put(params, NamedSharding(mesh(), P()))
    step = jax.value_and_grad(unsharded, (0, 1), has_aux=True)
    (_, out), gradients = jax.jit(step)(params_there, *placed)
    assert_close((gradients, out), whole(params, x, weights, mask))
    assert out[0].sharding.is_equivalent_to(over, 2)
    hlo, _ = compile_hlo(step, params_there, *placed)
    assert hlo.collectives()
    assert all(max(c.sizes, default=0) < x.size // 2 for c in hlo.collectives())


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, "model")], ids=str)
def test_an_explicit_mesh_gathers_no_activations_and_no_cotangents(spec):
    m = mesh((4, 2), ("data", "model"), kind=AxisType.Explicit)
    channels = P(spec[1]) if len(spec) > 1 else P()
    x = jax.device_put(jax.random.normal(jax.random.key(0), (256, 8)), NamedSharding(m, spec))
    params, state = jax.device_put(bn_init(8), NamedSharding(m, channels))

    def loss(params, x):
        y, _ = bn_apply(params, state, x, train=True)
        return jnp.sum(lax.square(y) * y)

    hlo, _ = compile_hlo(jax.grad(loss, (0, 1)), params, x)
    # Channels alone have nothing to tell each other, but whether one of them is to be read again.
    assert any(max(c.sizes) > 1 for c in hlo.collectives()) == ("data" in spec)
    assert all(max(c.sizes, default=0) < x.size // 16 for c in hlo.collectives())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_explicit_meshes_keep_the_sharding_of_the_state(train):
    params, x, _, _ = problem()
    _, state = bn_init(C)
    m = mesh(kind=AxisType.Explicit)
    with jax.set_mesh(m):
        rows = jax.device_put(x, NamedSharding(m, P("data", None)))
        params_there, state_there = jax.device_put((params, state), NamedSharding(m, P()))

        @jax.jit
        def step(params, state, x):
            y, stats = bn_apply(params, state, x, train=train)
            new = bn_update_stats(state, stats)
            for before, after in zip(state, new, strict=True):
                assert jax.typeof(after) == jax.typeof(before)  # the type carries the sharding
            assert jax.typeof(y) == jax.typeof(x)
            return y, new

        y, new = step(params_there, state_there, rows)

        @jax.jit
        def carried(params, state, x):
            return lax.scan(lambda s, _: (step(params, s, x)[1], None), state, length=2)[0]

        again = carried(params_there, state_there, rows)
        gradient = jax.jit(
            jax.grad(lambda x: jnp.sum(jnp.tanh(bn_apply(params_there, state_there, x, train=train)[0])))
        )(rows)
        assert jax.typeof(gradient) == jax.typeof(rows)
    expected, stats = bn_apply(params, state, x, train=train)
    updated = bn_update_stats(state, stats)
    assert_close((y, new), (expected, updated))
    assert_close(again, bn_update_stats(updated, stats) if train else state)


@pytest.mark.parametrize("spec", [P(None, "data"), P("data", None)], ids=str)
def test_explicit_meshes_may_shard_the_channels(spec):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, 16)), jnp.float32)
    params, state = bn_init(16)
    m = mesh(kind=AxisType.Explicit)
    with jax.set_mesh(m):
        placed = jax.device_put(x, NamedSharding(m, spec))
        vectors = NamedSharding(m, P(spec[1]))
        params_there, state_there = jax.device_put((params, state), vectors)

        @jax.jit
        def step(params, state, x):
            y, stats = bn_apply(params, state, x, train=True)
            return y, bn_update_stats(state, stats)

        y, new = step(params_there, state_there, placed)
        assert jax.typeof(y) == jax.typeof(placed)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state_there)
    expected, stats = bn_apply(params, state, x, train=True)
    assert_close((y, new), (expected, bn_update_stats(state, stats)))


def test_evaluation_needs_no_bound_axis_name():
    params, x, _, _ = problem()
    _, state = bn_init(C)
    y, stats = bn_apply(params, state, x, train=False, axis_name="nowhere")
    assert_close(y, bn_apply(params, state, x, train=False)[0])
    assert not np.any(stats.count)


def test_evaluation_inside_shard_map_is_that_of_the_whole_batch():
    params, x, _, _ = problem()
    state = BNState(jnp.full(C, 0.5, jnp.float32), jnp.full(C, 2.0, jnp.float32), jnp.ones(C, jnp.int32))

    @partial(jax.shard_map, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=(P("data"), P()))
    def run(params, state, x):
        y, stats = bn_apply(params, state, x, train=False, axis_name="data")
        return y, bn_update_stats(state, stats)

    assert_close(jax.jit(run)(params, state, x), (bn_apply(params, state, x, train=False)[0], state))


def test_an_unbound_axis_name_in_training_is_an_error_that_says_so():
    params, x, _, _ = problem()
    with pytest.raises(ValueError, match=r"^axis_name: got 'nowhere', which is not bound here; expected .*; call"):
        bn_apply(params, None, x, train=True, axis_name="nowhere")


def test_one_value_per_channel_on_each_device_is_enough_when_synchronized():
    params, x, _, _ = problem()
    one_each = x[:D]

    @partial(jax.shard_map, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P("data"), STATS))
    def run(params, x):
        return bn_apply(params, None, x, train=True, axis_name="data")

    assert_close(run(params, one_each), bn_apply(params, None, one_each, train=True))


def test_one_value_per_channel_over_all_devices_is_an_error():
    params, x, _, _ = problem()
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    for axis_name, m in ((None, mesh()), ("data", one)):
        with pytest.raises(ValueError, match=r"^x: got shape \(1, 5\), one value per channel; expected at least 2"):
            jax.shard_map(
                lambda x: bn_apply(params, None, x, train=True, axis_name=axis_name)[0],  # noqa: B023
                mesh=m,
                in_specs=P("data"),
                out_specs=P("data"),
            )(x[: m.size])
