"""A small network, its train state and its compiled step, made once for all tests of training."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jbn import networks
from jbn.training import TrainState, make_train_step

OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "rmsprop": optax.rmsprop(0.03),
    "adam": optax.adam(0.03),
}
SIZES = (4, 6, 2)
mlp = cache(networks.mlp)  # one object, so that what is compiled for it is compiled once


def squared_error(outputs, y):
    return jnp.mean(jnp.square(outputs.astype(y.dtype) - y))


@partial(jax.jit, static_argnums=0)
def generic(network, key):
    """Params in which γ, β and b are neither 0 nor 1, and the state."""
    params, bn_state = network.init(key)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    leaves = [p + 0.1 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves), bn_state


def start(network, optimizer, key=0):
    params, bn_state = generic(network, jax.random.key(key))
    with jax.numpy_dtype_promotion("standard"):
        return TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))


def batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, SIZES[0])) * 2 + 1
    y = np.stack([np.sin(x).sum(1), x.prod(1)], 1)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


@cache
def setup(norm="z", optimizer="sgd", **options):
    """(network, train state, jitted step), compiled once for all tests."""
    network, optimizer = mlp(SIZES, norm=norm), OPTIMIZERS.get(optimizer, optimizer)
    step = jax.jit(make_train_step(network.apply, squared_error, optimizer, **options))
    return network, start(network, optimizer), step


def linear(params, bn_state, x, *, train):
    assert train
    return x @ params, None


def mapped(kind, step):
    """The step, its batch split over 8 devices (or members of a vmap), its train state replicated."""
    if kind in ("vmap", "pmap"):
        options = {"in_axes": (None, 0), "out_axes": None, "axis_name": "data"}
        inner = jax.jit(jax.vmap(step, **options)) if kind == "vmap" else jax.pmap(step, **options)
        return lambda train_state, batch: inner(
            train_state, jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
        )
    checks = {} if kind == "shard_map" else {"check_vma": False}
    mesh = jax.make_mesh((8,), ("data",))
    inner = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), **checks))
    return lambda train_state, batch: inner(train_state, jax.device_put(batch, NamedSharding(mesh, P("data"))))
