"""Weights in and out: batch norms between jbn and the formats in which other frameworks store them.

    >>> import jbn
    >>> params, state = jbn.bn_init(4)
    >>> arrays = jbn.convert.to_torch(params, state, prefix="bn1")       # a dict, by PyTorch's names
    >>> params, state = jbn.convert.from_torch(arrays, prefix="bn1")

Arrays in, arrays out: nothing is read from a file, and no framework is imported. Stored formats are theirs: an array
means what its framework makes of it.
"""

from jbn.convert._flax import from_flax, to_flax
from jbn.convert._torch import from_torch, to_torch

__all__ = ["from_flax", "from_torch", "to_flax", "to_torch"]
