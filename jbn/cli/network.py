"""What describes a network in a saved file, and the network, loss and optimizer that it stands for."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jbn
from jbn.cli.options import ACTIVATIONS, DTYPES, NETWORKS, TrainOptions
from jbn.networks import Network, mlp, resnet

__all__ = ["NetworkSpec", "activation_of", "build", "loss_fn", "make_optimizer", "maker"]


_LAYERS, _WEIGHTS = 1000, 2**28


class NetworkSpec(NamedTuple):
    """All that is needed to build a network again; plain values, as JSON holds them.

    Attributes:
        network: which kind, "mlp" or "resnet".
        sizes: (in, hidden, …, out); for a resnet (channels of the images, those of each stage, …, out).
        norm: "z", "a" or None.
        activation: its name in `jax.nn`.
        dtype: of the computation.
        blocks: in each stage of a resnet; 0 for an mlp.
    """

    network: str
    sizes: tuple[int, ...]
    norm: str | None
    activation: str
    dtype: str
    blocks: int = 0

    @classmethod
    def parsed(cls, fields: dict[str, Any]) -> "NetworkSpec":
        """The spec that ``_asdict`` wrote as JSON; a ValueError or TypeError for any other."""
        spec = cls(**{**fields, "sizes": tuple(fields["sizes"])})
        known = (
            spec.network in NETWORKS
            and len(spec.sizes) > 1
            and all(type(size) is int and size > 0 for size in (*spec.sizes, spec.blocks + 1))
            and spec.norm in ("z", "a", None)
            and spec.activation in ACTIVATIONS
            and spec.dtype in DTYPES
        )
        if not known or spec.excess:
            raise ValueError(f"network: got {spec}; expected one that jbn train makes; train it.")
        return spec

    @property
    def excess(self) -> str | None:
        """What a network is that is too large for the command line: it would take hours to compile, or all memory."""
        stages = len(self.sizes) - 2
        if self.network == "mlp":
            layers, weights = stages + 1, sum(a * b for a, b in pairwise(self.sizes))
        else:
            layers = 2 + 2 * stages * self.blocks
            weights = 9 * sum(a * b + (2 * self.blocks - 1) * b * b for a, b in pairwise(self.sizes))
        if layers <= _LAYERS and weights <= _WEIGHTS:
            return None
        return f"a network of {layers} layers and {weights} weights; expected at most {_LAYERS} and {_WEIGHTS}"


def build(spec: NetworkSpec) -> Network:
    """The network that a spec describes."""
    return maker(spec)()


def maker(spec: NetworkSpec) -> Callable[..., Network]:
    """What makes the network that a spec describes, with room for more arguments."""
    common = {"norm": spec.norm, "activation": activation_of(spec.activation), "dtype": jnp.dtype(spec.dtype)}
    if spec.network == "mlp":
        return partial(mlp, spec.sizes, **common)
    channels, *widths, classes = spec.sizes
    return partial(resnet, classes, in_channels=channels, widths=widths, blocks=spec.blocks, **common)


def activation_of(name: str) -> Any:
    """An activation by its name in `jax.nn`."""
    return getattr(jax.nn, name)


def loss_fn(outputs: Any, y: Any) -> Any:
    """Mean cross-entropy, of logits in at least float32."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y).mean()


def make_optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """The optimizer of the options; weight decay is decoupled from it, and leaves γ, β and b alone."""
    rules = {
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(decay=0.9),
        "rmsprop": optax.scale_by_rms,
        "adam": optax.scale_by_adam,
    }
    return optax.chain(
        rules[options.optimizer](),
        optax.add_decayed_weights(options.weight_decay, mask=jbn.weight_decay_mask),
        optax.scale_by_learning_rate(options.lr),
    )
