"""torchvision's residual networks, whole: a ``state_dict`` in and out."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_jax, as_weights, shape_of
from jbn.convert._formats import Entry, as_names
from jbn.convert._torch import TORCH, to_torch
from jbn.networks._network import Layer, check_fit
from jbn.networks._residual import Layout, layout

__all__ = ["from_torchvision", "to_torchvision"]

_NORM = ("weight", "bias", "running_mean", "running_var")
_WHOLE = (
    "pass the whole state_dict() of one of torchvision's resnet18 to resnet152, or of a network that has its layers"
)


def from_torchvision(state_dict: Any, prefix: Any = "", *, count: Any = None) -> tuple[Any, Any]:
    """A residual network of torchvision's as ``(params, state)`` of `jbn.networks.resnet`.

    What ``resnet18`` to ``resnet152`` hold goes to ``resnet(classes, **imagenet(18))`` and so on, with any number of
    classes, blocks and channels, so long as the layers are theirs. Kernels turn from (out, in, height, width) to
    (height, width, in, out), ``fc`` from (out, in) to (in, out); γ, β and the running statistics are converted as by
    `from_torch`. In evaluation the two networks are the same function, and in training too: go on with
    ``bn_update_stats(state, stats, momentum=0.9, debias=False)`` for PyTorch's default momentum of 0.1. Images are
    (N, H, W, C) here, and have to be normalized as they were for torchvision.

    Args:
        state_dict: a mapping from names to arrays, what ``model.state_dict()`` returns: tensors on any device, or
            arrays of NumPy or JAX.
        prefix: the name of the network in a larger one, ``"backbone"`` or ``"module"``; for itself none.
        count: how many updates the running statistics hold, as for `from_torch`.

    Returns:
        ``(params, state)``; every array keeps its dtype, but running statistics are float32, or float64 where they
        are stored so.

    Raises:
        TypeError: an array that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: a key missing, a key too many, a shape that does not fit the others (grouped and wide networks have
            such), a negative variance, a number that is not finite; each names the key.

    Example:
        >>> import jax
        >>> from jbn.convert import from_torchvision, to_torchvision
        >>> from jbn.networks import imagenet, resnet
        >>> network = resnet(10, **{**imagenet(50), "widths": (2, 4, 8, 16)})  # as ResNet-50, and narrow
        >>> state_dict = to_torchvision(*network.init(jax.random.key(0)))
        >>> params, state = from_torchvision(state_dict)  # or one of torchvision's
        >>> outputs, _ = jax.eval_shape(
        ...     lambda x: network.apply(params, state, x, train=False), jax.numpy.zeros((1, 224, 224, 3)))
        >>> outputs.shape
        (1, 10)

    References:
        torchvision, ``torchvision.models.resnet``.
    """
    start = "".join(f"{name}." for name in as_names("prefix", prefix, "."))
    entries = TORCH.entries(state_dict)
    entries = {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
    network = _layout_of_theirs(entries, start)
    _check_keys(entries, network, start)
    params: dict[Any, Any] = {}
    state: dict[Any, Any] = {}
    for conv, norm, path, _ in _layers(network):
        kernel = entries[f"{conv}.weight"]
        W = _transposed(as_weights(*kernel), to_ours=True)
        params[path], state[path] = {"W": as_jax(kernel.label, W), "b": None, "bn": None}, None
        if norm is None:
            bias = entries[f"{conv}.bias"]
            params[path]["b"] = as_jax(bias.label, as_weights(*bias))
        else:
            pieces = {
                leaf: entries[f"{norm}.{leaf}"] for leaf in (*_NORM, *TORCH.optional) if f"{norm}.{leaf}" in entries
            }
            params[path]["bn"], state[path] = TORCH.read(pieces, {"count": count})
    return _tree(network, params), _tree(network, state)


def to_torchvision(params: Any, state: Any, prefix: Any = "", *, dtype: Any = None) -> dict[str, np.ndarray]:
    """A residual network of `jbn.networks` as torchvision has it in a ``state_dict``.

    The converse of `from_torchvision`. To load it:
    ``model.load_state_dict({name: torch.as_tensor(array) for name, array in to_torchvision(params, state).items()})``.

    Args:
        params: those of a `resnet` with ``stem="imagenet"`` and its norms.
        state: its running statistics.
        prefix: the name of the network in a larger one.
        dtype: of all but the counts; None keeps the dtype that each array has.

    Returns:
        A dict of NumPy arrays under torchvision's names and in its order; counts are written as by `to_torch`.

    Raises:
        TypeError: an array that holds no real floating-point numbers, a norm that is no `BNParams` and `BNState`.
        ValueError: params or state of another structure, the stem for small images, a norm without γ or β, a number
            that is not finite.

    Example:
        >>> import jax
        >>> from jbn.convert import to_torchvision
        >>> from jbn.networks import imagenet, resnet
        >>> network = resnet(10, **{**imagenet(18), "widths": (2, 4, 8, 16)})  # as ResNet-18, and narrow
        >>> state_dict = to_torchvision(*network.init(jax.random.key(0)))
        >>> state_dict["layer2.0.downsample.0.weight"].shape, state_dict["fc.bias"].shape
        ((4, 2, 1, 1), (10,))

    References:
        torchvision, ``torchvision.models.resnet``.
    """
    start = "".join(f"{name}." for name in as_names("prefix", prefix, "."))
    network = _layout_of_ours(params)
    check_fit(params, state, network.layers)
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got {kind_of(state)}; expected the running statistics; pass what the network has.")
    written: dict[str, np.ndarray] = {}
    for conv, norm, path, described in _layers(network):
        layer: Any = params
        running: Any = state
        for key in path:
            layer, running = layer[key], running[key]
        label = "".join(f"[{key!r}]" for key in path)
        written[f"{start}{conv}.weight"] = _transposed(as_weights(f"params{label}['W']", layer["W"]), to_ours=False)
        if norm is None:
            written[f"{start}{conv}.bias"] = np.array(as_weights(f"params{label}['b']", layer["b"]))
        else:
            _check_norm(label, layer["bn"], running, described.shape[-1:])
            written |= to_torch(layer["bn"], running, f"{start}{norm}")
    floats = (name for name, array in written.items() if not np.issubdtype(array.dtype, np.integer))
    return written if dtype is None else written | {name: written[name].astype(dtype) for name in floats}


def _check_norm(label: str, bn: Any, running: Any, shape: tuple[int, ...]) -> None:
    """Raises unless a batch norm has all that torchvision's have, for so many channels."""
    hint = "convert the network as it was trained, not folded"
    for name, node, kind in ((f"params{label}['bn']", bn, BNParams), (f"state{label}", running, BNState)):
        if not isinstance(node, kind):
            raise TypeError(f"{name}: got {kind_of(node)}; expected {kind.__name__}; {hint}.")
        for field, array in zip(node._fields, node, strict=True):
            if shape_of(array) != shape:
                got = "None" if array is None else f"shape {shape_of(array)}"
                raise ValueError(f"{name}.{field}: got {got}; expected shape {shape}, as torchvision has it; {hint}.")


def _layers(network: Layout) -> Iterator[tuple[str, str | None, tuple[Any, ...], Layer]]:
    """Their names of each convolution and of its norm, where it is in ours, and the layer; in their order."""
    layers, stage, first = network.layers, 0, 0
    yield "conv1", "bn1", ("stem",), layers["stem"]
    for i, (block, stride) in enumerate(zip(layers["blocks"], network.strides, strict=True)):
        if i == 0 or stride > 1:
            stage, first = stage + 1, i
        for name, layer in block.items():
            theirs = ("downsample.0", "downsample.1") if name == "shortcut" else (name, name.replace("conv", "bn"))
            conv, norm = (f"layer{stage}.{i - first}.{leaf}" for leaf in theirs)
            yield conv, norm, ("blocks", i, name), layer
    yield "fc", None, ("head",), layers["head"]


def _tree(network: Layout, values: Mapping[Any, Any]) -> dict[str, Any]:
    blocks = [{name: values["blocks", i, name] for name in block} for i, block in enumerate(network.layers["blocks"])]
    return {"stem": values["stem",], "blocks": blocks, "head": values["head",]}


def _transposed(array: np.ndarray, *, to_ours: bool) -> np.ndarray:
    """Output features last in ours and first in theirs, with the inputs next to them."""
    rank = array.ndim
    order = (*range(2, rank), 1, 0) if to_ours else (rank - 1, rank - 2, *range(rank - 2))
    return np.ascontiguousarray(array.transpose(order))


def _layout_of_theirs(entries: Mapping[str, Entry], start: str) -> Layout:
    """The layout that the names and a few of the shapes tell; whether all else fits it is still to be seen."""

    def shape(name, rank):
        if name not in entries:
            raise ValueError(f"state_dict: got no {start}{name}; expected a convolutional residual network; {_WHOLE}.")
        found = shape_of(entries[name].value) or ()
        if len(found) != rank or 0 in found:
            wanted = "(out, in)" if rank == 2 else "(out, in, height, width)"
            raise ValueError(f"{entries[name].label}: got shape {found}; expected {wanted}; {_WHOLE}.")
        return found

    blocks: dict[int, set[int]] = {}
    bottleneck = False
    for name in entries:
        if found := re.match(r"layer(\d{1,4})\.(\d{1,4})\.(conv3\.)?", name):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
            bottleneck = bottleneck or found[3] is not None
    stages = max(1, len(blocks))
    return layout(
        shape("conv1.weight", 4)[1],
        shape("fc.weight", 2)[0],
        stem="imagenet",
        block="bottleneck" if bottleneck else "basic",
        widths=tuple(shape(f"layer{stage}.0.conv1.weight", 4)[0] for stage in range(1, stages + 1)),
        blocks=tuple(len(blocks[stage]) for stage in range(1, stages + 1)),
        normed=True,
        zero_gamma=False,
    )


def _check_keys(entries: Mapping[str, Entry], network: Layout, start: str) -> None:
    """Raises unless there is an array of the right shape for every place, and no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for conv, norm, _, layer in _layers(network):
        *window, n_in, n_out = layer.shape
        wanted[f"{conv}.weight"] = (n_out, n_in, *window)
        wanted |= {f"{norm}.{leaf}": (n_out,) for leaf in _NORM} if norm else {f"{conv}.bias": (n_out,)}
    for name, shape in wanted.items():
        if name not in entries:
            raise ValueError(f"state_dict: got no {start}{name}; expected it, of shape {shape}; {_WHOLE}.")
        found = shape_of(entries[name].value)
        if found != shape:
            raise ValueError(f"{entries[name].label}: got shape {found}; expected {shape}, by the others; {_WHOLE}.")
    counts = {f"{norm}.num_batches_tracked" for _, norm, _, _ in _layers(network)}
    for name, entry in entries.items():
        if name not in wanted and name not in counts:
            raise ValueError(
                f"{entry.label}: got a key that is no part of the network; expected those of its convolutions, norms "
                f"and fc; leave it out, or name the network in prefix."
            )


def _layout_of_ours(params: Any) -> Layout:
    """The layout of params; whether all of them fit it is still to be seen."""
    hint = 'pass those of a resnet with stem="imagenet", as its init returns them'
    try:
        stem, blocks, head = (params[key] for key in ("stem", "blocks", "head"))
        stem_shape, head_shape = (shape_of(layer["W"]) or () for layer in (stem, head))
        # A stage begins where a block that is not the first changes the size of the image: it projects.
        begins = [i for i, block in enumerate(blocks) if i == 0 or "shortcut" in block]
        widths = tuple(blocks[i]["conv1"]["W"].shape[-1] for i in begins)
        counts = tuple(end - begin for begin, end in zip(begins, [*begins[1:], len(blocks)], strict=True))
        bottleneck = "conv3" in blocks[0]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"params: got {kind_of(params)}; expected a dict of stem, blocks, head; {hint}.") from None
    if len(stem_shape) != 4 or stem_shape[:2] != (7, 7) or len(head_shape) != 2:
        raise ValueError(f"params['stem']['W']: got shape {stem_shape}; expected (7, 7, in, out), as theirs; {hint}.")
    return layout(
        stem_shape[2],
        head_shape[1],
        stem="imagenet",
        block="bottleneck" if bottleneck else "basic",
        widths=widths,
        blocks=counts,
        normed=True,
        zero_gamma=False,
    )
