"""The names under which arrays stand in files: PyTorch's, Flax's and jbn's, each from and to what an array is."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

__all__ = ["PATTERNS", "Pattern", "Piece", "recognized"]

# What an array is to its layer, and how each pattern calls it there. A kernel has its outputs first in PyTorch alone.
_TORCH = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
_FLAX = {"kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias"}
_JBN = {"kernel": "W", "bias": "b", "gamma": "gamma", "beta": "beta"}
_RUNNING = ("mean", "var", "count")


class Piece(NamedTuple):
    """What one array is.

    Attributes:
        path: of the layer, the names of modules.
        role: "kernel" or "bias" of a dense or convolution layer, "gamma" or "beta" of a norm, "mean", "var" or
            "count" of a batch norm; "" for any other array of a layer; "file" for one that belongs to no layer.
        leaf: the name of an array without a role.
        affine: of a running statistic, whether its norm has a γ or β.
    """

    path: tuple[str, ...]
    role: str
    leaf: str = ""
    affine: bool = True


class Pattern(NamedTuple):
    """How one kind of file names its arrays.

    Attributes:
        parse: from the names and ranks of all arrays to what each is.
        name: from what an array is to its name.
    """

    parse: Callable[[Mapping[str, int]], dict[str, Piece]]
    name: Callable[[Piece], str]


def _parse_torch(ranks: Mapping[str, int]) -> dict[str, Piece]:
    averaged = {_split(name, ".")[0] for name in ranks if name.endswith(("running_mean", "running_var"))}
    pieces = {}
    for name in ranks:
        path, leaf = _split(name, ".")
        weight = ranks.get(".".join((*path, "weight")), 0)
        if "/" in name:
            pieces[name] = Piece((), "file", name)
        elif path in averaged and leaf in ("running_mean", "running_var", "num_batches_tracked"):
            role = next(role for role in _RUNNING if _TORCH[role] == leaf)
            affine = any(".".join((*path, learned)) in ranks for learned in ("weight", "bias"))
            pieces[name] = Piece(path, role, affine=affine)
        elif leaf == "weight" and weight > 0:
            pieces[name] = Piece(path, "gamma" if path in averaged or weight == 1 else "kernel")
        elif leaf == "bias" and (path in averaged or weight > 0):
            pieces[name] = Piece(path, "beta" if path in averaged or weight == 1 else "bias")
        else:
            pieces[name] = Piece(path, "", leaf)
    return pieces


def _name_torch(piece: Piece) -> str:
    return piece.leaf if piece.role == "file" else ".".join((*piece.path, _TORCH.get(piece.role, piece.leaf)))


def _parse_flax(ranks: Mapping[str, int]) -> dict[str, Piece]:
    pieces = {}
    for name in ranks:
        first, within, leaf = _collected(name)
        start = "/".join((*within, ""))
        if (first == "batch_stats" and leaf in ("mean", "var")) or (first == "counts" and leaf == "count"):
            affine = any(f"params/{start}{learned}" in ranks for learned in ("scale", "bias"))
            pieces[name] = Piece(within, leaf, affine=affine)
        elif first != "params":
            pieces[name] = Piece((), "file", name)
        elif leaf == "kernel" and ranks[name] > 1:
            pieces[name] = Piece(within, "kernel")
        elif leaf == "scale" and (ranks[name] == 1 or f"batch_stats/{start}mean" in ranks):
            pieces[name] = Piece(within, "gamma")
        elif leaf == "bias" and f"params/{start}kernel" in ranks:
            pieces[name] = Piece(within, "bias")
        elif leaf == "bias" and {f"params/{start}scale", f"batch_stats/{start}mean"} & ranks.keys():
            pieces[name] = Piece(within, "beta")
        else:
            pieces[name] = Piece(within, "", leaf)
    return pieces


def _name_flax(piece: Piece) -> str:
    if piece.role == "file":
        return piece.leaf
    collection = {"mean": "batch_stats", "var": "batch_stats", "count": "counts"}.get(piece.role, "params")
    return "/".join((collection, *piece.path, _FLAX.get(piece.role, piece.role or piece.leaf)))


def _parse_jbn(ranks: Mapping[str, int]) -> dict[str, Piece]:
    roles = {leaf: role for role, leaf in _JBN.items()}
    pieces = {}
    for name in ranks:
        first, within, leaf = _collected(name)
        if first == "state" and leaf in _RUNNING:
            # γ and β stand under the same path, or as the "bn" of the layer there.
            norms = [norm for norm in ((*within, "bn"), within) if _is_affine(norm, ranks)]
            pieces[name] = Piece((norms or [within])[0], leaf, affine=bool(norms))
        elif first == "params":
            role = roles.get(leaf, "") if leaf != "W" or ranks[name] > 1 else ""
            pieces[name] = Piece(within, role, "" if role else leaf)
        else:
            pieces[name] = Piece((), "file", name)
    return pieces


def _is_affine(path: tuple[str, ...], ranks: Mapping[str, int]) -> bool:
    return any("/".join(("params", *path, leaf)) in ranks for leaf in ("gamma", "beta"))


def _name_jbn(piece: Piece) -> str:
    if piece.role == "file":
        return piece.leaf
    if piece.role in _RUNNING:
        path = piece.path[:-1] if piece.affine and piece.path[-1:] == ("bn",) else piece.path
        return "/".join(("state", *path, piece.role))
    return "/".join(("params", *piece.path, _JBN.get(piece.role, piece.leaf)))


def _split(name: str, separator: str) -> tuple[tuple[str, ...], str]:
    """The names of the modules, and that of the array."""
    *path, leaf = name.split(separator)
    return tuple(path), leaf


def _collected(name: str) -> tuple[str, tuple[str, ...], str]:
    """The collection that an array is in, "" for none, the names of the modules, and that of the array."""
    path, leaf = _split(name, "/")
    return (path[0], path[1:], leaf) if path else ("", (), leaf)


PATTERNS = {
    "torch": Pattern(_parse_torch, _name_torch),
    "flax": Pattern(_parse_flax, _name_flax),
    "jbn": Pattern(_parse_jbn, _name_jbn),
}


def recognized(names: Iterable[str]) -> str | None:
    """The pattern that names can only be of, or None."""
    found = set()
    for name in names:
        first, leaf = name.split("/", 1)[0], name.rsplit("/", 1)[-1]
        if "/" not in name:
            if name.rsplit(".", 1)[-1] in _TORCH.values():
                found.add("torch")
        elif first == "batch_stats" or (first == "params" and leaf in ("kernel", "scale", "embedding")):
            found.add("flax")
        elif (first == "state" and leaf in _RUNNING) or (
            first == "params" and leaf in _JBN.values() and leaf != "bias"
        ):
            found.add("jbn")
    return found.pop() if len(found) == 1 else None
