"""JAX's transformations leave the three functions what they are, in training and evaluation alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.closeness import assert_close
from support.hostile import BY_DAY_HALF, HOSTILE, loss, member, problem, stacked, step

from jbn import BNParams, bn_apply, bn_update_stats


@HOSTILE
def test_jit_computes_what_the_eager_call_does(case, train):
    args = problem(case)
    assert_close(jax.jit(partial(step, train=train))(*args), step(*args, train=train))


# What is batched, of (params, state, x, mask).
BATCHED = {
    "x": ("masked", (2,)),
    "params": ("masked", (0,)),
    "state": ("masked", (1,)),
    "x and mask": ("masked", (2, 3)),
    "x and params": ("mask differing between channels", (0, 2)),
    "all": ("nan", (0, 1, 2)),
    "all in bfloat16": ("bf16", (0, 1, 2)),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("which", BATCHED)
def test_vmap_equals_a_loop(which, train):
    case, batched = BATCHED[which]
    many = problem(case, members=(4,))
    axes = tuple(0 if i in batched else None for i in range(4))

    def arguments(i):
        return [a if a is None else member(a, i if axis == 0 else 0) for a, axis in zip(many, axes, strict=True)]

    args = [a if axis == 0 else first for a, axis, first in zip(many, axes, arguments(0), strict=True)]
    got = jax.jit(jax.vmap(partial(step, train=train), in_axes=axes))(*args)
    run = jax.jit(partial(step, train=train))
    assert_close(got, stacked([run(*arguments(i)) for i in range(4)]))


@BY_DAY_HALF
def test_nested_vmap_is_an_ensemble_of_ensembles(case, train):
    args = problem(case, members=(2, 3))
    axes = tuple(None if a is None else 0 for a in args)
    got = jax.jit(jax.vmap(jax.vmap(partial(step, train=train), axes), axes))(*args)
    run = jax.jit(partial(step, train=train))
    expected = stacked([stacked([run(*member(member(args, i), j)) for j in range(3)]) for i in range(2)])
    assert_close(got, expected)


def test_vmap_over_another_axis_than_the_first_and_over_options():
    params, state, x, _ = problem()
    xs = jnp.stack([x, 2 * x + 1], axis=2)  # (N, C, 2)
    eps = jnp.asarray([1e-5, 0.3], jnp.float32)
    momentum = jnp.asarray([0.0, 0.7], jnp.float32)

    def one(x, eps, momentum):
        y, stats = bn_apply(params, state, x, train=True, eps=eps)
        return y, bn_update_stats(state, stats, momentum=momentum)

    got = jax.vmap(one, in_axes=(2, 0, 0))(xs, eps, momentum)
    assert_close(got, stacked([one(xs[..., i], eps[i], momentum[i]) for i in range(2)]))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_vmapped_gradients_equal_a_loop(train):
    many = problem("masked", members=(4,))
    params, state, x, mask = many
    gradient = jax.grad(partial(loss, train=train), (0, 1))
    got = jax.jit(jax.vmap(gradient))(params, x, state, mask)
    run = jax.jit(gradient)
    assert_close(got, stacked([run(*member((params, x, state, mask), i)) for i in range(4)]), roundings=128)


def test_large_batches_of_which_one_needs_a_second_pass_equal_a_loop():
    """What is large is measured in another way than what is small, and an offset in another way again."""
    params, state, _, _ = problem()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 70_000, 3)) + np.reshape([0, 1e4], (2, 1, 1)), jnp.float32)

    def run(x):
        stats = bn_apply(params, state, x, train=True)[1]
        return stats, jax.grad(lambda p: loss(p, x, state, train=True) / x.size)(params)

    one = jax.jit(run)
    assert_close(jax.jit(jax.vmap(run))(x), stacked([one(x[0]), one(x[1])]), roundings=128)
    exact = np.var(np.asarray(x, np.float64), axis=1)
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(x)[0].var, exact, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_per_example_gradients_of_an_unbatched_axis(train):
    """The gradients of each output's loss: vmap over the cotangent."""
    params, state, x, _ = problem()
    y, vjp = jax.vjp(lambda p, x: bn_apply(p, state, x, train=train)[0], params, x)
    eye = jnp.eye(y.size, dtype=y.dtype).reshape(-1, *y.shape)
    one = jax.jit(vjp)
    assert_close(jax.jit(jax.vmap(vjp))(eye), stacked([one(row) for row in eye]), roundings=128)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", ["plain", "empty mask", "mask differing between channels", "offset"])
def test_forward_and_reverse_mode_agree_with_each_other_and_with_linearize(case, train):
    params, state, x, mask = problem(case)
    fn = partial(loss, state=state, mask=mask, train=train)
    tangents = (jax.tree.map(jnp.cos, params), jnp.sin(x))

    @jax.jit
    def all_ways(params, x):
        out, forward = jax.jvp(fn, (params, x), tangents)
        gradient = jax.grad(fn, (0, 1))(params, x)
        out_again, linear = jax.linearize(fn, params, x)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangents), strict=True)
        return (out, forward), (out_again, linear(*tangents)), sum(jnp.vdot(a, b) for a, b in pairs)

    jvp, linearized, contracted = all_ways(params, x)
    assert_close(linearized, jvp, roundings=128)
    assert_close(contracted, jvp[1], roundings=1024 if case == "offset" else 128)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_jacobians_and_hessians_agree_in_all_modes(train):
    params, state, x, mask = problem("masked")
    fn = partial(loss, state=state, mask=mask, train=train)
    forward, reverse = (jax.jit(jac(fn, (0, 1)))(params, x) for jac in (jax.jacfwd, jax.jacrev))
    assert_close(forward, reverse, roundings=128)
    hessian = jax.jit(jax.hessian(fn, (0, 1)))(params, x)
    assert_close(hessian, jax.jit(jax.jacrev(jax.jacrev(fn, (0, 1)), (0, 1)))(params, x), roundings=1024)


@pytest.mark.parametrize("policy", [None, "nothing_saveable", "dots_saveable"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_checkpoint_changes_no_value_and_no_gradient(train, policy):
    params, state, x, mask = problem("masked")
    fn = partial(loss, state=state, mask=mask, train=train)
    policy = policy and getattr(jax.checkpoint_policies, policy)
    saved = jax.jit(jax.value_and_grad(fn, (0, 1)))(params, x)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(fn, policy=policy), (0, 1)))(params, x)
    assert_close(again, saved, roundings=128)


@HOSTILE
def test_eval_shape_tells_what_a_call_returns(case, train):
    args = problem(case)
    shapes = jax.eval_shape(partial(step, train=train), *args)
    out = step(*args, train=train)
    described = [jax.tree.map(lambda v: (v.shape, v.dtype), tree) for tree in (shapes, out)]
    assert described[0] == described[1]


def test_eps_momentum_and_mask_may_be_traced():
    params, state, x, mask = problem("masked")

    def run(eps, momentum, mask):
        y, stats = bn_apply(params, state, x, train=True, eps=eps, mask=mask)
        return y, bn_update_stats(state, stats, momentum=momentum)

    assert_close(jax.jit(run)(0.1, 0.7, mask), run(0.1, 0.7, mask))
    eps, momentum = jnp.float32(0.1), jnp.float32(0.7)
    assert_close(jax.jit(run)(eps, momentum, mask), run(0.1, 0.7, mask))


@pytest.mark.parametrize("argument", ["train", "axis", "axis_name"])
def test_a_traced_static_argument_says_how_to_make_it_static(argument):
    params, state, x, _ = problem()
    value = {"train": True, "axis": 1, "axis_name": 0}[argument]
    with pytest.raises(TypeError, match=rf"^{argument}: got a traced value; .*static_argnames"):
        jax.jit(lambda v: bn_apply(params, state, x, **{"train": True, argument: v}))(value)
    if argument == "axis_name":
        return
    static = jax.jit(partial(bn_apply, params, state, x), static_argnames=("train", "axis"))
    assert_close(static(**{"train": True, argument: value}), bn_apply(params, state, x, train=True))


def test_the_three_pytrees_pass_through_tree_functions():
    params, state, x, _ = problem()
    _, stats, _ = step(params, state, x, train=True)
    for node in (params, state, stats, BNParams(None, None)):
        leaves, structure = jax.tree.flatten(node)
        assert jax.tree.unflatten(structure, leaves) == node
        assert type(jax.tree.map(lambda v: v, node)) is type(node)
