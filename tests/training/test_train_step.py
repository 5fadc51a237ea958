"""One training step: what moves and what stays, for each optimizer, split, skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.closeness import CHAIN, assert_close, assert_same_bits
from support.refusals import assert_refused, refusals
from support.training import (
    OPTIMIZERS,
    SIZES,
    batch,
    linear,
    mlp,
    setup,
    squared_error,
    start,
)

from jbn import BNState, bn_labels, bn_merge_stats, bn_update_stats, weight_decay_mask
from jbn.training import TrainState, make_train_step


def test_a_step_of_sgd_is_that_of_the_plain_formulas_in_float64():
    _, old, step = setup()
    x, y = batch()
    first, last = jax.tree.map(lambda v: np.asarray(v, np.float64), old.params)
    X, Y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    (gamma, beta), m = first["bn"], len(X)

    z = X @ first["W"] + first["b"]
    mean, var = z.mean(0), z.var(0)
    r = 1 / np.sqrt(var + 1e-5)
    xhat = (z - mean) * r
    a = np.maximum(gamma * xhat + beta, 0)
    outputs = a @ last["W"] + last["b"]
    g = 2 * (outputs - Y) / outputs.size
    d_last_W, d_last_b = a.T @ g, g.sum(0)
    g = (g @ last["W"].T) * (a > 0)
    d_gamma, d_beta = (g * xhat).sum(0), g.sum(0)
    d_xhat = g * gamma
    d_var = (d_xhat * (z - mean)).sum(0) * -0.5 * r**3
    d_mean = -(d_xhat * r).sum(0)
    d_W = X.T @ (d_xhat * r + d_var * 2 * (z - mean) / m + d_mean / m)

    new, metrics = step(old, (x, y))
    want = [
        {
            "W": first["W"] - 0.05 * d_W,
            "b": first["b"],
            "bn": type(old.params[0]["bn"])(gamma - 0.05 * d_gamma, beta - 0.05 * d_beta),
        },
        {"W": last["W"] - 0.05 * d_last_W, "b": last["b"] - 0.05 * d_last_b, "bn": None},
    ]
    assert_close(new.params, want, roundings=CHAIN)
    assert_close(new.bn_state, [BNState(mean, var * m / (m - 1), np.ones(6)), None], roundings=CHAIN)
    np.testing.assert_allclose(metrics["loss"], np.mean((outputs - Y) ** 2), rtol=1e-5)
    assert not metrics["skipped"]
    assert new.step == 1


@pytest.mark.parametrize(("norm", "name"), [*(("z", name) for name in OPTIMIZERS), ("a", "adam"), (None, "adam")])
def test_every_optimizer_moves_W_b_gamma_beta_except_b_under_a_norm(norm, name):
    _, old, step = setup(norm, name)
    new = old
    for _ in range(2):
        new, metrics = step(new, batch())
    for i, (before, after) in enumerate(zip(old.params, new.params, strict=True)):
        hidden = i < len(SIZES) - 2
        assert (before["W"] != after["W"]).any()
        if hidden and norm == "z":
            assert_same_bits(after["b"], before["b"])
        else:
            assert (before["b"] != after["b"]).any()
        if hidden and norm is not None:
            assert (before["bn"].gamma != after["bn"].gamma).all()
            assert (before["bn"].beta != after["bn"].beta).all()
            assert (new.bn_state[i].count == 2).all()
    assert set(metrics) >= {"loss", "skipped"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    _, train_state, step = setup("z", name)
    losses = []
    for _ in range(40):
        train_state, metrics = step(train_state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_weight_decay_takes_from_W_alone():
    decayed = optax.adamw(0.01, weight_decay=0.5, mask=weight_decay_mask)
    _, old, step = setup("a", decayed)
    _, _, plain_step = setup("a", optax.adam(0.01))
    new, _ = step(old, batch())
    want, _ = plain_step(old._replace(opt_state=optax.adam(0.01).init(old.params)), batch())
    for before, after, plain in zip(old.params, new.params, want.params, strict=True):
        np.testing.assert_allclose(after["W"], plain["W"] - 0.01 * 0.5 * before["W"], rtol=1e-4, atol=1e-6)
        assert_same_bits((after["b"], after["bn"]), (plain["b"], plain["bn"]))


def test_batch_norm_can_have_a_learning_rate_of_its_own():
    network = mlp(SIZES)
    optimizer = optax.multi_transform({"bn": optax.sgd(0.5), "other": optax.sgd(0.1)}, bn_labels)
    _, old, step = setup("z", optimizer)
    x, y = batch()
    grads = jax.grad(lambda p: squared_error(network.apply(p, old.bn_state, x, train=True)[0], y))(old.params)
    rates = jax.tree.map(lambda label: {"bn": 0.5, "other": 0.1}[label], bn_labels(old.params))
    want = jax.tree.map(lambda p, g, rate: p - rate * g, old.params, grads, rates)
    assert_close(step(old, (x, y))[0].params, want, roundings=CHAIN)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(memory_size=2),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.inject_hyperparams(optax.adam)(learning_rate=optax.cosine_decay_schedule(0.1, 10)),
            optax.contrib.reduce_on_plateau(),
        ),
    ],
    ids=["lbfgs", "clip-schedule-reduce_on_plateau"],
)
def test_optimizers_that_want_more_than_gradients_are_served(optimizer):
    W = jnp.ones((4, 2), jnp.float32)
    step = jax.jit(make_train_step(linear, squared_error, optimizer, accumulate=2))
    with jax.numpy_dtype_promotion("standard"):
        train_state = TrainState(W, None, optimizer.init(W), jnp.zeros((), jnp.int32))
    train_state, first = step(train_state, batch())
    for _ in range(3):
        train_state, metrics = step(train_state, batch())
    assert metrics["loss"] < first["loss"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_of_ones_own_needs_no_batch_norm(accumulate):
    x, y = batch()
    W = jnp.ones((4, 2), jnp.float32)
    step = make_train_step(linear, squared_error, optax.sgd(0.1), accumulate=accumulate)
    new, _ = jax.jit(step)(TrainState(W, None, optax.sgd(0.1).init(W), jnp.zeros((), jnp.int32)), (x, y))
    X, Y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(new.params, 1 - 0.1 * 2 * X.T @ (X @ np.ones((4, 2)) - Y) / Y.size, rtol=1e-4)
    assert new.bn_state is None


def test_accumulation_without_a_norm_is_the_step_of_the_full_batch():
    _, old, step = setup(None, "adam")
    _, _, split_step = setup(None, "adam", accumulate=4)
    got, want = split_step(old, batch()), step(old, batch())
    assert_close(got, want, roundings=CHAIN)


@pytest.mark.parametrize("norm", ["z", "a"])
def test_accumulation_means_gradients_and_merges_statistics_of_consecutive_microbatches(norm):
    network, old, step = setup(norm, accumulate=4, momentum=0.7)
    x, y = batch()

    def loss(params, x, y):
        outputs, stats = network.apply(params, old.bn_state, x, train=True)
        return squared_error(outputs, y), stats

    one = jax.jit(jax.value_and_grad(loss, has_aux=True))
    micro = [one(old.params, x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]
    mean_grads = jax.tree.map(lambda *g: sum(g) / 4, *(grads for _, grads in micro))
    merged = bn_merge_stats(*(stats for (_, stats), _ in micro))

    new, metrics = step(old, (x, y))
    assert_close(new.params, jax.tree.map(lambda p, g: p - 0.05 * g, old.params, mean_grads), roundings=CHAIN)
    assert_close(new.bn_state, bn_update_stats(old.bn_state, merged, momentum=0.7), roundings=CHAIN)
    np.testing.assert_allclose(metrics["loss"], np.mean([v for (v, _), _ in micro]), rtol=1e-5)
    # The first layer sees the same values whatever the split: its statistics are those of the full batch.
    z = np.asarray(x, np.float64) @ np.asarray(old.params[0]["W"], np.float64) + np.asarray(old.params[0]["b"])
    z = np.maximum(z, 0) if norm == "a" else z
    np.testing.assert_allclose(new.bn_state[0].mean, z.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.bn_state[0].var, z.var(0, ddof=1), rtol=1e-4)
    np.testing.assert_array_equal(new.bn_state[0].count, 1)


def test_momentum_is_that_of_the_running_statistics():
    network, old, step = setup(momentum=0.0)
    new, _ = step(old, batch())
    x, y = batch(seed=1)
    _, stats = network.apply(new.params, new.bn_state, x, train=True)
    assert_close(step(new, (x, y))[0].bn_state, bn_update_stats(new.bn_state, stats, momentum=0.0), roundings=CHAIN)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("norm", ["z", None])
def test_a_step_on_a_bad_batch_changes_nothing_but_the_count_of_steps(accumulate, norm):
    _, old, step = setup(norm, "adam", accumulate=accumulate)
    old, _ = step(old, batch())
    x, y = batch()
    new, metrics = step(old, (x.at[5, 0].set(jnp.nan), y))
    assert metrics["skipped"]
    assert not np.isfinite(metrics["loss"])
    assert new.step == 2
    assert_same_bits(new[:3], old[:3])
    after, metrics = step(new, (x, y))
    assert not metrics["skipped"]
    assert_same_bits(after._replace(step=jnp.int32(2)), step(old, (x, y))[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_an_empty_batch_changes_nothing_but_the_count_of_steps(accumulate):
    _, old, step = setup("z", "adam", accumulate=accumulate)
    new, metrics = step(old, jax.tree.map(lambda v: v[:0], batch()))
    assert metrics["skipped"]
    assert new.step == 1
    assert_same_bits(new[:3], old[:3])


def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is():
    network = mlp(SIZES)

    def kinked(outputs, y):
        return jnp.sqrt(jnp.sum(jnp.square(0 * outputs)))

    step = jax.jit(make_train_step(network.apply, kinked, OPTIMIZERS["adam"]))
    old = start(network, OPTIMIZERS["adam"])
    new, metrics = step(old, batch())
    assert metrics["loss"] == 0
    assert metrics["skipped"]
    assert_same_bits(new[:3], old[:3])


def test_without_skip_nonfinite_the_bad_batch_reaches_the_parameters():
    _, old, step = setup(skip_nonfinite=False)
    x, y = batch()
    new, metrics = step(old, (x.at[5, 0].set(jnp.nan), y))
    assert not metrics["skipped"]
    assert np.isnan(new.params[0]["W"]).any()
    assert_same_bits(new.bn_state[0], old.bn_state[0])  # batch norm looks after its own


def test_a_network_that_computes_in_bfloat16_keeps_float32_for_all_that_is_carried():
    network, optimizer = mlp(SIZES, dtype=jnp.bfloat16), OPTIMIZERS["adam"]
    step = jax.jit(make_train_step(network.apply, squared_error, optimizer, accumulate=2))
    old = start(network, optimizer)
    new, first = step(old, batch())
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(old)]
    for _ in range(40):
        new, metrics = step(new, batch())
    assert metrics["loss"] < 0.8 * first["loss"]


def test_a_narrow_loss_is_reported_in_float32():
    network = mlp(SIZES, dtype=jnp.bfloat16)
    optimizer = OPTIMIZERS["sgd"]
    step = make_train_step(network.apply, lambda outputs, y: jnp.mean(jnp.square(outputs)), optimizer)
    _, metrics = jax.eval_shape(step, start(network, optimizer), batch())
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["skipped"].dtype == jnp.bool_


@pytest.mark.parametrize("norm", ["z", pytest.param("a", marks=pytest.mark.nightly)])
def test_handwritten_digits_are_read_with_more_than_95_percent_accuracy(norm):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = jnp.asarray((digits.data[order] - 4.88) / 6.02, jnp.float32)
    y = jnp.asarray(digits.target[order], jnp.int32)

    def loss_fn(outputs, y):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))

    network, optimizer = mlp((64, 64, 64, 10), norm=norm), optax.adam(3e-3)
    step = make_train_step(network.apply, loss_fn, optimizer)
    epoch = jax.jit(lambda s, b: jax.lax.scan(step, s, b))
    params, bn_state = network.init(jax.random.key(0))
    train_state = TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))
    train = (x[:1408].reshape(22, 64, 64), y[:1408].reshape(22, 64))
    for _ in range(6):
        train_state, metrics = epoch(train_state, train)
    outputs, _ = network.apply(train_state.params, train_state.bn_state, x[1408:], train=False)
    assert np.mean(np.argmax(np.asarray(outputs), 1) == np.asarray(y[1408:])) > 0.95
    assert not metrics["skipped"].any()
    assert train_state.step == 132


def make(apply=None, loss_fn=squared_error, **options):
    apply = mlp(SIZES).apply if apply is None else apply
    return make_train_step(apply, loss_fn, optax.sgd(0.1), **options)


def stepped(data=None, **options):
    return make(**options)(start(mlp(SIZES), optax.sgd(0.1)), batch(10) if data is None else data)


ERRORS = [
    (
        lambda: make_train_step(mlp((4, 2)), jnp.sum, optax.sgd(0.1)),
        TypeError,
        "apply: got Network; expected a function; pass it, not what it returns.",
    ),
    (
        lambda: make(loss_fn="mse"),
        TypeError,
        "loss_fn: got 'mse'; expected a function; pass it, not its name.",
    ),
    (
        lambda: stepped(accumulate=4),
        ValueError,
        "accumulate: got 4 for a batch of 10; expected a divisor of the batch size; "
        "use another accumulate, or leave the last, short batch out.",
    ),
    (
        lambda: make(accumulate=0),
        ValueError,
        "accumulate: got 0; expected at least 1; pass accumulate=1 for no splitting.",
    ),
    (
        lambda: make(accumulate=True),
        TypeError,
        "accumulate: got True; expected an int; pass accumulate=1 for no splitting.",
    ),
    (
        lambda: make(momentum=1.5),
        ValueError,
        "momentum: got 1.5; expected 0 ≤ momentum ≤ 1, the share kept; pass 1 - m for PyTorch's momentum m.",
    ),
    (
        lambda: make(skip_nonfinite=1),
        TypeError,
        "skip_nonfinite: got 1; expected a bool; pass skip_nonfinite=True or skip_nonfinite=False.",
    ),
    (
        lambda: stepped(axis_name="devices"),
        ValueError,
        "axis_name: got 'devices', which is not bound here; expected the name of an enclosing axis; "
        "call inside shard_map, pmap or vmap with that axis_name, or leave it out.",
    ),
    (
        lambda: stepped(batch(10)[0]),
        TypeError,
        "batch: got array of shape (10, 4); expected (x, y); call step(train_state, (x, y)).",
    ),
    (
        lambda: stepped((batch(10)[0], batch(9)[1])),
        ValueError,
        "batch: got shapes [(10, 4), (9, 2)]; expected one leading size, the examples; give each x its y.",
    ),
    (
        lambda: stepped(loss_fn=lambda outputs, y: jnp.square(outputs - y).sum(1)),
        ValueError,
        "loss_fn: got shape (10,) and dtype float32; expected a real scalar, the mean over the examples; "
        "end it with .mean().",
    ),
]


@refusals(ERRORS)
def test_errors_say_what_was_given_what_was_expected_and_what_to_do(call, error, text):
    assert_refused(call, error, text)
