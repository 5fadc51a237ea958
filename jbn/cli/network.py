"""One description of a network: the options that ask for it, what files say of it, and what it is built by."""

from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from jbn.cli.bad_input import BadInput
from jbn.cli.parsers import choice, dashed, integer, option, sizes
from jbn.networks import Network, mlp, resnet

__all__ = ["NetworkOptions", "NetworkSpec"]

# Each kind, and the option that holds the widths of its layers.
_WIDTHS = {"mlp": "hidden", "resnet": "widths"}
ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu", "silu")
_MOST_LAYERS, _MOST_WEIGHTS = 1000, 2**28


@dataclass(frozen=True)
class NetworkOptions:
    """What a network is asked to be, in the words of ``jbn train``; None for what its kind does not have."""

    network: str = option(
        choice(tuple(_WIDTHS)), "mlp|resnet", "Dense layers (mlp), or convolutions with shortcuts (resnet).", "mlp"
    )
    norm: str = option(
        choice(("z", "a", "none")), "z|a|none", "Normalize before the activation (z), after it (a), or not.", "z"
    )
    hidden: tuple[int, ...] | None = option(
        sizes("128,128,128", "hidden layer"), "INT,INT,…", "Widths of the hidden layers.", mlp=(128, 128, 128)
    )
    widths: tuple[int, ...] | None = option(
        sizes("8,16", "stage"), "INT,INT,…", "Channels of each stage.", resnet=(8, 16)
    )
    blocks: int | None = option(integer(1, 1), "INT", "Blocks in each stage.", resnet=1)
    activation: str = option(
        choice(ACTIVATIONS), "|".join(ACTIVATIONS), "Of the hidden layers.", mlp="sigmoid", resnet="relu"
    )
    dtype: str = option(choice(("float32", "bfloat16")), "float32|bfloat16", "Of the computation.", "float32")

    def __post_init__(self) -> None:
        if self.network == "resnet" and self.norm == "a":
            raise BadInput(
                "--norm: got a with --network resnet; expected z or none; a residual network normalizes before "
                "the activation, as in --norm z."
            )


@dataclass(frozen=True, kw_only=True)
class NetworkSpec(NetworkOptions):
    """A network for data of a certain kind.

    Attributes:
        inputs: values of an example; for a resnet the channels of an image.
        classes: of the data.
    """

    inputs: int = option(integer(1, 1), "", "")
    classes: int = option(integer(1, 1), "", "")

    @classmethod
    def of(cls, options: NetworkOptions, inputs: int, classes: int) -> "NetworkSpec":
        """The network that the options ask for."""
        asked = {each.name: getattr(options, each.name) for each in fields(NetworkOptions)}
        spec = cls(**asked, inputs=inputs, classes=classes)
        if spec.excess:
            raise BadInput(f"{dashed(_WIDTHS[spec.network])}: got {spec.excess}; choose fewer or narrower layers.")
        return spec

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "NetworkSpec":
        """The network that `stored` has written down as JSON; a ValueError or TypeError for anything else."""
        values = dict(stored)
        inputs, *widths, classes = values.pop("sizes")
        values |= {"inputs": inputs, _WIDTHS[values["network"]]: tuple(widths), "classes": classes}
        values |= {"norm": values["norm"] or "none", "blocks": values.get("blocks") or None}
        try:
            spec = cls(**values)
            for each in fields(cls):  # as if it were typed
                value, by_network = getattr(spec, each.name), each.metadata["by_network"]
                typed = ",".join(map(str, value)) if isinstance(value, tuple) else value
                wanted = None if by_network and spec.network not in by_network else each.metadata["parse"]("", typed)
                if type(value) is not type(wanted) or value != wanted:
                    raise ValueError(f"{each.name}: got {value}; expected {wanted}; train the network again.")
        except BadInput as error:
            raise ValueError(str(error)) from None
        if spec.excess:
            raise ValueError(f"network: got {spec.excess}; train a smaller one.")
        return spec

    @property
    def stored(self) -> dict[str, Any]:
        """What a file says of it; plain values, as JSON holds them."""
        norm = None if self.norm == "none" else self.norm
        named = {"network": self.network, "sizes": self.sizes, "norm": norm}
        return {**named, "activation": self.activation, "dtype": self.dtype, "blocks": self.blocks or 0}

    @property
    def sizes(self) -> tuple[int, ...]:
        """(in, hidden, …, out); for a resnet (channels of the images, those of each stage, …, out)."""
        return (self.inputs, *getattr(self, _WIDTHS[self.network]), self.classes)

    @property
    def excess(self) -> str | None:
        """What a network is that is too large for the command line: it would take hours to compile, or all memory."""
        stages, blocks = len(self.sizes) - 2, self.blocks or 0
        if self.network == "mlp":
            layers, weights = stages + 1, sum(a * b for a, b in pairwise(self.sizes))
        else:
            layers = 2 + 2 * stages * blocks
            weights = 9 * sum(a * b + (2 * blocks - 1) * b * b for a, b in pairwise(self.sizes))
        if layers <= _MOST_LAYERS and weights <= _MOST_WEIGHTS:
            return None
        return (
            f"a network of {layers} layers and {weights} weights; expected at most {_MOST_LAYERS} and {_MOST_WEIGHTS}"
        )

    @property
    def g(self) -> Any:
        """The activation."""
        return getattr(jax.nn, self.activation)

    @property
    def make(self) -> partial[Network]:
        """What makes the network, with room for other arguments of `jbn.networks.mlp` or `jbn.networks.resnet`."""
        named: dict[str, Any] = {"norm": self.stored["norm"], "activation": self.g, "dtype": jnp.dtype(self.dtype)}
        if self.network == "mlp":
            return partial(mlp, self.sizes, **named)
        named |= {"in_channels": self.inputs, "widths": self.widths, "blocks": self.blocks}
        return partial(resnet, self.classes, **named)
