"""`mlp` against the plain formulas in NumPy float64, forward and backward."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusals import assert_refused, refusals

from jbn import BNParams, BNState, BNStats, bn_apply, bn_labels, bn_update_stats, weight_decay_mask
from jbn.networks import Network, mlp

SIZES = (5, 8, 6, 3)
EPS = 1e-5
NORMS = pytest.mark.parametrize("norm", ["z", "a", None])
# g and g′ of the oracle
ACTIVATIONS = {
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    "tanh": (jnp.tanh, np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


class OracleNorm:
    """Batch norm of a float64 matrix over its rows, and its derivative, term by term as in the paper."""

    def __init__(self, z, gamma, beta, moments=None):
        self.mean, self.var = (z.mean(0), z.var(0)) if moments is None else moments
        self.r = 1 / np.sqrt(self.var + EPS)
        self.xhat = (z - self.mean) * self.r
        self.gamma = gamma
        self.y = gamma * self.xhat + beta

    def backward(self, g):
        d_xhat = g * self.gamma
        dz = self.r * (d_xhat - d_xhat.mean(0) - self.xhat * (d_xhat * self.xhat).mean(0))
        return dz, (g * self.xhat).sum(0), g.sum(0)


def oracle(params, x, norm, activation, moments=None):
    """Outputs, the moments of each hidden layer, and a function from cotangent to the gradients by layer."""
    _, g, g_prime = ACTIVATIONS[activation]
    layers = [jax.tree.map(lambda v: np.asarray(v, np.float64), layer) for layer in params]
    a, tape, seen = np.asarray(x, np.float64), [], []
    for i, layer in enumerate(layers):
        z = a @ layer["W"] + layer["b"]
        if i == len(layers) - 1:
            tape.append((a, None, None))
            break
        given = None if moments is None else moments[i]
        if norm == "z":
            bn = OracleNorm(z, *layer["bn"], given)
            tape.append((a, bn, bn.y))
            a = g(bn.y)
        elif norm == "a":
            bn = OracleNorm(g(z), *layer["bn"], given)
            tape.append((a, bn, z))
            a = bn.y
        else:
            bn = None
            tape.append((a, None, z))
            a = g(z)
        seen.append(None if bn is None else (bn.mean, bn.var))

    def backward(cotangent):
        grads, d = [], cotangent
        for layer, (a, bn, before) in reversed(list(zip(layers, tape, strict=True))):
            d_gamma = d_beta = None
            if before is not None:
                if norm == "a":
                    d, d_gamma, d_beta = bn.backward(d)
                d = d * g_prime(before)
                if norm == "z":
                    d, d_gamma, d_beta = bn.backward(d)
            grads.append({"W": a.T @ d, "b": d.sum(0), "bn": (d_gamma, d_beta)})
            d = d @ layer["W"].T
        return grads[::-1]

    return z, seen, backward


def made(norm="z", activation="relu", **options):
    """A network with params in which nothing is 0 or 1, its state, and a batch."""
    network = mlp(SIZES, norm=norm, activation=ACTIVATIONS[activation][0], **options)
    params, state = network.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [p + 0.3 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)]
    x = 2 * jax.random.normal(jax.random.key(2), (12, SIZES[0]), jnp.float32) + 1
    return network, jax.tree.unflatten(structure, leaves), state, x


@NORMS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_stats_and_gradients_are_those_of_the_plain_formula(norm, activation):
    network, params, state, x = made(norm, activation)
    cotangent = np.random.default_rng(3).normal(size=(12, 3))
    want, moments, backward = oracle(params, x, norm, activation)
    with jax.enable_x64(True):

        @jax.jit
        def both(params, state, x, cotangent):
            apply = partial(network.apply, train=True)
            outputs, vjp, stats = jax.vjp(lambda p: apply(p, state, x), params, has_aux=True)
            return outputs, stats, *vjp(cotangent)

        outputs, stats, grads = both(params, state, np.asarray(x, np.float64), cotangent)
        outputs, stats, grads = jax.tree.map(np.asarray, (outputs, stats, grads))
    np.testing.assert_allclose(outputs, want, rtol=1e-10, atol=1e-10)
    for i, seen in enumerate(moments):
        if norm is None:
            assert stats[i] is None
        else:
            np.testing.assert_allclose(stats[i].mean, seen[0], rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(stats[i].var, seen[1], rtol=1e-10)
            np.testing.assert_array_equal(stats[i].count, 12)
    for i, (got, exact) in enumerate(zip(grads, backward(cotangent), strict=True)):
        np.testing.assert_allclose(got["W"], exact["W"], rtol=1e-5, atol=1e-6)  # float32, as W is
        np.testing.assert_allclose(got["b"], exact["b"], rtol=1e-5, atol=1e-6)
        if norm is not None and i < len(grads) - 1:
            np.testing.assert_allclose(got["bn"].gamma, exact["bn"][0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got["bn"].beta, exact["bn"][1], rtol=1e-5, atol=1e-6)


@NORMS
def test_evaluation_uses_the_running_statistics_and_changes_none(norm):
    network, params, state, x = made(norm)
    _, stats = network.apply(params, state, x, train=True)
    state = bn_update_stats(state, stats)
    outputs, nothing = network.apply(params, state, x[:1] - 3, train=False)
    moments = [entry and (np.asarray(entry.mean), np.asarray(entry.var)) for entry in state[:-1]]
    want, _, _ = oracle(params, x[:1] - 3, norm, "relu", moments)
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-5)
    again = bn_update_stats(state, nothing)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, again))


@NORMS
def test_each_layer_holds_W_b_bn_and_None_where_there_is_no_norm(norm):
    params, state = mlp(SIZES, norm=norm).init(jax.random.key(0))
    shapes = [(layer["W"].shape, layer["b"].shape, set(layer)) for layer in params]
    assert shapes == [((i, o), (o,), {"W", "b", "bn"}) for i, o in pairwise(SIZES)]
    for i, (layer, running) in enumerate(zip(params, state, strict=True)):
        if norm is None or i == 2:
            assert layer["bn"] is None
            assert running is None
        else:
            assert isinstance(layer["bn"], BNParams)
            assert isinstance(running, BNState)
            assert layer["bn"].gamma.shape == running.mean.shape == layer["b"].shape
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_the_last_layer_never_has_a_norm_and_two_sizes_are_one_affine_map():
    init, apply = mlp((4, 3))
    params, state = init(jax.random.key(0))
    x = jnp.ones((2, 4), jnp.float32)
    outputs, stats = apply(params, state, x, train=True)
    assert state == stats == [None]
    np.testing.assert_allclose(outputs, np.asarray(x) @ np.asarray(params[0]["W"]), rtol=1e-6)


def test_W_is_the_same_for_the_same_key_whatever_the_norm_and_he_normal():
    sizes = (400, 300, 200)
    (z, _), (a, _), (without, _) = (mlp(sizes, norm=n).init(jax.random.key(7)) for n in ("z", "a", None))
    other, _ = mlp(sizes).init(jax.random.key(8))
    for i, n_in in enumerate(sizes[:-1]):
        assert (z[i]["W"] == a[i]["W"]).all()
        assert (z[i]["W"] == without[i]["W"]).all()
        assert (z[i]["W"] != other[i]["W"]).all()
        assert abs(float(z[i]["W"].std()) / np.sqrt(2 / n_in) - 1) < 0.02
        assert abs(float(z[i]["W"].mean())) < 0.01
        assert not z[i]["b"].any()


@pytest.mark.parametrize("train", [True, False])
def test_with_norm_z_the_gradient_of_b_is_exactly_zero_and_nowhere_else(train):
    for norm in ("z", "a", None):
        network, params, state, x = made(norm)
        grads = jax.grad(lambda p: network.apply(p, state, x, train=train)[0].var())(params)  # noqa: B023
        moves = [bool(layer["b"].any()) for layer in grads]
        assert moves == ([False, False, True] if norm == "z" else [True] * 3)
        assert all(bool(layer["W"].any()) for layer in grads)


def test_no_two_leaves_share_a_buffer():
    leaves = jax.tree.leaves(mlp((4, 4, 4, 4)).init(jax.random.key(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@NORMS
@pytest.mark.parametrize("train", [True, False])
def test_a_mask_is_the_same_as_computing_on_the_selected_rows(norm, train):
    network, params, state, x = made(norm)
    keep = np.arange(12) % 3 != 1
    dirty = jnp.where(keep[:, None], x, jnp.nan)

    def loss(params, x, rows, mask):
        outputs, stats = network.apply(params, state, x, train=train, mask=mask)
        return jnp.mean(jnp.square(outputs[rows])), stats

    run = jax.value_and_grad(loss, has_aux=True)
    (masked, stats), grads = run(params, dirty, np.flatnonzero(keep), jnp.asarray(keep)[:, None])
    (want, want_stats), want_grads = run(params, x[keep], np.arange(8), None)
    for got, exact in zip(
        jax.tree.leaves((masked, stats, grads)), jax.tree.leaves((want, want_stats, want_grads)), strict=True
    ):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


@NORMS
def test_bfloat16_is_the_dtype_of_the_computation_alone(norm):
    network, params, state, x = made(norm, dtype=jnp.bfloat16)
    exact, _ = mlp(SIZES, norm=norm).apply(params, state, x, train=True)

    def loss(params):
        outputs, stats = network.apply(params, state, x, train=True)
        return jnp.mean(outputs.astype(jnp.float32)), (outputs, stats)

    grads, (outputs, stats) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, stats))} <= {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(outputs.astype(jnp.float32), exact, rtol=0.1, atol=0.1)
    assert (outputs.astype(jnp.float32) != exact).any()


def test_narrow_inputs_are_computed_in_float32_unless_dtype_says_otherwise():
    network, params, state, x = made()
    outputs, _ = network.apply(params, state, x.astype(jnp.bfloat16), train=True)
    assert outputs.dtype == jnp.float32


def test_bn_is_called_once_for_each_hidden_layer_with_all_it_needs():
    calls = []
    with_eps = partial(bn_apply, eps=0.5)

    def recording(params, state, x, **options):
        calls.append((x.shape, options))
        return bn_apply(params, state, x, eps=0.5, **options)

    network, params, state, x = made(bn=recording)
    mask = jnp.ones((12, 1), bool)
    outputs, _ = network.apply(params, state, x, train=True, mask=mask)
    assert [shape for shape, _ in calls] == [(12, 8), (12, 6)]
    for _, options in calls:
        assert options == {"train": True, "axis_name": None, "mask": mask}
    plain, bound = (made(bn=bn)[0].apply(params, state, x, train=True)[0] for bn in (bn_apply, with_eps))
    np.testing.assert_allclose(outputs, bound, rtol=1e-5, atol=1e-6)
    assert abs(outputs - plain).max() > 1e-3


@pytest.mark.parametrize("norm", ["z", "a"])
def test_axis_name_synchronizes_the_statistics(norm):
    network, params, state, x = made(norm)
    want, want_stats = network.apply(params, state, x, train=True)
    apply = partial(network.apply, params, state, train=True, axis_name="parts")
    outputs, stats = jax.vmap(apply, axis_name="parts", out_axes=(0, None))(x.reshape(3, 4, 5))
    np.testing.assert_allclose(outputs.reshape(12, 3), want, rtol=1e-4, atol=1e-5)
    for got, exact in zip(jax.tree.leaves(stats), jax.tree.leaves(want_stats), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-6)


def test_an_ensemble_is_a_vmap_of_init_and_apply():
    network, _, _, x = made()
    keys = jax.random.split(jax.random.key(5), 3)
    params, states = jax.vmap(network.init)(keys)
    apply = partial(network.apply, train=True)
    outputs, stats = jax.jit(jax.vmap(apply, in_axes=(0, 0, None)))(params, states, x)
    states = bn_update_stats(states, stats)
    for i, key in enumerate(keys):
        member, state = network.init(key)
        want, want_stats = apply(member, state, x)
        np.testing.assert_allclose(outputs[i], want, rtol=1e-4, atol=1e-5)
        want_state = bn_update_stats(state, want_stats)
        np.testing.assert_allclose(states[1].mean[i], want_state[1].mean, rtol=1e-4, atol=1e-5)


def test_optax_masks_and_labels_tell_the_parameters_apart():
    params, _ = mlp((4, 3, 2)).init(jax.random.key(0))
    gamma_beta = BNParams(gamma=False, beta=False)
    assert weight_decay_mask(params) == [
        {"W": True, "b": False, "bn": gamma_beta},
        {"W": True, "b": False, "bn": None},
    ]
    assert bn_labels(params)[0] == {"W": "other", "b": "other", "bn": BNParams("bn", "bn")}


def test_stats_may_be_taken_without_running_statistics():
    network, params, _, x = made()
    _, stats = network.apply(params, [None] * 3, x, train=True)
    assert isinstance(stats[0], BNStats)


def applied(x=None, params=None, state=None, **options):
    network, made_params, made_state, made_x = made()
    return network.apply(
        made_params if params is None else params,
        made_state if state is None else state,
        made_x if x is None else x,
        train=True,
        **options,
    )


ADVICE = "pass (in, hidden, …, out), as in mlp((64, 128, 10))."
LAYERS = (
    "expected a list with one entry for each of 3 layers; "
    "pass what the network's init returned: params, state = init(key)."
)
ERRORS = [
    (lambda: mlp(64), TypeError, f"sizes: got 64; expected a sequence of ints; {ADVICE}"),
    (lambda: mlp((4, 2.5)), TypeError, f"sizes: got (4, 2.5); expected a sequence of ints; {ADVICE}"),
    (lambda: mlp((4, True)), TypeError, f"sizes: got (4, True); expected a sequence of ints; {ADVICE}"),
    (
        lambda: mlp((4,)),
        ValueError,
        f"sizes: got (4,); expected at least two sizes, each at least 1; {ADVICE}",
    ),
    (
        lambda: mlp((4, 0, 2)),
        ValueError,
        f"sizes: got (4, 0, 2); expected at least two sizes, each at least 1; {ADVICE}",
    ),
    (
        lambda: mlp((4, 2), norm="batch"),
        ValueError,
        'norm: got \'batch\'; expected "z", "a" or None; '
        'pass "z" to normalize before the activation, "a" after it, None not at all.',
    ),
    (
        lambda: mlp((4, 2), activation="relu"),
        TypeError,
        "activation: got 'relu'; expected a function; pass it, not its name.",
    ),
    (
        lambda: mlp((4, 2), dtype=jnp.int32),
        TypeError,
        "dtype: got int32; expected a floating-point dtype; pass jnp.float32.",
    ),
    (
        lambda: applied(jnp.ones((2, 28, 28), jnp.float32)),
        ValueError,
        "x: got shape (2, 28, 28); expected (N, 5), the first of sizes; "
        "flatten images with x.reshape(len(x), -1), or change sizes.",
    ),
    (
        lambda: applied(jnp.ones((2, 5), jnp.int32)),
        TypeError,
        "x: got dtype int32; expected a real floating-point array; convert it with x.astype(jnp.float32).",
    ),
    (
        lambda: applied(mask=jnp.ones((12,), bool)),
        ValueError,
        "mask: got shape (12,); expected rank 2 with each size 1 or that of x (12, 1); "
        "give the missing axes size 1, as in mask[:, None].",
    ),
    (lambda: applied(params=[]), ValueError, f"params: got 0 entries; {LAYERS}"),
    (lambda: applied(state={}), ValueError, f"state: got dict; {LAYERS}"),
]


@refusals(ERRORS)
def test_errors_say_what_was_given_what_was_expected_and_what_to_do(call, error, text):
    assert_refused(call, error, text)


def test_a_network_is_a_pair():
    network = mlp(SIZES)
    assert isinstance(network, Network)
    init, apply = network
    assert (init, apply) == (network.init, network.apply)
