"""Weights in and out: batch norms between jbn and the formats in which other frameworks store them.

    >>> import jbn
    >>> params, state = jbn.bn_init(4)
    >>> arrays = jbn.convert.to_torch(params, state, prefix="bn1")       # a dict, by PyTorch's names
    >>> params, state = jbn.convert.from_torch(arrays, prefix="bn1")

Arrays in, arrays out: nothing is read from a file, and no framework is imported. Stored formats are theirs: an array
means what its framework makes of it.
"""

from jbn.convert._equinox import from_equinox, to_equinox
from jbn.convert._flax import from_flax, to_flax
from jbn.convert._haiku import from_haiku, to_haiku
from jbn.convert._keras import from_keras, to_keras
from jbn.convert._network import dump_network, load_network, plan_network
from jbn.convert._nnx import from_nnx, to_nnx
from jbn.convert._plan import Plan
from jbn.convert._torch import from_torch, to_torch

__all__ = [
    "Plan",
    "dump_network",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_nnx",
    "from_torch",
    "load_network",
    "plan_network",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_nnx",
    "to_torch",
]
