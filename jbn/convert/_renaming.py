"""A whole file of arrays from the names and layouts of one framework to those of another, and back bit for bit."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jbn.convert._arrays import as_numpy
from jbn.convert._formats import shown
from jbn.convert._kernels import pattern
from jbn.convert._layer import SATURATED, one_count
from jbn.convert._patterns import PATTERNS, Piece, recognized

__all__ = ["Renamed", "Renaming", "rename_arrays"]

_WEIGHTS = ("kernel", "bias", "gamma", "beta", "mean", "var")


class Renamed(NamedTuple):
    """One array: its names, its layouts where they differ, and what it is.

    Attributes:
        theirs, ours: its names before and after.
        layer: the names of its modules, "layer1/0/bn1".
        kind: "batch norm", "norm" (γ and β without running statistics), "convolution", "dense" or "other".
        layout: such as "OIHW → HWIO"; "" where nothing was moved.
        shape: after.

    Example:
        >>> from jbn.convert import Renamed
        >>> Renamed("fc.weight", "params/fc/kernel", "fc", "dense", "OI → IO", (4, 3)).layout
        'OI → IO'
    """

    theirs: str
    ours: str
    layer: str
    kind: str
    layout: str
    shape: tuple[int, ...]


class Renaming(NamedTuple):
    """What `rename_arrays` did.

    Attributes:
        arrays: the arrays, by their new names.
        source, target: the patterns, "torch", "flax" or "jbn".
        moves: a `Renamed` for each array that was there before.

    Example:
        >>> import numpy as np
        >>> from jbn.convert import rename_arrays
        >>> rename_arrays({"fc.weight": np.ones((3, 2))}, "flax").source
        'torch'
    """

    arrays: dict[str, np.ndarray]
    source: str
    target: str
    moves: tuple[Renamed, ...]


def rename_arrays(arrays: Mapping[str, Any], target: str | None = None, *, source: str | None = None) -> Renaming:
    """Gives the arrays of a whole file the names and layouts of another framework.

    Layer by layer, by the pattern of the names (for a batch norm ``bn`` and a convolution ``conv``):

    ============  ================================  =========================  =========================
    what          "torch", a ``state_dict``         "flax", linen's variables  "jbn", a model file
    ============  ================================  =========================  =========================
    γ, β          ``bn.weight``, ``bn.bias``        ``params/bn/scale, bias``  ``params/bn/gamma, beta``
    μ, σ²         ``bn.running_mean, running_var``  ``batch_stats/bn/mean…``   ``state/bn/mean, var``
    updates       ``bn.num_batches_tracked``        ``counts/bn/count``        ``state/bn/count``
    W, OIHW/HWIO  ``conv.weight``                   ``params/conv/kernel``     ``params/conv/W``
    b             ``conv.bias``                     ``params/conv/bias``       ``params/conv/b``
    ============  ================================  =========================  =========================

    Kernels (rank 2 and more) are transposed, outputs first in "torch" and last in the others. A norm without running
    statistics (PyTorch's rank 1 weights) becomes one with scale and bias alone. All other arrays keep their last name
    and their values. Flax has no place for the number of updates: it stands in a collection of its own, which
    ``module.apply`` ignores. jbn counts each channel; what stands as saturated there is 0 in PyTorch, "not known", and
    absent in Flax, as with `to_torch` and `to_flax`; of counts that differ between channels PyTorch gets the largest.
    No dtype changes, except that of the counts.

    A weight of rank 2 is taken to be a dense layer's: an embedding is transposed too, and so is the kernel of a
    transposed convolution, whose layouts differ otherwise. They come back as they were.

    Args:
        arrays: by name, all arrays of a network: NumPy's, JAX's, or tensors of PyTorch.
        target: "torch", "flax" or "jbn"; None for "flax" from "torch", and "torch" from the others.
        source: the pattern of the names; None finds it out.

    Returns:
        A `Renaming`; its arrays are views where they can be. Renamed back they are the same, bit for bit.

    Raises:
        TypeError: ``arrays`` no mapping, or with an entry that is no array.
        ValueError: an unknown pattern, names that are of none or of several; two arrays that get one name, a name
            that would not come back; in a norm, dense or convolution layer a number that is not finite, in a batch
            norm a variance below 0, or arrays that differ in shape.

    Example:
        >>> import numpy as np
        >>> from jbn.convert import rename_arrays
        >>> state_dict = {
        ...     "conv1.weight": np.zeros((8, 3, 5, 5), np.float32),
        ...     "bn1.running_mean": np.zeros(8, np.float32),
        ...     "bn1.running_var": np.ones(8, np.float32),
        ... }
        >>> {name: array.shape for name, array in rename_arrays(state_dict, "flax").arrays.items()}
        {'params/conv1/kernel': (5, 5, 3, 8),
         'batch_stats/bn1/mean': (8,),
         'batch_stats/bn1/var': (8,)}
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays: got {type(arrays).__name__}; expected a mapping from names; pass a dict of arrays.")
    if not all(isinstance(name, str) for name in arrays):
        raise TypeError("arrays: got a name that is no text; expected the names of a file; flatten nested mappings.")
    source = _as_source(source, arrays)
    if target is None:
        target = "flax" if source == "torch" else "torch"
    if target not in PATTERNS:
        raise ValueError(f"target: got {target!r}; expected one of {', '.join(PATTERNS)}; choose one of them.")
    held = {name: as_numpy(f"arrays[{name!r}]", array) for name, array in arrays.items()}
    pieces = PATTERNS[source].parse({name: array.ndim for name, array in held.items()})
    moments = _moments(held, pieces)
    made: dict[str, np.ndarray] = {}
    moves = []
    renamed: dict[str, str] = {}
    kernels = {piece.path: held[name].ndim for name, piece in pieces.items() if piece.role == "kernel"}
    for name, piece in pieces.items():
        ours = PATTERNS[target].name(piece)
        if ours in renamed:
            raise ValueError(
                f"arrays[{name!r}]: got a name that becomes {ours!r}, as {renamed[ours]!r} does; expected names that "
                f"stay apart; rename one of them."
            )
        renamed[ours] = name
        array, layout = _moved(held[name], piece, source, target, moments)
        if array is not None:
            made[ours] = array
            moves.append(Renamed(name, ours, "/".join(piece.path), _kind(piece, kernels, moments), layout, array.shape))
    _complete_counts(made, source, target, moments)
    _check_way_back(pieces, made, renamed, source, target)
    return Renaming(made, source, target, tuple(moves))


def _as_source(source: str | None, names: Mapping[str, Any]) -> str:
    if source is None:
        source = recognized(names)
        if source is None:
            raise ValueError(
                f"source: got None for {shown(map(repr, names), 3) or 'no names'}; expected names that are clearly "
                f"those of one of {', '.join(PATTERNS)}; say which."
            )
    if source not in PATTERNS:
        raise ValueError(f"source: got {source!r}; expected one of {', '.join(PATTERNS)}; choose one of them.")
    return source


def _moments(held: dict[str, np.ndarray], pieces: dict[str, Piece]) -> dict[tuple[str, ...], dict[str, np.ndarray]]:
    """Mean and variance of each batch norm, once all of its arrays are found sound."""
    layers: dict[tuple[str, ...], dict[str, tuple[str, np.ndarray]]] = {}
    for name, piece in pieces.items():
        if piece.role in _WEIGHTS:
            array = held[name]
            wide = array.astype(np.float64) if array.dtype.kind not in "biuc" else array
            bad = int(np.sum(~np.isfinite(wide)))
            if bad:
                raise ValueError(
                    f"arrays[{name!r}]: got {bad} of {array.size} values that are NaN or infinite; expected finite "
                    f"numbers; take a checkpoint from before the training diverged, or look for damage to the file."
                )
            if piece.role == "var" and np.any(wide < 0):
                raise ValueError(
                    f"arrays[{name!r}]: got {float(wide.min()):g}; expected variances of 0 or more; look for damage "
                    f"to the file, or for arrays that changed places."
                )
        if piece.role not in ("", "file"):
            layers.setdefault(piece.path, {})[piece.role] = name, held[name]
    moments = {}
    for path, layer in layers.items():
        if not layer.keys() & {"mean", "var", "count"}:
            continue
        for role in ("mean", "var"):
            if role not in layer:
                raise ValueError(
                    f"arrays: got {shown((repr(name) for name, _ in layer.values()), 3)} without the {role} beside "
                    f"them; expected mean and variance of each batch norm; look for what is missing."
                )
        if not layer["mean"][1].shape:
            raise ValueError(
                f"arrays[{layer['mean'][0]!r}]: got a single number; expected (C,), a value for each channel; look for "
                f"damage to the file."
            )
        for name, array in (layer[role] for role in ("gamma", "beta", "var") if role in layer):
            if array.shape != layer["mean"][1].shape:
                raise ValueError(
                    f"arrays[{name!r}]: got shape {array.shape}; expected {layer['mean'][1].shape}, that of "
                    f"{layer['mean'][0]!r}; look for arrays that changed places."
                )
        moments[path] = {role: array for role, (_, array) in layer.items()}
        _check_count(layer)
    return moments


def _check_count(layer: dict[str, tuple[str, np.ndarray]]) -> None:
    if "count" not in layer:
        return
    (name, count), shape = layer["count"], layer["mean"][1].shape
    if count.dtype.kind not in "iu" or np.any(count < 0) or count.shape not in (shape, shape[:-1]):
        raise ValueError(
            f"arrays[{name!r}]: got shape {count.shape} and dtype {count.dtype}; expected the number of updates, whole "
            f"numbers of 0 or more, of shape {shape} or {shape[:-1]}; look for damage to the file."
        )


def _moved(array, piece, source, target, moments):
    """The array as the target has it, and what was done to its layout; None for a count that it leaves out."""
    first = (source == "torch", target == "torch")
    if piece.role == "kernel" and first[0] != first[1]:
        axes = (1, 0) if array.ndim == 2 else None
        if axes is None:
            axes = (
                (*range(2, array.ndim), 1, 0) if first[0] else (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
            )
        return array.transpose(axes), f"{pattern(array.ndim, first[0])} → {pattern(array.ndim, first[1])}"
    if piece.role == "count" and source != target:
        return _count(array, target, moments[piece.path]), ""
    return array, ""


def _count(count, target, layer):
    """One number a layer in PyTorch, one a channel in jbn, and in Flax as it was."""
    mean, var = layer["mean"], layer["var"]
    if target == "flax":
        return None if count.ndim == mean.ndim and np.all(count == SATURATED) else count
    if target == "torch":
        one = count if count.ndim < mean.ndim else one_count(count, mean.ndim - 1)
        return np.asarray(np.where(one == SATURATED, 0, one), np.int64)
    if count.ndim == mean.ndim:
        return count
    new = np.all(mean == 0) and np.all(var == 1)
    counted = np.minimum(count, SATURATED).astype(np.int32)
    counted = counted if new else np.where(counted == 0, SATURATED, counted)
    return np.broadcast_to(counted[..., None], mean.shape).astype(np.int32)


def _complete_counts(made, source, target, moments):
    """jbn counts always: statistics of which nobody counted the updates are warm."""
    if target != "jbn":
        return
    for path, layer in moments.items():
        if "count" not in layer:
            name = PATTERNS["jbn"].name(Piece(path, "count", affine=bool(layer.keys() & {"gamma", "beta"})))
            made[name] = np.full(layer["mean"].shape, SATURATED, np.int32)


def _check_way_back(pieces, made, renamed, source, target):
    """Raises for the first array that would get another name on the way back."""
    for ours, piece in PATTERNS[target].parse({name: array.ndim for name, array in made.items()}).items():
        back = PATTERNS[source].name(piece)
        if piece.role != "count" and back != renamed[ours]:
            raise ValueError(
                f"arrays[{renamed[ours]!r}]: got a name that becomes {ours!r} in {target!r}, where it would be read as "
                f"{back!r}; expected one that comes back; rename it."
            )


def _kind(piece, kernels, moments):
    if piece.role in ("kernel", "bias"):
        return "dense" if kernels.get(piece.path) == 2 else "convolution"
    if piece.role in ("", "file"):
        return "other"
    return "batch norm" if piece.path in moments else "norm"
