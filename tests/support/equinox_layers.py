"""A layer of Equinox or of its door with parameters of its own, mapped over a batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def made(cls, channels=3, names="batch", *, seed=0, **options):
    """(layer, state), with γ and β other than 1 and 0 where there are any."""
    layer, state = eqx.nn.make_with_state(cls)(channels, names, **{"dtype": jnp.float32, **options})
    if layer.weight is not None:
        gamma, beta = np.random.default_rng(seed).normal(size=(2, channels)) + 1
        affine = (jnp.asarray(gamma, layer.weight.dtype), jnp.asarray(beta, layer.weight.dtype))
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, affine)
    return layer, state


def mapped(layer, name="batch"):
    return jax.jit(jax.vmap(layer, axis_name=name, in_axes=(0, None), out_axes=(0, None)))


def copied(state):
    """An `equinox.nn.State` may be used once; a copy may be used again."""
    return jax.tree.map(lambda leaf: leaf, state)


def batch(shape=(6, 3, 4), dtype=jnp.float32, *, seed=1, offset=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 1.5 + offset, dtype)


def loss(layer, x, state):
    """Of the output and of the new state, so that gradients through both are seen."""
    y, state = mapped(layer)(x, state)
    moments = [v for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, jnp.floating)]
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(weights * jnp.sin(y)) + sum(jnp.sum(jnp.cos(v)) for v in moments), (y, state)
