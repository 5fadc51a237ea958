"""Ghost batches: each block is normalized by itself, the statistics are those of the whole batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import eight, oracle, plain
from support.closeness import assert_close, bits
from support.counting import compile_hlo
from support.problems import pose

from jbn import BNParams, BNStats, bn_apply, bn_init, bn_merge_stats, bn_update_stats
from jbn.networks import mlp
from jbn.training import TrainState, make_train_step

N, G = 12, 4
# name: (shape of x, feature axis, shape of the mask, offset)
CASES = {
    "plain": ((N, 3), -1, None, 0.0),
    "offset": ((N, 3), -1, None, 1e4),
    "masked": ((N, 3), -1, (N, 1), 0.0),
    "mask differing between channels": ((N, 3), -1, (N, 3), 0.0),
    "mask of size 1 on the batch": ((N, 5, 3), -1, (1, 5, 1), 0.0),
    "NCHW": ((N, 3, 2, 2), 1, None, 0.0),
    "NCHW masked": ((N, 3, 2, 2), 1, (N, 1, 2, 1), 0.0),
    "two feature axes": ((N, 3, 5, 2), (1, -1), (N, 1, 5, 1), 0.0),
}


def problem(case="plain", dtype=jnp.float32):
    """(params, x, weights of the loss, mask, axis); of a mask the second block is empty."""
    shape, axis, mask_shape, offset = CASES[case]
    params, _, x, mask, weights = pose(shape, axis, dtype=dtype, offset=offset, mask=mask_shape)
    if mask is not None and len(mask) == N:
        mask = mask.at[G : 2 * G].set(False)
    return params, x, weights, mask, axis


def loss_of(y, stats, weights, mask=None):
    of_y = jnp.sum(jnp.where(True if mask is None else mask, weights * y.astype(jnp.float32), 0))
    return of_y + jnp.sum(stats.mean) + 2 * jnp.sum(stats.var)


def cut(a, size=G):
    return a.reshape(len(a) // size, size, *a.shape[1:])


def by_vmap(params, x, mask=None, axis=-1, size=G):
    """(y, merged stats) with one bn_apply for each block."""

    def block(x, mask):
        return bn_apply(params, None, x, train=True, mask=mask, axis=axis)

    mask = None if mask is None else cut(jnp.broadcast_to(mask, (len(x), *mask.shape[1:])), size)
    y, stats = jax.vmap(block, (0, None if mask is None else 0))(cut(x, size), mask)
    return y.reshape(x.shape), bn_merge_stats(stats, axis=0)


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_statistics_are_those_of_the_formula_in_float64(case):
    params, x, weights, mask, axis = problem(case)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def ghost(params, x):
        y, stats = bn_apply(params, None, x, train=True, mask=mask, axis=axis, ghost_size=G)
        return loss_of(y, stats, weights, mask), (y, stats)

    (_, (y, stats)), (d_params, d_x) = ghost(params, x)
    shown = np.broadcast_to(True if mask is None else mask, x.shape)
    g = np.where(shown, oracle.float64(weights), 0)
    whole = oracle.gradients(x, 0 * g, axis=axis, mask=shown, g_mean=1.0, g_var=2.0)
    parts = list(zip(cut(oracle.float64(x)), cut(g), cut(shown), strict=True))
    blocks = [oracle.gradients(x, g, params.gamma, axis=axis, mask=m) for x, g, m in parts]

    expected = oracle.moments(x, axis, shown)
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, expected.var, rtol=1e-5)
    np.testing.assert_array_equal(stats.count, expected.count)
    normalized = np.concatenate([oracle.batch_norm(x, *params, axis=axis, mask=m) for x, _, m in parts])
    np.testing.assert_allclose(y[shown], normalized[shown], rtol=1e-4, atol=1e-5)
    for got, want in (
        (d_x, np.concatenate([b.x for b in blocks]) + whole.x),
        (d_params.gamma, sum(b.gamma for b in blocks)),
        (d_params.beta, sum(b.beta for b in blocks)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("case", ["plain", "mask of size 1 on the batch", "NCHW masked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_it_is_a_vmap_over_blocks_to_rounding(case, dtype):
    params, x, weights, mask, axis = problem(case, dtype)

    def run(apply):
        def loss(params, x):
            y, stats = apply(params, x)
            return loss_of(y, stats, weights, mask), (y, stats)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    gradients, (y, stats) = run(
        lambda params, x: bn_apply(params, None, x, train=True, mask=mask, axis=axis, ghost_size=G)
    )
    expected, (y_vmap, stats_vmap) = run(partial(by_vmap, mask=mask, axis=axis))
    assert_close(stats, stats_vmap)
    assert_close(
        (y, gradients[1]), (y_vmap, expected[1]), roundings=1 if dtype == jnp.bfloat16 else 16, computed_in=dtype
    )
    assert_close(gradients[0], expected[0])


@pytest.mark.parametrize("case", ["plain", "masked", "NCHW"])
def test_one_block_of_the_full_batch_is_plain(case):
    params, x, _, mask, axis = problem(case)
    got = bn_apply(params, None, x, train=True, mask=mask, axis=axis, ghost_size=N)
    assert_close(got, bn_apply(params, None, x, train=True, mask=mask, axis=axis))


def test_a_nan_stays_in_its_block_and_out_of_the_running_statistics():
    params, x, weights, _, _ = problem()
    _, state = bn_init(3)
    bad = x.at[5, 1].set(jnp.nan)

    def loss(x):
        y, stats = bn_apply(params, state, x, train=True, ghost_size=G)
        return jnp.sum(weights * y), (y, stats)

    d_x, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(bad)
    d_clean, (y_clean, clean) = jax.jit(jax.grad(loss, has_aux=True))(x)
    hit = np.zeros((N, 3), bool)
    hit[G : 2 * G, 1] = True
    for got, want in ((y, y_clean), (d_x, d_clean)):
        np.testing.assert_array_equal(np.isnan(got), hit)
        assert_close(got[~hit], want[~hit])
    new, without = bn_update_stats(state, stats), bn_update_stats(state, clean)
    np.testing.assert_array_equal(new.count, [1, 0, 1])
    np.testing.assert_array_equal((new.mean[1], new.var[1]), (0, 1))
    assert_close(new.mean[::2], without.mean[::2])


@pytest.mark.parametrize("n", [0, N])
def test_nothing_seen_is_count_0_and_finite(n):
    params, x, _, _, _ = problem()
    y, stats = bn_apply(params, None, x[:n], train=True, mask=jnp.zeros((n, 1), bool), ghost_size=G)
    assert y.shape == (n, 3)
    assert np.isfinite(y).all()
    assert_close(stats, BNStats(*jnp.zeros((3, 3), jnp.float32)))


def test_evaluation_ignores_it_and_needs_no_divisor():
    params, x, _, _, _ = problem()
    _, state = bn_init(3)
    got = bn_apply(params, state, x[:7], train=False, ghost_size=G)
    assert list(map(bits, jax.tree.leaves(got))) == list(
        map(bits, jax.tree.leaves(bn_apply(params, state, x[:7], train=False)))
    )


def test_forward_reverse_and_second_derivatives_are_those_of_the_plain_formula():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, weights = jnp.asarray(rng.normal(size=(2, 6, 2)))
        params = BNParams(*jnp.asarray(rng.normal(size=(2, 2)) + 1))

        def of_blocks(params, x):
            y, mean, var = jax.vmap(lambda x: plain.train(x, *params, 1e-5))(cut(x, 3))
            mean, var, _ = plain.moments(x)
            return jnp.sum(weights * jnp.sin(y.reshape(x.shape))) + jnp.sum(mean * var)

        def ghost(params, x):
            y, stats = bn_apply(params, None, x, train=True, ghost_size=3)
            return jnp.sum(weights * jnp.sin(y)) + jnp.sum(stats.mean * stats.var)

        for derivative in (jax.hessian, lambda f, argnums: jax.jacfwd(f, argnums)):
            got, want = (jax.jit(derivative(f, argnums=(0, 1)))(params, x) for f in (ghost, of_blocks))
            assert_close(got, want, roundings=2**19)


def test_an_ensemble_by_vmap_is_a_loop_over_its_members():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 3)), jnp.float32)
    params = BNParams(*jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32))

    def member(params, x):
        return bn_apply(params, None, x, train=True, ghost_size=4)

    got = jax.jit(jax.vmap(member))(params, x)
    alone = [member(jax.tree.map(lambda v: v[i], params), x[i]) for i in range(2)]  # noqa: B023
    assert_close(got, jax.tree.map(lambda *v: jnp.stack(v), *alone))


@pytest.mark.parametrize(("devices", "masked"), [(1, False), (2, True), (4, True), (8, False), (8, True)])
def test_on_devices_blocks_stay_where_they_are_and_statistics_are_merged(devices, masked):
    params, x, weights, _ = eight.problem()
    # Of each block three values count, of the first none; a gradient through one value alone is 300-fold rounding.
    rows = np.arange(eight.N)
    mask = jnp.asarray((rows % 4 < 3) & (rows >= 4))[:, None] if masked else None
    on = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def shard(params, x, weights, mask):
        def loss(params, x):
            y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name="data", ghost_size=4)
            of_y, of_stats = eight.loss_of(y, stats, weights, mask)
            return lax.psum(of_y, "data") + of_stats, (y, stats)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    specs = (P(), P("data"), P("data"), eight.mask_spec(mask))
    out_specs = ((P(), P("data")), (P("data"), eight.STATS))
    run = jax.jit(jax.shard_map(shard, mesh=on, in_specs=specs, out_specs=out_specs))

    def one(params, x):
        y, stats = by_vmap(params, x, mask, size=4)
        return sum(eight.loss_of(y, stats, weights, mask)), (y, stats)

    assert_close(run(params, x, weights, mask), jax.jit(jax.grad(one, (0, 1), has_aux=True))(params, x))


@pytest.mark.parametrize("map_over", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_vmap_and_pmap_merge_the_statistics_of_blocks(map_over):
    params, x, _, mask = eight.problem(mask="unequal masks")

    def member(x, mask):
        return bn_apply(params, None, x, train=True, mask=mask, axis_name="data", ghost_size=2)

    y, stats = map_over(member, axis_name="data")(eight.split(x), eight.split(mask))
    got = (y.reshape(x.shape), jax.tree.map(lambda v: v[3], stats))
    assert_close(got, by_vmap(params, x, mask, size=2))


def test_one_collective_carries_the_statistics_and_the_gradient_needs_none():
    params, x, weights, _ = eight.problem()

    def shard(params, x, weights):
        y, vjp, stats = jax.vjp(
            lambda x: bn_apply(params, None, x, train=True, axis_name="data", ghost_size=2), x, has_aux=True
        )
        return y, stats, vjp(weights)[0]

    specs = (P(), P("data"), P("data"))
    out_specs = (P("data"), eight.STATS, P("data"))
    run = jax.shard_map(shard, mesh=eight.mesh(), in_specs=specs, out_specs=out_specs)
    hlo, _ = compile_hlo(run, params, x, weights)
    assert [c.opcode for c in hlo.collectives()] == ["all-gather"]


def test_local_statistics_on_devices_are_ghost_batches():
    params, x, _, _ = eight.problem()
    _, state = bn_init(eight.C)

    @jax.jit
    @partial(jax.shard_map, mesh=eight.mesh(), in_specs=(P(), P(), P("data")), out_specs=(P("data"), P()))
    def local(params, state, x):
        y, stats = bn_apply(params, state, x, train=True)
        gathered = lax.all_gather(stats, "data", to="invarying")
        return y, bn_update_stats(state, bn_merge_stats(gathered, axis=0))

    y, stats = bn_apply(params, state, x, train=True, ghost_size=eight.N // eight.D)
    assert_close(local(params, state, x), (y, bn_update_stats(state, stats)))


def test_a_network_of_ghost_batches_trains():
    network = mlp((2, 16, 2), bn=partial(bn_apply, ghost_size=4))
    x = jax.random.normal(jax.random.key(1), (32, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)

    def loss_fn(outputs, y):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    optimizer = optax.adam(3e-2)
    step = make_train_step(network.apply, loss_fn, optimizer)
    params, bn_state = network.init(jax.random.key(0))
    train_state = TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))
    run = jax.jit(lambda s: lax.scan(lambda s, _: step(s, (x, y)), s, length=100))
    new, metrics = run(train_state)
    losses = np.asarray(metrics["loss"])
    assert losses[-10:].mean() < 0.6 * losses[0]
    # One step's running statistics are those of the whole batch.
    z = oracle.float64(x) @ oracle.float64(params[0]["W"])
    one, _ = jax.jit(step)(train_state, (x, y))
    np.testing.assert_allclose(one.bn_state[0].var, z.var(0, ddof=1), rtol=1e-5)
    outputs, _ = network.apply(new.params, new.bn_state, x[:5], train=False)  # 4 does not divide 5
    assert np.isfinite(outputs).all()
