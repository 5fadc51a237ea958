"""Exact statistics of a data set: however it is cut, once, in constant memory, with nothing lost; and its recipes."""

import sys
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracle
from support.closeness import assert_close, bits, relative_error
from support.counting import compilations

from jbn import (
    BNState,
    BNStats,
    bn_apply,
    bn_calibrate,
    bn_init,
    bn_merge_stats,
    bn_update_stats,
)
from jbn.networks import mlp

C = 3
PARAMS, START = bn_init(C)
observe = jax.jit(partial(bn_apply, train=True))


def measured(params, state, x):
    """One layer, in NumPy: nothing to compile, whatever the size of the batch."""
    return None, BNStats(*(v.astype(np.float32) for v in oracle.moments(x)))


def handed(params, state, stats):
    """The batches are the statistics themselves."""
    return None, stats


def seen(mean, var, count):
    return BNStats(*(np.broadcast_to(np.float32(v), C) for v in (mean, var, count)))


def data(n=120, offset=3.0, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=(n, C)) * [0.1, 1, 30] + offset * np.array([0, 1, -2]))


def cut(x, seed):
    """x in another order, in batches of random sizes."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(np.arange(1, len(x)), rng.integers(0, 30), replace=False))
    return np.split(rng.permutation(x), at)


def exact(x):
    """Mean and unbiased variance of all values, in float64."""
    mean, var, m = oracle.moments(x)
    return mean, var * m / (m - 1)


def assert_exact(state, x, batches):
    mean, var = exact(x)
    assert_close(state.mean, mean, roundings=48)  # the standard deviations are six times the means
    assert relative_error(state.var, var) < 1e-6
    np.testing.assert_array_equal(state.count, batches)


@pytest.mark.parametrize("seed", range(12))
def test_any_cut_gives_the_statistics_of_all_the_data(seed):
    x = data()
    batches = cut(x, seed)
    assert_exact(bn_calibrate(measured, PARAMS, START, batches), x, len(batches))


def test_the_statistics_are_those_that_bn_apply_sees():
    x = data()
    for sizes in ((40, 80), (80,)):
        state = bn_calibrate(observe, PARAMS, START, (jnp.asarray(part) for part in np.split(x, sizes)))
        assert_exact(state, x, len(sizes) + 1)


def test_one_batch_gives_what_an_update_with_momentum_0_gives():
    _, stats = observe(PARAMS, START, jnp.asarray(data(40)))
    got = bn_calibrate(handed, PARAMS, START, [stats])
    want = bn_update_stats(START, stats, momentum=0.0)
    for name in ("mean", "count"):
        assert bits(getattr(got, name)) == bits(getattr(want, name))
    np.testing.assert_array_max_ulp(got.var, want.var, 2)  # it is rounded once here, and there in float32 on its way


def test_counts_go_on_where_those_of_float32_stand_still():
    large, small = seen(0, 1, 2**24), seen(1, 1, 1)
    state = bn_calibrate(handed, PARAMS, START, [large] * 4 + [small] * 1000)
    total = 4 * 2**24 + 1000
    np.testing.assert_allclose(state.mean, 1000 / total, rtol=1e-6)
    one_by_one = bn_calibrate(handed, PARAMS, START, [seen(0, 1, 2**24 * 4)] + [seen(2.0**12, 0, 1)] * 3000)
    np.testing.assert_allclose(one_by_one.mean, 3000 * 2.0**12 / (2**26 + 3000), rtol=1e-6)


def test_the_old_statistics_do_not_leak_in():
    old = BNState(*(jnp.full(C, v, jnp.float32) for v in (1e6, 1e9)), jnp.full(C, 10**6, jnp.int32))
    x = data()
    assert_exact(bn_calibrate(measured, PARAMS, old, np.split(x, 4)), x, 4)


def test_one_value_a_channel_keeps_its_variance():
    state = bn_calibrate(measured, PARAMS, START, [data(1)])
    np.testing.assert_array_equal(state.mean, data(1)[0])
    np.testing.assert_array_equal(state.var, 0)


def test_a_batch_that_is_not_finite_is_skipped_channel_by_channel_and_counted():
    x = data()
    x[5, 0], x[50, 0], x[50, 1] = np.nan, np.inf, -np.inf
    batches = np.split(x, 4)
    with np.errstate(invalid="ignore"):
        state = bn_calibrate(measured, PARAMS, START, batches)
    np.testing.assert_array_equal(state.count, [2, 3, 4])
    for channel, good in enumerate(([2, 3], [0, 2, 3], [0, 1, 2, 3])):
        mean, var = exact(np.concatenate([batches[i][:, [channel]] for i in good]))
        np.testing.assert_allclose(state.mean[channel], mean[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(state.var[channel], var[0], rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [(np.inf, 1, 4), (np.nan, 1, 4), (1, np.inf, 4), (1, np.nan, 4), (1, 1, np.inf), (1, 1, np.nan), (5, 5, 0)]
)
def test_statistics_that_are_not_finite_or_of_nothing_are_skipped(bad):
    good = [seen(1, 2, 4), seen(3, 1, 2)]
    got = bn_calibrate(handed, PARAMS, START, [seen(*bad), good[0], seen(*bad), good[1], seen(*bad)])
    want = bn_calibrate(handed, PARAMS, START, good)
    assert jax.tree.map(bits, got) == jax.tree.map(bits, want)


def test_masks_are_pooled_by_what_they_show_and_empty_ones_do_nothing():
    x = data()
    mask = np.random.default_rng(2).random((120, C)) < 0.4
    mask[:30, 0] = False
    apply_fn = jax.jit(lambda params, state, batch: bn_apply(params, state, batch[0], mask=batch[1], train=True))
    state = bn_calibrate(apply_fn, PARAMS, START, zip(np.split(x, 4), np.split(mask, 4), strict=True))
    mean, var, m = oracle.moments(x, mask=mask)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state.var, var * m / (m - 1), rtol=1e-6)
    np.testing.assert_array_equal(state.count, [3, 4, 4])


def test_a_channel_that_no_batch_could_use_keeps_its_old_values():
    old = BNState(jnp.array([1.5, 2.5, 3.5]), jnp.array([4.5, 5.5, 6.5]), jnp.array([7, 8, 9], jnp.int32))
    x = data()
    x[::10, 1] = np.nan
    state = bn_calibrate(measured, PARAMS, old, np.split(x, 4))
    assert [float(leaf[1]) for leaf in state] == [2.5, 5.5, 8]
    np.testing.assert_array_equal(state.count, [4, 8, 4])


def test_what_overflows_float32_when_pooled_keeps_its_old_values():
    batches = [BNStats(*np.float32([[m, 0, 1], [1, 1, 1], [4, 4, 4]])) for m in (3e38, -3e38)]
    state = bn_calibrate(handed, PARAMS, START, batches)
    np.testing.assert_array_equal(state.mean, [0, 0, 1])
    np.testing.assert_array_equal(state.count, [0, 2, 2])


@pytest.mark.parametrize(
    "batches", [[], iter(()), [np.full((4, C), np.nan, np.float32)] * 2], ids=["list", "iterator", "nan"]
)
def test_without_a_usable_batch_it_is_an_error_that_loses_nothing(batches):
    old = BNState(jnp.full(C, 2.0), jnp.full(C, 3.0), jnp.full(C, 4, jnp.int32))
    before = jax.tree.map(bits, old)
    with pytest.raises(ValueError, match=r"^batches: got "):
        bn_calibrate(measured, PARAMS, old, batches)
    assert jax.tree.map(bits, old) == before


def test_evaluation_mode_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="call the network with train=True in apply_fn"):
        bn_calibrate(partial(bn_apply, train=False), PARAMS, START, [data(4)])


class Batch:
    """Something whose life can be watched."""

    def __init__(self, x):
        self.x = x


def test_the_data_are_read_once_and_two_batches_are_held_at_most_and_as_many_statistics():
    alive, reads, most, made = weakref.WeakSet(), 0, 0, []

    def apply_fn(params, state, batch):
        _, stats = measured(params, state, batch.x)
        made.append(weakref.ref(stats.mean))
        assert sum(ref() is not None for ref in made) <= 3  # these, those that wait, those that are pooled
        return None, stats

    def stream():
        nonlocal reads, most
        for part in np.split(data(), 30):
            reads += 1
            batch = Batch(part)
            alive.add(batch)
            most = max(most, len(alive))
            yield batch
            del batch

    state = bn_calibrate(apply_fn, PARAMS, START, stream())
    np.testing.assert_array_equal(state.count, 30)
    assert (reads, len(alive)) == (30, 0)
    assert most <= 2


def test_nothing_compiles_after_the_first_batch():
    x = [jnp.asarray(part) for part in np.split(data(), 6)]
    apply_fn = jax.jit(partial(bn_apply, train=True))
    counts = []
    with compilations() as compiled:

        def stream():
            for part in x:
                counts.append(len(compiled))
                yield part
            counts.append(len(compiled))

        bn_calibrate(apply_fn, PARAMS, START, stream())
    assert counts[0] < counts[1]  # it does count
    assert counts[1:] == [counts[1]] * 6


def test_structure_shapes_dtypes_and_members_stay_as_they_are():
    nested = {"a": [START, None], "b": {"c": BNState(*(np.asarray(leaf) for leaf in START))}}
    stats = {"a": [seen(1, 2, 3), seen(1, 1, 1)], "b": {"c": seen(4, 5, 6)}}
    state = bn_calibrate(handed, None, nested, [stats])
    assert jax.tree.structure(state) == jax.tree.structure(nested)
    for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(nested), strict=True):
        assert isinstance(new, jax.Array)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
    np.testing.assert_allclose(state["b"]["c"].var, 6)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), START)
    x = np.stack([data(seed=1), data(seed=2)])
    ensemble = bn_calibrate(
        lambda params, state, x: (
            None,
            BNStats(*(np.stack(v) for v in zip(*(measured(0, 0, m)[1] for m in x), strict=True))),
        ),
        None,
        members,
        np.split(x, 3, axis=1),
    )
    for i in range(2):
        assert_exact(jax.tree.map(lambda leaf: leaf[i], ensemble), x[i], 3)  # noqa: B023


def test_float64_statistics_stay_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(90, C)) + 1e6
        params, state = bn_init(C, dtype=jnp.float64)
        state = bn_calibrate(observe, params, state, np.split(x, 3))
        assert state.mean.dtype == state.var.dtype == jnp.float64
        for got, want in zip(state[:2], exact(x), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x")], ids=["replicated", "sharded"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_state_stays_where_it_lies(spec, kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])
    old = jax.device_put(bn_init(8)[1], NamedSharding(mesh, spec))
    stats = jax.device_put(BNStats(jnp.arange(8.0), jnp.ones(8), jnp.full(8, 5.0)), NamedSharding(mesh, spec))
    state = bn_calibrate(handed, None, old, [stats, stats])
    np.testing.assert_array_equal(state.mean, np.arange(8.0))
    np.testing.assert_array_equal(state.count, 2)
    for new, leaf in zip(state, old, strict=True):
        assert new.sharding.is_equivalent_to(leaf.sharding, 1)


def test_it_refuses_to_run_under_a_transformation():
    with pytest.raises(TypeError, match=r"^apply_fn: got .* traced stats; .* outside jax\.jit"):
        jax.jit(lambda x: bn_calibrate(observe, PARAMS, START, [x]))(jnp.asarray(data(4)))


def test_the_bar_counts_batches_and_those_that_were_skipped(capsys):
    batches = [seen(1, 1, 4), seen(np.nan, 1, 4), seen(1, 1, 0)]
    for given, shown in ((batches, "3/3"), (iter(batches), "3/?")):
        bn_calibrate(handed, PARAMS, START, given, progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "calibrating" in err
        assert shown in err
        assert "2 skipped" in err
    bn_calibrate(handed, PARAMS, START, batches)
    assert capsys.readouterr() == ("", "")


def test_without_rich_the_bar_is_an_error_before_any_batch_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    batches = iter([seen(1, 1, 4)])
    with pytest.raises(ModuleNotFoundError) as caught:
        bn_calibrate(handed, PARAMS, START, batches, progress=True)
    assert str(caught.value) == (
        "progress: got True; expected the package rich to be installed; run pip install rich, or pass progress=False."
    )
    assert len(list(batches)) == 1


def plain_mlp(params, x):
    """Moments of each layer of a network with frozen weights, each batch norm with the moments of this batch."""
    moments = []
    for layer in params[:-1]:
        z = x @ oracle.float64(layer["W"]) + oracle.float64(layer["b"])
        moments.append(oracle.moments(z))
        x = np.maximum(oracle.batch_norm(z, *layer["bn"]), 0)
    return moments


def test_each_layer_of_a_network_gets_the_pooled_moments_of_what_it_saw():
    network = mlp((C, 5, 4, 2))
    params, state = network.init(jax.random.key(0))
    batches = np.split(data(60), 3)
    state = bn_calibrate(jax.jit(partial(network.apply, train=True)), params, state, batches)
    assert state[2] is None
    for i, parts in enumerate(zip(*(plain_mlp(params, x) for x in batches), strict=True)):
        mean, var, m = oracle.merge(parts)
        np.testing.assert_allclose(state[i].mean, mean, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(state[i].var, var * m / (m - 1), rtol=2e-5)


def squared_error(network, params, state, x, y):
    outputs, _ = network.apply(params, state, x, train=False)
    return float(jnp.mean((outputs - y) ** 2))


def teach(network, seed, steps=60):
    """Weights along the way of a short training, the last running statistics, and the data."""
    x = jnp.asarray(data(128, seed=seed) / np.array([0.1, 1, 30], np.float32))
    y = jnp.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:]

    def loss(params, state):
        outputs, stats = network.apply(params, state, x, train=True)
        return jnp.mean((outputs - y) ** 2), stats

    @jax.jit
    def step(params, state):
        grads, stats = jax.grad(loss, has_aux=True)(params, state)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), bn_update_stats(state, stats)

    params, state = network.init(jax.random.key(seed))
    path = []
    for _ in range(steps):
        params, state = step(params, state)
        path.append(params)
    return path, state, x, y


def test_averaged_weights_want_statistics_of_their_own():
    """The recipe for SWA and EMA: average the weights, then calibrate."""
    network = mlp((C, 16, 1))
    path, state, x, y = teach(network, seed=3)
    averaged = path[0]
    for params in path[1:]:
        averaged = jax.tree.map(lambda mean, p: 0.95 * mean + 0.05 * p, averaged, params)
    apply_fn = jax.jit(partial(network.apply, train=True))
    calibrated = bn_calibrate(apply_fn, averaged, state, [x[:64], x[64:]])
    z = oracle.float64(x) @ oracle.float64(averaged[0]["W"]) + oracle.float64(averaged[0]["b"])
    mean, var = exact(z)
    np.testing.assert_allclose(calibrated[0].mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(calibrated[0].var, var, rtol=1e-5)
    stale, fresh = (squared_error(network, averaged, s, x, y) for s in (state, calibrated))
    assert fresh < 0.9 * stale


def test_running_and_batch_statistics_are_blended_at_test_time():
    """The recipe for test-time adaptation: the running statistics as a sample of N values, merged with a batch."""
    network = mlp((C, 16, 1))
    (*_, params), state, x, y = teach(network, seed=4)
    shifted = 2 * x + 1  # as from another sensor
    _, stats = network.apply(params, state, shifted, train=True)
    prior = 32  # how many values the running statistics count for

    def as_sample(node):
        return BNStats(node.mean, node.var, jnp.full_like(node.mean, prior))

    running = [None if node is None else as_sample(node) for node in state]
    adapted = bn_update_stats(state, bn_merge_stats(running, stats), momentum=0.0, unbiased=False)
    z = oracle.float64(shifted) @ oracle.float64(params[0]["W"]) + oracle.float64(params[0]["b"])
    want = oracle.merge([(state[0].mean, state[0].var, np.full(16, prior)), oracle.moments(z)])
    np.testing.assert_allclose(adapted[0].mean, want.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(adapted[0].var, want.var, rtol=1e-5)
    momentum = prior / (prior + len(x))  # the same share, without the spread between the two means
    blended = bn_update_stats(state, stats, momentum=momentum, debias=False, unbiased=False)
    np.testing.assert_allclose(blended[0].mean, want.mean, rtol=1e-5, atol=1e-5)
    before, after, simpler = (squared_error(network, params, s, shifted, y) for s in (state, adapted, blended))
    assert max(after, simpler) < 0.5 * before
