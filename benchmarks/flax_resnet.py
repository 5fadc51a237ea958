"""The network of `jbn.networks.resnet` as a Flax module, so that a whole Flax model is timed beside it.

It has the same weights from the same key, takes and gives params, state and stats in the form of `jbn.networks`,
and lets Flax keep nothing: with momentum 0 what its layers store is what the batch showed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jbn
from jbn import networks


class ConvNorm(nn.Module):
    features: int
    size: int
    stride: int
    norm: Any
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x):
        padding = [(self.size // 2, self.size // 2)] * 2
        kernel, strides = (self.size, self.size), (self.stride, self.stride)
        conv = nn.Conv(self.features, kernel, strides, padding, use_bias=False, dtype=self.dtype, name="conv")
        norm = self.norm(use_running_average=not self.train, momentum=0.0, dtype=self.dtype, name="norm")
        return norm(conv(x))


class ResNet(nn.Module):
    classes: int
    blocks: int
    norm: Any
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x):
        def layer(name, features, size=3, stride=1):
            return ConvNorm(features, size, stride, self.norm, self.dtype, self.train, name=name)

        x = nn.relu(layer("stem", 16)(x.astype(self.dtype)))
        for i in range(3 * self.blocks):
            features, stride = 16 * 2 ** (i // self.blocks), 2 if i > 0 and i % self.blocks == 0 else 1
            y = nn.relu(layer(f"block{i}_conv1", features, 3, stride)(x))
            y = layer(f"block{i}_conv2", features)(y)
            x = layer(f"block{i}_shortcut", features, 1, stride)(x) if stride > 1 else x
            x = nn.relu(x + y)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(jnp.mean(x, (1, 2)))


def network(classes: int, *, norm: Any, dtype: Any, blocks: int = 3) -> networks.Network:
    """A network around ``norm``, a class like `flax.linen.BatchNorm`."""

    def apply(params, state, x, *, train, axis_name=None, mask=None):
        model = ResNet(classes, blocks, norm, dtype, train)
        head = params["head"]
        weights = {name: _as_flax(layer) for name, layer in _named(params)}
        variables = {
            "params": {**weights, "head": {"kernel": head["W"], "bias": head["b"]}},
            "batch_stats": {name: {"norm": {"mean": v.mean, "var": v.var}} for name, v in _named(state)},
        }
        outputs, updated = model.apply(variables, x, mutable=["batch_stats"])
        seen = {name: layer["norm"] for name, layer in updated["batch_stats"].items()}
        stats = [
            jbn.BNStats(v["mean"], v["var"], jnp.ones_like(v["mean"])) for v in (seen[n] for n, _ in _named(state))
        ]
        return outputs, jax.tree.unflatten(jax.tree.structure(state, is_leaf=_is_state), stats)

    return networks.Network(networks.resnet(classes, blocks=blocks).init, apply)


def _named(tree):
    """The layers with a norm, each with its name in Flax, in the order of the tree's leaves."""
    for i, block in enumerate(tree["blocks"]):
        yield from ((f"block{i}_{name}", block[name]) for name in sorted(block))
    yield "stem", tree["stem"]


def _as_flax(layer):
    return {"conv": {"kernel": layer["W"]}, "norm": {"scale": layer["bn"].gamma, "bias": layer["bn"].beta}}


def _is_state(node):
    return isinstance(node, jbn.BNState)
