"""A small `resnet`, a batch for it, and its plain formula, in NumPy or in jax.numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.networks import resnet

EPS = 1e-5
N, SHAPE, CLASSES = 8, (7, 5, 2), 3
NORMS = pytest.mark.parametrize("norm", ["z", None])
small = partial(resnet, CLASSES, in_channels=2, widths=(4, 6), blocks=1)


def plain(xp, params, x, moments=None):
    """Outputs, and (mean, var) by layer, of a network with one block in each of two stages.

    ``xp`` is numpy, or jax.numpy for autodiff. ``moments`` are those to normalize with, for evaluation.
    """
    seen = {}

    def conv(name, layer, a, stride):
        W = layer["W"]
        p = W.shape[0] // 2
        a = xp.pad(a, ((0, 0), (p, p), (p, p), (0, 0)))
        rows, columns = ((n - 2 * p - 1) // stride + 1 for n in a.shape[1:3])
        patches = [
            a[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            for i in range(W.shape[0])
            for j in range(W.shape[1])
        ]
        z = xp.einsum("knhwc,kcd->nhwd", xp.stack(patches), W.reshape(len(patches), *W.shape[2:]))
        if layer["bn"] is None:
            return z + layer["b"][None, None, None]
        gamma, beta = layer["bn"]
        mean, var = (z.mean((0, 1, 2)), z.var((0, 1, 2))) if moments is None else moments[name]
        seen[name] = (mean, var)
        per_channel = (v[None, None, None] for v in (mean, xp.sqrt(var + EPS), gamma, beta))
        mean, std, gamma, beta = per_channel
        return gamma * (z - mean) / std + beta

    def g(z):
        return xp.where(z > 0, z, 0.0)

    a = g(conv("stem", params["stem"], x, 1))
    first, second = params["blocks"]
    z = conv("0 conv2", first["conv2"], g(conv("0 conv1", first["conv1"], a, 1)), 1)
    a = g(a + z)
    z = conv("1 conv2", second["conv2"], g(conv("1 conv1", second["conv1"], a, 2)), 1)
    a = g(conv("1 shortcut", second["shortcut"], a, 2) + z)
    return a.mean((1, 2)) @ params["head"]["W"] + params["head"]["b"][None], seen


def by_name(tree):
    """The nodes of a state or of stats under the names that `plain` uses."""
    first, second = tree["blocks"]
    return {
        "stem": tree["stem"],
        **{f"0 {name}": node for name, node in first.items()},
        **{f"1 {name}": node for name, node in second.items()},
    }


def in_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


def made(norm="z", **options):
    """A network with params in which nothing is 0 or 1, its state, and a batch."""
    network = small(norm=norm, **options)
    params, state = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), params)
    x = jnp.asarray(2 * rng.normal(size=(N, *SHAPE)) + 1, jnp.float32)
    return network, params, state, x
