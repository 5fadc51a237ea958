"""What the layers of a trained network hold, read off while it runs."""

from typing import Any, NamedTuple

import jax
import numpy as np

import jbn
from jbn.cli.network import NetworkSpec

__all__ = ["last_layer", "of_one_layer"]

# Examples in a picture, and values of one channel: every position of an image counts as one.
_EXAMPLES = 2000
_VALUES = 20000


class _Seen(NamedTuple):
    """Values before and after each batch norm, by the path of its params, and what each activation was given."""

    norms: dict[str, tuple[Any, Any]]
    activations: list[Any]


def last_layer(spec: NetworkSpec) -> tuple[str, int, str]:
    """The hidden layer to look at: the path of its batch norm, the number of its activation, and what it is called.

    In a resnet the first convolution of the last block, since there norm and activation follow each other.
    """
    if spec.network == "mlp":
        depth = len(spec.sizes) - 2
        return f"[{depth - 1}]['bn']", depth - 1, f"hidden layer {depth} of {depth}"
    block = len(spec.widths or ()) * (spec.blocks or 0) - 1
    # One activation in the stem and two in each block.
    return f"['blocks'][{block}]['conv1']['bn']", 2 * block + 1, f"conv1 of block {block + 1} of {block + 1}"


def of_one_layer(spec: NetworkSpec, params: Any, state: Any, x: Any) -> dict[str, Any]:
    """Values of the `last_layer` for examples: name → (N, C), before and after its norm, if it has one."""
    path, number, _ = last_layer(spec)
    seen = _seen(spec, params, state, x[:_EXAMPLES])
    if spec.norm == "none":
        return {"without batch norm: z": _rows(seen.activations[number])}
    before, after = map(_rows, seen.norms[path])
    symbol = "z" if spec.norm == "z" else "a"
    return {f"with batch norm: {symbol} before it": before, f"with batch norm: {symbol} after it": after}


def _seen(spec: NetworkSpec, params: Any, state: Any, x: Any) -> _Seen:
    """Runs the network, in evaluation, with a norm and an activation that write down what they see."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, jbn.BNParams))
    path_of = {id(node): jax.tree_util.keystr(path) for path, node in leaves}
    seen = _Seen({}, [])

    def bn(params, state, z, **options):
        y, stats = jbn.bn_apply(params, state, z, **options)
        seen.norms[path_of[id(params)]] = (z, y)
        return y, stats

    def g(z):
        seen.activations.append(z)
        return spec.g(z)

    spec.make(bn=bn, activation=g).apply(params, state, x, train=False)
    return seen


def _rows(values: Any) -> np.ndarray:
    """(N, C) or (N, H, W, C) as (rows, C), evenly thinned out where there are very many."""
    rows = np.asarray(values).reshape(-1, values.shape[-1])
    return rows[:: -(-len(rows) // _VALUES)]
