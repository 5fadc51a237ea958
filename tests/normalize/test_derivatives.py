"""Derivatives in float64 against JAX's own of the plain formula, to 1e-10: every mode, order and argument."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import plain
from support.closeness import assert_close
from support.nightly import by_day
from support.problems import pose

from jbn import BNParams, BNState, bn_apply, bn_update_stats, normalize_inputs

ROUNDINGS = 2**19  # 1e-10
assert_same = partial(assert_close, roundings=ROUNDINGS)

# name: (shape of x, axis, mask shape, offset). A large offset takes the two-pass branch of the statistics.
CASES = {
    "rows": ((6, 3), -1, None, 0.0),
    "offset": ((6, 3), -1, None, 50.0),
    "channels first": ((3, 2, 3), 1, None, 0.5),
    "two feature axes": ((2, 4, 2), (2, 0), None, 0.0),
    "masked rows": ((6, 3), -1, (6, 1), 0.0),
    "mask unequal between channels": ((3, 2, 3), -1, (3, 2, 3), 0.5),
    "mask broadcast, channels first": ((4, 2, 3), 1, (4, 1, 3), 50.0),
}
NAMES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def problem(name):
    """(arguments x, γ, β, ε and running mean, var; mask, axis)."""
    shape, axis, mask_shape, offset = CASES[name]
    (gamma, beta), (mean, var, _), x, mask, _ = pose(shape, axis, dtype="float64", offset=offset, mask=mask_shape)
    if mask is not None:
        mask = mask.at[0].set(True)  # nowhere empty
        if mask.shape == x.shape:
            mask = mask.at[1:, ..., 0].set(False)  # nor everywhere the same count
    args = (x, gamma, beta, jnp.float64(0.1), mean, var)
    assert all(a.dtype == jnp.float64 for a in args)
    return args, mask, axis


def functions(name, *, train, shown=True):
    """(ours, plain), each from the arguments to (y, mean, var), and the arguments.

    Outputs where the mask is False are left out of y: no loss may look at them.
    """
    args, mask, axis = problem(name)
    visible = jnp.ones_like(args[0], bool) if mask is None or not shown else jnp.broadcast_to(mask, args[0].shape)

    def ours(x, gamma, beta, eps, mean, var):
        state = BNState(mean, var, jnp.ones_like(mean, jnp.int32))
        y, stats = bn_apply(BNParams(gamma, beta), state, x, train=train, axis=axis, eps=eps, mask=mask)
        return jnp.where(visible, y, 0), stats.mean, stats.var

    def formula(x, gamma, beta, eps, mean, var):
        if train:
            mean, var, _ = plain.moments(x, mask, axis=axis)
        y = plain.normalize(x, gamma, beta, mean, var, eps, axis=axis)
        return jnp.where(visible, y, 0), mean, var

    return ours, formula, args


def directions(args, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), args)


def scalar(fn):
    """A loss with derivatives of all orders in y, and in the returned mean and variance."""

    def loss(*args):
        y, mean, var = fn(*args)
        weights = directions((y, mean, var), seed=2)
        return sum(jnp.sum(w * jnp.sin(v)) for w, v in zip(weights, (y, mean, var), strict=True))

    return loss


MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
EVERYTHING = tuple(range(6))


@NAMES
@MODES
def test_jvp_and_vjp_are_those_of_the_plain_formula(name, train):
    ours, formula, args = functions(name, train=train)
    tangents = directions(args)

    def both(fn):
        out, tangent = jax.jvp(fn, args, tangents)
        _, vjp = jax.vjp(fn, *args)
        return out, tangent, vjp(directions(out, seed=3))

    assert_same(jax.jit(partial(both, ours))(), jax.jit(partial(both, formula))())


@NAMES
def test_outputs_behind_the_mask_are_differentiated_like_the_others(name):
    ours, formula, args = functions(name, train=True, shown=False)
    both = [jax.jit(jax.grad(scalar(fn), range(4)))(*args) for fn in (ours, formula)]
    assert_same(*both)


@MODES
@pytest.mark.parametrize("argnum", EVERYTHING, ids=["x", "gamma", "beta", "eps", "mean", "var"])
def test_gradient_with_respect_to_each_argument_alone(train, argnum):
    ours, formula, args = functions("masked rows", train=train)
    assert_same(*(jax.jit(jax.grad(scalar(fn), argnum))(*args) for fn in (ours, formula)))
    tangent = directions(args)[argnum]

    def forward(fn):
        return jax.jvp(lambda a: fn(*args[:argnum], a, *args[argnum + 1 :]), (args[argnum],), (tangent,))

    assert_same(*(jax.jit(partial(forward, fn))() for fn in (ours, formula)))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_large_batches_have_the_same_derivatives(offset):
    """What is large is measured in another way than what is small."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(70_000, 2)) + offset)
    args = (x, *map(jnp.asarray, rng.normal(size=(2, 2))), jnp.float64(0.1))
    tangents = directions(args)

    def ours(x, gamma, beta, eps):
        y, stats = bn_apply(BNParams(gamma, beta), None, x, train=True, eps=eps)
        return y, stats.mean, stats.var

    def both(fn):
        out, tangent = jax.jvp(fn, args, tangents)
        return out, tangent, jax.grad(scalar(fn), range(4))(*args)

    assert_same(*(jax.jit(partial(both, fn))() for fn in (ours, plain.train)), roundings=8 * ROUNDINGS)


@MODES
def test_jacobians_agree_in_both_modes(train):
    ours, formula, args = functions("mask unequal between channels", train=train)
    expected = jax.jit(jax.jacrev(formula, EVERYTHING))(*args)
    assert_same(jax.jit(jax.jacfwd(ours, EVERYTHING))(*args), expected)
    assert_same(jax.jit(jax.jacrev(ours, EVERYTHING))(*args), expected)


ORDERS = {
    "forward over reverse": (jax.jacfwd, jax.jacrev),
    "reverse over forward": (jax.jacrev, jax.jacfwd),
    "forward over forward": (jax.jacfwd, jax.jacfwd),
    "reverse over reverse": (jax.jacrev, jax.jacrev),
}


@cache
def plain_hessian(name, train, argnums):
    _, formula, args = functions(name, train=train)
    return jax.jit(jax.hessian(scalar(formula), argnums))(*args)


@pytest.mark.parametrize(
    ("name", "order"),
    by_day(
        itertools.product(["offset", "two feature axes", "mask unequal between channels"], ORDERS),
        [
            ("offset", "reverse over forward"),
            ("two feature axes", "forward over forward"),
            *(("mask unequal between channels", order) for order in ORDERS),
        ],
    ),
)
def test_hessian_in_training_in_all_four_orders(name, order):
    outer, inner = ORDERS[order]
    ours, _, args = functions(name, train=True)
    which = tuple(range(4))
    expected = plain_hessian(name, True, which)
    assert_same(jax.jit(outer(inner(scalar(ours), which), which))(*args), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_hessian_in_evaluation_in_all_four_orders(order):
    outer, inner = ORDERS[order]
    ours, _, args = functions("masked rows", train=False)
    expected = plain_hessian("masked rows", False, EVERYTHING)
    assert_same(jax.jit(outer(inner(scalar(ours), EVERYTHING), EVERYTHING))(*args), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (3, 1)], ids=str)
def test_mixed_second_derivatives_of_two_arguments(order, pair):
    """Where the other arguments stand still, parts of the rule see no tangent."""
    outer, inner = ORDERS[order]
    ours, formula, args = functions("rows", train=True)
    expected = jax.jit(jax.jacfwd(jax.jacrev(scalar(formula), pair[0]), pair[1]))(*args)
    assert_same(jax.jit(outer(inner(scalar(ours), pair[0]), pair[1]))(*args), expected)


@MODES
@pytest.mark.parametrize(
    "modes",
    [
        (jax.jacfwd, jax.jacfwd, jax.jacrev),
        (jax.jacfwd, jax.jacrev, jax.jacfwd),
        (jax.jacrev, jax.jacrev, jax.jacrev),
    ],
    ids=["ffr", "frf", "rrr"],
)
def test_third_derivatives(train, modes):
    """Along one direction in all arguments and x: d³/dt³ of the loss, and its gradient in x."""
    ours, formula, args = functions("masked rows", train=train)
    direction = directions(args)

    def along(fn, modes):
        def moved(t, x):
            there = jax.tree.map(lambda a, d: a + t * d, args, direction)
            return scalar(fn)(there[0] + x, *there[1:])

        first, second, third = modes
        zero = jnp.zeros_like(args[0])
        return first(second(third(moved, 0), 1), 0)(jnp.float64(0.0), zero)

    expected = jax.jit(partial(along, formula, (jax.jacfwd, jax.jacfwd, jax.jacrev)))()
    assert_same(jax.jit(partial(along, ours, modes))(), expected, roundings=8 * ROUNDINGS)


def test_gradients_flow_through_the_returned_stats_alone():
    for name in ("rows", "mask unequal between channels"):
        ours, formula, args = functions(name, train=True)

        def of_stats(fn, x, args=args):
            _, mean, var = fn(x, *args[1:])
            return jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.sqrt(var))

        assert_same(*(jax.jit(jax.grad(partial(of_stats, fn)))(args[0]) for fn in (ours, formula)))


def test_evaluation_stats_carry_the_gradient_of_the_state():
    ours, formula, args = functions("rows", train=False)
    for output in (1, 2):
        got, expected = (jax.jacrev(lambda *a: fn(*a)[output], (4, 5))(*args) for fn in (ours, formula))  # noqa: B023
        assert_same(got, expected)


def test_eager_gradients_are_those_under_jit():
    ours, _, args = functions("masked rows", train=True)
    loss = scalar(ours)
    assert_same(jax.grad(loss, range(4))(*args), jax.jit(jax.grad(loss, range(4)))(*args), roundings=2**13)


def test_running_statistics_carry_no_gradient():
    _, _, args = functions("rows", train=True)
    state = BNState(args[4], args[5], jnp.ones_like(args[4], jnp.int32))

    def loss(x, mean, momentum):
        _, stats = bn_apply(BNParams(None, None), None, x, train=True)
        new = bn_update_stats(state._replace(mean=mean), stats, momentum=momentum)
        return jnp.sum(new.mean) + jnp.sum(new.var)

    for gradient in jax.grad(loss, (0, 1, 2))(args[0], state.mean, jnp.float64(0.9)):
        assert not np.any(gradient)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e308])
def test_masked_values_move_no_gradient_whatever_they_hold(poison, train):
    ours, _, args = functions("masked rows", train=train)
    _, mask, _ = problem("masked rows")
    poisoned = (jnp.where(mask, args[0], poison), *args[1:])
    gradient = jax.jit(jax.grad(scalar(ours), EVERYTHING))
    got = gradient(*poisoned)
    assert_same(got, gradient(*args))
    assert not np.any(np.asarray(got[0])[~np.asarray(mask)[:, 0]])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_masked_value_that_is_not_finite_is_differentiated_as_the_constant_mean(train):
    """Where a loss does look at such an output: it is that of a constant which happens to be μ."""
    args, mask, _ = problem("masked rows")
    poisoned = (jnp.where(mask, args[0], jnp.nan), *args[1:])

    def ours(x, gamma, beta, eps, mean, var):
        state = BNState(mean, var, jnp.ones_like(mean, jnp.int32))
        y, stats = bn_apply(BNParams(gamma, beta), state, x, train=train, eps=eps, mask=mask)
        return y, stats.mean, stats.var

    def formula(x, gamma, beta, eps, mean, var):
        if train:
            mean, var, _ = plain.moments(x, mask)
        constant = jax.lax.stop_gradient(mean)[None]
        y = plain.normalize(jnp.where(mask, x, constant), gamma, beta, mean, var, eps)
        return y, mean, var

    def both(fn, args):
        return jax.jvp(fn, args, directions(args)), jax.grad(scalar(fn), EVERYTHING)(*args)

    assert_same(jax.jit(partial(both, ours))(poisoned), jax.jit(partial(both, formula))(args))


def test_gradients_where_nothing_was_seen_are_finite():
    (x, gamma, beta, eps, *_), _, _ = problem("rows")
    mask = jnp.zeros((6, 1), bool)

    def loss(x, gamma, beta, eps):
        y, stats = bn_apply(BNParams(gamma, beta), None, x, train=True, eps=eps, mask=mask)
        return jnp.sum(jnp.sin(y)) + jnp.sum(stats.mean) + jnp.sum(stats.var)

    for gradient in jax.grad(loss, range(4))(x, gamma, beta, eps):
        assert np.all(np.isfinite(gradient))


def test_gamma_and_beta_that_are_left_out_leave_the_other_gradients_alone():
    _, formula, args = functions("rows", train=True)
    x, gamma, beta, eps, *running = args
    ones, zeros = jnp.ones_like(gamma), jnp.zeros_like(beta)

    def loss(gamma, beta, x):
        y, stats = bn_apply(BNParams(gamma, beta), None, x, train=True, eps=eps)
        return y, stats.mean, stats.var

    for ours, whole in (
        ((None, None), (ones, zeros)),
        ((gamma, None), (gamma, zeros)),
        ((None, beta), (ones, beta)),
    ):
        got = jax.grad(scalar(partial(loss, *ours)))(x)
        assert_same(got, jax.grad(scalar(formula))(x, *whole, eps, *running))


def test_input_normalization_is_differentiable_in_the_test_inputs():
    (x, *_), _, _ = problem("rows")
    _, stats = normalize_inputs(x)
    got = jax.jacrev(lambda x: normalize_inputs(x, stats)[0])(x)
    expected = jax.jacrev(lambda x: (x - stats.mean[None]) / jnp.sqrt(stats.var)[None])(x)
    assert_same(got, expected)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_float32_gradients_are_within_1e_4_of_float64(offset):
    rng = np.random.default_rng(0)
    x = jnp.asarray((rng.normal(size=(512, 4)) + offset).astype(np.float32))
    gamma, beta = (jnp.asarray(v.astype(np.float32)) for v in rng.normal(size=(2, 4)) + 1)
    weights = jnp.asarray(rng.normal(size=x.shape).astype(np.float32))

    def ours(x, gamma, beta):
        return jnp.sum(weights * bn_apply(BNParams(gamma, beta), None, x, train=True)[0])

    def formula(x, gamma, beta):
        return jnp.sum(weights.astype(jnp.float64) * plain.train(x, gamma, beta, 1e-5)[0])

    got = jax.jit(jax.grad(ours, range(3)))(x, gamma, beta)
    expected = jax.jit(jax.grad(formula, range(3)))(*(v.astype(jnp.float64) for v in (x, gamma, beta)))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.float32
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b)).max()
        assert error <= 1e-4 * np.abs(np.asarray(b)).max()


def test_bfloat16_gradients_are_those_of_the_rounded_input():
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(v, jnp.bfloat16) for v in rng.normal(size=(2, 256, 4)))
    gamma, beta = (jnp.asarray(v, jnp.float32) for v in rng.normal(size=(2, 4)) + 1)

    def ours(x, gamma, beta):
        y, _ = bn_apply(BNParams(gamma, beta), None, x, train=True)
        assert y.dtype == jnp.bfloat16
        return jnp.sum((weights * y).astype(jnp.float32))

    def formula(x, gamma, beta):
        return jnp.sum(weights.astype(jnp.float64) * plain.train(x, gamma, beta, 1e-5)[0])

    got = jax.jit(jax.grad(ours, range(3)))(x, gamma, beta)
    expected = jax.jit(jax.grad(formula, range(3)))(*(v.astype(jnp.float64) for v in (x, gamma, beta)))
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for a, b in zip(got, expected, strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=1e-2 * np.abs(b).max())
