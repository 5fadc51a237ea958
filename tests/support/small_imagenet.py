"""Small residual networks with the stem for ImageNet, a batch for them, and their plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn import BNParams, BNState, BNStats
from jbn.networks import resnet

EPS = 1e-5
N, SHAPE, CLASSES = 8, (14, 9, 2), 3
BLOCKS = pytest.mark.parametrize("block", ["basic", "bottleneck"])
small = partial(resnet, CLASSES, in_channels=2, stem="imagenet", widths=(2, 3), blocks=(1, 2))
# Of each block: whether it halves the image.
HALVES = (False, True, False)


def patches(xp, a, size, stride, fill=0.0):
    """(size·size, N, rows, columns, C): what each window sees, with size//2 pixels of padding on each side."""
    p = size // 2
    a = xp.pad(a, ((0, 0), (p, p), (p, p), (0, 0)), constant_values=fill)
    rows, columns = ((n - size) // stride + 1 for n in a.shape[1:3])
    return xp.stack(
        [
            a[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            for i in range(size)
            for j in range(size)
        ]
    )


def plain(xp, params, x, state=None):
    """Outputs, and (mean, var) of each layer, in the structure of params; ``state`` for evaluation.

    ``xp`` is numpy, or jax.numpy for autodiff.
    """
    g = partial(xp.maximum, 0.0)

    def layer(node, running, a, stride):
        W = node["W"]
        seen = patches(xp, a, W.shape[0], stride)
        z = xp.einsum("knhwc,kcd->nhwd", seen, W.reshape(len(seen), *W.shape[2:]))
        if node["bn"] is None:
            return z + node["b"][None, None, None], None
        moments = (z.mean((0, 1, 2)), z.var((0, 1, 2))) if running is None else (running.mean, running.var)
        gamma, beta, mean, var = (v[None, None, None] for v in (*node["bn"], *moments))
        return gamma * (z - mean) / xp.sqrt(var + EPS) + beta, moments

    def at(node, key):
        return None if node is None else node[key]

    a, stem = layer(params["stem"], at(state, "stem"), x, 2)
    a = patches(xp, g(a), 3, 2, fill=-np.inf).max(0)
    moments = []
    for i, (block, halves) in enumerate(zip(params["blocks"], HALVES, strict=True)):
        running, seen, z = at(at(state, "blocks"), i), {}, a
        convs = sorted(name for name in block if name != "shortcut")
        for name in convs:
            first_3x3 = name == ("conv1" if len(convs) == 2 else "conv2")
            z = z if name == "conv1" else g(z)
            z, seen[name] = layer(block[name], at(running, name), z, 2 if halves and first_3x3 else 1)
        if "shortcut" in block:
            a, seen["shortcut"] = layer(block["shortcut"], at(running, "shortcut"), a, 2 if halves else 1)
        a = g(a + z)
        moments.append(seen)
    outputs = a.mean((1, 2)) @ params["head"]["W"] + params["head"]["b"][None]
    return outputs, {"stem": stem, "blocks": moments, "head": None}


def made(block="bottleneck", **options):
    """A network with params in which nothing is 0 or 1, its state as after training, and a batch."""
    network = small(block=block, **options)
    params, state = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), params)

    def trained(node):
        mean, var = rng.normal(size=node.mean.shape), rng.uniform(0.5, 2, node.var.shape)
        return BNState(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), node.count + 5)

    state = jax.tree.map(trained, state, is_leaf=is_norm)
    x = jnp.asarray(2 * rng.normal(size=(N, *SHAPE)) + 1, jnp.float32)
    return network, params, state, x


def is_norm(node):
    return isinstance(node, (BNParams, BNState, BNStats))


def in_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)
