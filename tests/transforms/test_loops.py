"""The state in loops, layers in stacks, buffers donated: what a training program is made of."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.closeness import assert_close
from support.hostile import HOSTILE, C, member, problem, stacked, step
from support.nightly import by_day

from jbn import BNStats, bn_apply, bn_init, bn_merge_stats, bn_update_stats


@HOSTILE
def test_a_scan_carries_the_state(case, train):
    params, state, x, mask = problem(case)
    xs = jnp.stack([x, x + 1, 3 * x])

    def body(state, x):
        y, stats, state = step(params, state, x, mask, train=train)
        return state, (y, stats)

    expected, outs = state, []
    for i in range(3):
        expected, out = jax.jit(body)(expected, xs[i])
        outs.append(out)
    assert_close(jax.jit(lambda s: lax.scan(body, s, xs))(state), (expected, stacked(outs)))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_while_and_fori_loops_carry_the_state(train, dtype):
    params, state, x, _ = problem()
    params, x = jax.tree.map(lambda v: v.astype(dtype), params), x.astype(dtype)

    def advance(state):
        return step(params, state, x, train=train)[2]

    expected = state
    for _ in range(4):
        expected = jax.jit(advance)(expected)
    fori = jax.jit(lambda s: lax.fori_loop(0, 4, lambda _, s: advance(s), s))(state)
    assert_close(fori, expected)

    def turn(carry):
        return carry[0] + 1, advance(carry[1])

    _, loop = jax.jit(lambda s: lax.while_loop(lambda carry: carry[0] < 4, turn, (jnp.int32(0), s)))(state)
    assert_close(loop, expected)


def test_a_scan_is_differentiated_through():
    params, state, x, _ = problem()

    def layer(params, x):
        return jnp.tanh(bn_apply(params, state, x, train=True)[0]) + x

    def scanned(params, x):
        return jnp.sum(jnp.sin(lax.scan(lambda x, _: (layer(params, x), None), x, length=3)[0]))

    def looped(params, x):
        return jnp.sum(jnp.sin(layer(params, layer(params, layer(params, x)))))

    got, expected = (jax.jit(jax.grad(fn, (0, 1)))(params, x) for fn in (scanned, looped))
    assert_close(got, expected, roundings=128)


@pytest.mark.parametrize(
    ("case", "train"),
    by_day(
        itertools.product(["plain", "masked", "bf16"], [True, False]),
        [("plain", True), ("masked", True), ("masked", False), ("bf16", True)],
    ),
)
def test_stacked_layers_under_a_scan_over_depth_equal_a_loop_over_layers(case, train):
    """With as many layers as channels, where a wrong axis would not show in the shapes."""
    params, state, _, _ = problem(members=(C,))
    _, _, x, mask = problem(case)

    def layer(x, bn):
        y, stats = bn_apply(*bn, x, train=train, mask=mask)
        return jnp.tanh(y) + x, stats

    def scanned(params, state, x):
        y, stats = lax.scan(layer, x, (params, state))
        return y, stats, bn_update_stats(state, stats)

    def looped(params, state, x):
        seen = []
        for i in range(C):
            x, stats = layer(x, member((params, state), i))
            seen.append(stats)
        layers = [member(state, i) for i in range(C)]
        return x, stacked(seen), stacked(bn_update_stats(layers, seen))

    # The statistics of each layer are those of activations that were rounded on the way.
    close = {"roundings": 3, "computed_in": "bfloat16"} if case == "bf16" else {"roundings": 128}
    assert_close(jax.jit(scanned)(params, state, x), jax.jit(looped)(params, state, x), **close)

    def total(fn, params, x):
        y = fn(params, state, x)[0].astype(jnp.float32)
        return jnp.sum(jnp.where(True if mask is None else mask, y, 0))

    got, expected = (jax.jit(jax.grad(partial(total, fn), (0, 1)))(params, x) for fn in (scanned, looped))
    assert_close(got, expected, **close)


def test_functions_over_stacks_equal_their_vmap():
    rng = np.random.default_rng(0)
    _, state, _, _ = problem(members=(C,))
    mean, var, count = (jnp.asarray(rng.uniform(1, 9, (2, C, C)), jnp.float32) for _ in range(3))
    first, second = (BNStats(mean[i], var[i], jnp.round(count[i])) for i in range(2))

    @jax.jit
    def both(state, first, second):
        along = partial(bn_merge_stats, axis=0)
        ours = bn_update_stats(state, first), bn_merge_stats(first, second), along(first)
        members = jax.vmap(bn_update_stats)(state, first), jax.vmap(bn_merge_stats)(first, second)
        return ours, (*members, jax.vmap(along, in_axes=1)(first))

    assert_close(*both(state, first, second))


def test_donated_parameters_and_state_are_all_used():
    """Warnings are errors here: a buffer that could not be used again would be one."""
    params, state = bn_init(C)
    _, _, x, _ = problem()

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x):
        def of_params(params):
            y, stats = bn_apply(params, state, x, train=True)
            return jnp.sum(jnp.sin(y)), stats

        gradient, stats = jax.grad(of_params, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), bn_update_stats(state, stats)

    before = jax.tree.leaves((params, state))
    expected = jax.jit(train_step.__wrapped__)(params, state, x)
    got = train_step(params, state, x)
    assert all(leaf.is_deleted() for leaf in before)
    assert_close(got, expected)
    assert_close(train_step(*got, x), jax.jit(train_step.__wrapped__)(*expected, x))


def test_momentum_may_follow_a_schedule_inside_a_scan():
    params, state, x, _ = problem()
    schedule = jnp.asarray([0.0, 0.5, 0.9], jnp.float32)

    def body(state, momentum):
        stats = bn_apply(params, state, x * (1 + momentum), train=True)[1]
        return bn_update_stats(state, stats, momentum=momentum), None

    expected = state
    for momentum in schedule:
        expected, _ = body(expected, momentum)
    assert_close(jax.jit(lambda s: lax.scan(body, s, schedule)[0])(state), expected)


def test_a_cond_may_take_either_mode():
    params, state, x, _ = problem()

    @jax.jit
    def run(training):
        branch = [partial(step, params, state, x, train=t) for t in (True, False)]
        return lax.cond(training, *branch)

    for training in (True, False):
        assert_close(run(training), step(params, state, x, train=training))
