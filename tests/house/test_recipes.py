"""The recipes of docs/recipes.md, each against a construction that does not use what it shows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracle
from support.closeness import assert_close, assert_same_bits

from jbn import BNParams, BNState, bn_apply, bn_init, bn_labels, bn_merge_stats, bn_update_stats
from jbn.networks import mlp

N, C, K = 8, 3, 4


def array(*shape, seed=0, scale=1.0, offset=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale + offset, jnp.float32)


def generic():
    """(params, state) that are not those of the start."""
    gamma, beta, mean = array(3, C, seed=1)
    return BNParams(gamma, beta), BNState(mean, jnp.square(beta) + 0.5, jnp.full(C, 7, jnp.int32))


# Frozen batch norm in fine-tuning


def test_frozen_batch_norm_is_an_affine_map_that_nothing_moves():
    params, state = generic()
    x, weights = array(N, C), array(N, C, seed=2)

    @jax.jit
    def frozen(params, state, x):
        y, vjp, stats = jax.vjp(lambda x: bn_apply(params, state, x, train=False), x, has_aux=True)
        return y, vjp(weights)[0], bn_update_stats(state, stats)

    y, d_x, new = frozen(params, state, x)
    scale = oracle.float64(params.gamma) / np.sqrt(oracle.float64(state.var) + 1e-5)
    assert_close(y, (oracle.float64(x) - oracle.float64(state.mean)) * scale + oracle.float64(params.beta))
    assert_close(d_x, oracle.float64(weights) * scale)
    assert_same_bits(new, state)


def test_gamma_and_beta_are_frozen_by_their_label():
    network = mlp((3, 5, 2))
    params, state = network.init(jax.random.key(0))
    optimizer = optax.multi_transform({"bn": optax.set_to_zero(), "other": optax.sgd(0.1)}, bn_labels)

    def loss(params):
        return jnp.sum(jnp.square(network.apply(params, state, array(N, 3), train=False)[0]))

    grads = jax.jit(jax.grad(loss))(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert (np.asarray(grads[0]["bn"].gamma) != 0).any()
    assert_same_bits(new[0]["bn"], params[0]["bn"])
    assert_close(new[1]["W"], params[1]["W"] - 0.1 * grads[1]["W"])


# Conditional batch norm


def conditional_by_gather(gamma, beta, x, label):
    normalized, stats = bn_apply(BNParams(None, None), None, x, train=True)
    between = tuple(range(1, x.ndim - 1))
    return normalized * jnp.expand_dims(gamma[label], between) + jnp.expand_dims(beta[label], between), stats


def conditional_by_vmap(gamma, beta, x, label):
    def example(gamma, beta, x):
        return bn_apply(BNParams(gamma, beta), None, x, train=True, axis_name="batch")

    y, stats = jax.vmap(example, axis_name="batch")(gamma[label], beta[label], x)
    return y, jax.tree.map(lambda v: v[0], stats)


@pytest.mark.parametrize("shape", [(N, C), (N, 2, 2, C), (40, C)], ids=str)
@pytest.mark.parametrize("apply", [conditional_by_gather, conditional_by_vmap])
def test_conditional_batch_norm_takes_gamma_and_beta_of_each_examples_class(apply, shape):
    gamma, beta = array(2, K, C, seed=1)
    x, weights = array(*shape, offset=1), array(*shape, seed=2)
    label = jnp.asarray(np.random.default_rng(3).integers(0, K, shape[0]))

    def loss(gamma, beta, x):
        y, stats = apply(gamma, beta, x, label)
        return jnp.sum(weights * y), (y, stats)

    (d_gamma, d_beta, d_x), (y, stats) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(gamma, beta, x)
    of_each = [np.expand_dims(oracle.float64(v)[label], tuple(range(1, x.ndim - 1))) for v in (gamma, beta)]
    assert_close(y, oracle.batch_norm(x) * of_each[0] + of_each[1], roundings=32)
    g = oracle.float64(weights)
    assert_close(d_x, oracle.gradients(x, g * of_each[0]).x, roundings=64)
    for k in range(K):
        mine = np.asarray(label) == k
        np.testing.assert_allclose(d_gamma[k], (g * oracle.batch_norm(x))[mine].reshape(-1, C).sum(0), atol=2e-5)
        np.testing.assert_allclose(d_beta[k], g[mine].reshape(-1, C).sum(0), atol=1e-5)
    np.testing.assert_allclose(stats.var, oracle.moments(x).var, rtol=1e-5)


# Statistics per domain


def test_each_domain_has_running_statistics_of_its_own():
    params, _ = generic()
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[bn_init(C)[1] for _ in range(K)])

    @jax.jit
    def step(states, x, domain):
        state = jax.tree.map(lambda s: s[domain], states)
        y, stats = bn_apply(params, state, x, train=True)
        new = bn_update_stats(state, stats)
        return y, jax.tree.map(lambda s, n: s.at[domain].set(n), states, new)

    alone = [bn_init(C)[1] for _ in range(K)]
    for i, domain in enumerate((2, 0, 2, 3, 2)):
        x = array(N, C, seed=i, scale=1 + domain, offset=10 * domain)
        _, states = step(states, x, jnp.int32(domain))
        alone[domain] = bn_update_stats(alone[domain], bn_apply(params, None, x, train=True)[1])
    assert_close(states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))
    np.testing.assert_array_equal(states.count[:, 0], [1, 0, 3, 1])
    x = array(N, C)
    got = jax.vmap(lambda s: bn_apply(params, s, x, train=False)[0])(states)
    for k in range(K):
        assert_close(got[k], oracle.normalize(x, *params, *map(oracle.float64, alone[k][:2])))


# Two forward passes in one step


def test_two_batches_seen_by_one_network_are_one_update_with_all_of_both():
    params, state = generic()
    real, fake = array(N, C), array(2 * N, C, seed=4, offset=3)

    @jax.jit
    def step(state, real, fake):
        y_real, of_real = bn_apply(params, state, real, train=True)
        y_fake, of_fake = bn_apply(params, state, fake, train=True)
        return y_real, y_fake, bn_update_stats(state, bn_merge_stats(of_real, of_fake))

    y_real, y_fake, new = step(state, real, fake)
    assert_close(y_real, oracle.batch_norm(real, *params))
    assert_close(y_fake, oracle.batch_norm(fake, *params))
    both = np.concatenate([oracle.float64(real), oracle.float64(fake)])
    w = oracle.weight(8, 0.9)
    np.testing.assert_allclose(new.mean, (1 - w) * oracle.float64(state.mean) + w * both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, (1 - w) * oracle.float64(state.var) + w * both.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(new.count, 8)


def test_sharpness_aware_minimization_keeps_the_statistics_of_the_first_pass():
    network = mlp((3, 5, 2))
    params, state = network.init(jax.random.key(0))
    x, y = array(N, 3), array(N, 2, seed=5)

    def loss(params, state):
        outputs, stats = network.apply(params, state, x, train=True)
        return jnp.mean(jnp.square(outputs - y)), stats

    @jax.jit
    def step(params, state):
        grads, stats = jax.grad(loss, has_aux=True)(params, state)
        length = 0.05 / jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        sharp, _ = jax.grad(loss, has_aux=True)(jax.tree.map(lambda p, g: p + length * g, params, grads), state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, sharp), bn_update_stats(state, stats)

    new, new_state = step(params, state)
    z = oracle.float64(x) @ oracle.float64(params[0]["W"])  # at the weights that the step began with
    np.testing.assert_allclose(new_state[0].mean, z.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_state[0].var, z.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(new_state[0].count, 1)
    assert (np.asarray(new[0]["W"]) != np.asarray(params[0]["W"])).any()


# Evaluation with batch statistics


def test_evaluation_with_batch_statistics_is_training_whose_statistics_are_dropped():
    network = mlp((C, 5, 2))
    params, state = network.init(jax.random.key(0))
    x = array(N, C, offset=4)
    outputs, _ = network.apply(params, state, x, train=True)
    first, last = params
    z = oracle.float64(x) @ oracle.float64(first["W"]) + oracle.float64(first["b"])
    a = np.maximum(oracle.batch_norm(z, *first["bn"]), 0)
    np.testing.assert_allclose(outputs, a @ oracle.float64(last["W"]) + oracle.float64(last["b"]), rtol=1e-4, atol=1e-5)


# Cumulative average


def test_momentum_1_is_the_plain_average_of_all_batches():
    params, state = bn_init(C)
    batches = [array(N, C, seed=i, scale=1 + i, offset=i) for i in range(5)]
    for x in batches:
        state = bn_update_stats(state, bn_apply(params, state, x, train=True)[1], momentum=1.0)
    wide = oracle.float64(jnp.stack(batches))
    np.testing.assert_allclose(state.mean, wide.mean(1).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.var, wide.var(1, ddof=1).mean(0), rtol=1e-5)


# Ensembles


def test_an_ensemble_is_a_vmap_and_each_member_is_as_if_alone():
    network = mlp((3, 5, 2))
    keys = jax.random.split(jax.random.key(0), K)
    x, y = array(N, 3), array(N, 2, seed=6)

    def step(params, state):
        def loss(params):
            outputs, stats = network.apply(params, state, x, train=True)
            return jnp.mean(jnp.square(outputs - y)), stats

        grads, stats = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), bn_update_stats(state, stats)

    params, states = jax.vmap(network.init)(keys)
    new, new_states = jax.jit(jax.vmap(step))(params, states)
    alone = jax.jit(step)
    for i in range(K):
        got = jax.tree.map(lambda v: v[i], (new, new_states))  # noqa: B023
        assert_close(got, alone(*network.init(keys[i])), roundings=128)
    x = array(5, 3, seed=7)
    outputs, _ = jax.vmap(partial(network.apply, train=False), (0, 0, None))(new, new_states, x)
    assert outputs.shape == (K, 5, 2)
