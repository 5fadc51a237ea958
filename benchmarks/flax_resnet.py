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


class ResNet(nn.Module):
    classes: int
    blocks: int
    norm: Any
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x):
        def layer(name, x, features, size=3, stride=1):
            kernel, strides, padding = (size, size), (stride, stride), [(size // 2, size // 2)] * 2
            conv = nn.Conv(features, kernel, strides, padding, use_bias=False, dtype=self.dtype, name=f"{name}_conv")
            average = not self.train
            norm = self.norm(use_running_average=average, momentum=0.0, dtype=self.dtype, name=f"{name}_norm")
            return norm(conv(x))

        x = nn.relu(layer("stem", x.astype(self.dtype), 16))
        for i in range(3 * self.blocks):
            features, stride = 16 * 2 ** (i // self.blocks), 2 if i > 0 and i % self.blocks == 0 else 1
            y = nn.relu(layer(f"block{i}_conv1", x, features, 3, stride))
            y = layer(f"block{i}_conv2", y, features)
            x = layer(f"block{i}_shortcut", x, features, 1, stride) if stride > 1 else x
            x = nn.relu(x + y)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(jnp.mean(x, (1, 2)))


def network(classes: int, *, norm: Any, dtype: Any, blocks: int = 3) -> networks.Network:
    """A network around ``norm``, a class like `flax.linen.BatchNorm`."""

    def apply(params, state, x, *, train, axis_name=None, mask=None):
        model = ResNet(classes, blocks, norm, dtype, train)
        weights = {"head": {"kernel": params["head"]["W"], "bias": params["head"]["b"]}}
        for name, layer in _named(params):
            weights[f"{name}_conv"] = {"kernel": layer["W"]}
            weights[f"{name}_norm"] = {"scale": layer["bn"].gamma, "bias": layer["bn"].beta}
        running = {f"{name}_norm": {"mean": own.mean, "var": own.var} for name, own in _named(state)}
        outputs, updated = model.apply({"params": weights, "batch_stats": running}, x, mutable=["batch_stats"])
        seen = [updated["batch_stats"][f"{name}_norm"] for name, _ in _named(state)]
        stats = [jbn.BNStats(own["mean"], own["var"], jnp.ones_like(own["mean"])) for own in seen]
        return outputs, jax.tree.unflatten(jax.tree.structure(state, is_leaf=_is_state), stats)

    return networks.Network(networks.resnet(classes, blocks=blocks).init, apply)


def _named(tree):
    """The layers with a norm, each with its name in Flax, in the order of the tree's leaves."""
    for i, block in enumerate(tree["blocks"]):
        yield from ((f"block{i}_{name}", block[name]) for name in sorted(block))
    yield "stem", tree["stem"]


def _is_state(node):
    return isinstance(node, jbn.BNState)
