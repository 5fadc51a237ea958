"""Equinox: a batch norm's arrays, and what its `equinox.nn.State` holds for it, in either of its two modes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_jax, as_numpy, as_weights, shape_of
from jbn.convert._averages import counted, counter_of, hidden_of, read_of
from jbn.convert._formats import Entry, Format, as_names, found, leaves, nested, slashed
from jbn.convert._layer import SATURATED, as_arrays, as_layer, one_count, spread

__all__ = ["EQUINOX", "from_equinox", "to_equinox"]

_BATCH = ("batch_counter", "batch_state_index/0", "batch_state_index/1")
_EMA = ("ema_first_time_index", "ema_state_index/0", "ema_state_index/1")


def from_equinox(
    variables: Any, prefix: Any = "", *, momentum: Any = None, count: Any = None
) -> tuple[BNParams, BNState]:
    """A batch norm of Equinox as ``(params, state)``; a `jbn.equinox.BatchNorm` is read alike.

    γ and β are ``weight`` and ``bias``. Equinox's ``momentum`` m is jbn's, the share kept, 0.99 by default; it stores
    the biased variance. What runs along is in its state, under the fields of the layer:

    - mode "batch": ``batch_state_index`` holds hidden averages, of which Equinox reads hidden/(1−mᵗ) with t the
      ``batch_counter``. So μ and σ² are these, and ``count`` is t. That holds for the start as well, which Equinox has
      at (0, 1): what is left of it makes σ² too large, and is taken over. Go on with
      ``bn_update_stats(state, stats, momentum=m, unbiased=False)``.
    - mode "ema": ``ema_state_index`` holds μ and σ² themselves, and ``ema_first_time_index`` whether there has been a
      batch; how many is not known, so that ``count`` is 0 or saturated. Go on with
      ``bn_update_stats(state, stats, momentum=m, unbiased=False)``. In training Equinox normalizes with these running
      statistics, and jbn with those of the batch.

    ε is a field of the layer; Equinox's default is jbn's, 1e-5.

    Args:
        variables: the pair ``(model, state)`` of `equinox.nn.make_with_state`; or nested mappings by field,
            ``{"weight": …, "bias": …, "batch_counter": …, "batch_state_index": (mean, var)}``.
        prefix: the path of the layer, ``"layers/1"``, or a tuple of the names along it; for a layer itself none.
        momentum: the layer's m, where ``variables`` are mappings in mode "batch"; a layer brings its own.
        count: how many updates the running statistics hold, in the place of what Equinox says.

    Returns:
        ``(params, state)`` of shape (C,), or (L, C) for an ensemble made by ``equinox.filter_vmap``. γ and β keep
        their dtype and are None where the layer has none; running statistics are float32, or float64 where they are
        stored so.

    Raises:
        TypeError: an array that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: no batch norm at ``prefix``, a running statistic missing, a key too many, shapes that differ, a
            negative variance, a number that is not finite, no ``momentum`` where it is needed.

    Example:
        >>> import equinox as eqx
        >>> from jbn.convert import from_equinox
        >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode="batch")
        >>> from_equinox((layer, state))[1]
        BNState(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32),
            count=Array([0, 0], dtype=int32))

    References:
        Equinox, `equinox.nn.BatchNorm`.
    """
    return _read(found(EQUINOX, _entries(variables), prefix), {"momentum": momentum, "count": count})


def to_equinox(
    params: BNParams,
    state: BNState,
    prefix: Any = "",
    *,
    mode: str = "batch",
    momentum: Any = None,
    dtype: Any = None,
    like: Any = None,
) -> Any:
    """A batch norm as Equinox has it: arrays by field, or a layer and a state with them inside.

    The converse of `from_equinox`. Mode "ema" holds the running statistics bit for bit; mode "batch" holds the hidden
    averages, of which Equinox reads them to a rounding while 1−mᵗ is not yet 1.

    Args:
        params: γ and β, (C,); what is None is left out, as with ``channelwise_affine=False``.
        state: running statistics, (C,), and counts.
        prefix: the path of the layer, ``"layers/1"``.
        mode: the layer's, ``"batch"`` or ``"ema"``; not with ``like``, whose layer has one.
        momentum: the layer's m; needed in mode "batch" unless the count is 0 or saturated, or ``like`` is given.
        dtype: of γ, β and the statistics; None keeps the dtype that each array has.
        like: a pair ``(model, state)`` with the layer at ``prefix``.

    Returns:
        Without ``like`` nested dicts of JAX arrays by field; what an index of the state stands for is a pair. With it
        the pair, in which the arrays of this layer are exchanged. The counter is one number for the layer: the largest
        of its channels' counts. A saturated one is written as 2³⁰, so that Equinox, which adds to it without a check,
        does not overflow.

    Raises:
        TypeError: ``params`` or ``state`` of another type.
        ValueError: fields that differ in shape, another ``mode``, no ``momentum`` where it is needed, no such layer.

    Example:
        >>> import jbn
        >>> list(jbn.convert.to_equinox(*jbn.bn_init(2)))
        ['weight', 'bias', 'batch_counter', 'batch_state_index']

    References:
        Equinox, `equinox.nn.BatchNorm`.
    """
    pieces = {} if like is None else found(EQUINOX, _entries(like), prefix)
    start = "".join(f"{name}/" for name in as_names("prefix", prefix, "/"))
    arrays = _write(params, state, pieces, {"mode": mode, "momentum": momentum, "dtype": dtype})
    return _build({start + leaf: array for leaf, array in arrays.items()}, like)


def _is_layer(node: Any) -> bool:
    """A batch norm is known by the fields that say where its statistics are."""
    return hasattr(node, "batch_state_index") and hasattr(node, "ema_state_index")


def _name(path: Any) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def _parts(model: Any, state: Any) -> dict[str, Any]:
    """By name: the arrays of a model, and those of the state that its batch norms use; a momentum for each."""
    named: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_layer)[0]:
        if not _is_layer(node):
            named[_name(path)] = node
            continue
        start = "".join(f"{part}/" for part in _name(path).split("/") if part)
        named |= {f"{start}weight": node.weight, f"{start}bias": node.bias, f"{start}momentum": node.momentum}
        for field in ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index"):
            index = getattr(node, field)
            if index is not None:
                value = state.get(index)
                pair = {f"{start}{field}/{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {}
                named |= pair or {f"{start}{field}": value}
    return named


def _entries(variables: Any) -> dict[str, Entry]:
    if isinstance(variables, Mapping):
        entries: dict[str, Entry] = {}
        for path, entry in leaves("variables", variables):
            name = slashed(path)
            pair = enumerate(entry.value) if isinstance(entry.value, tuple) else ()
            entries |= {f"{name}/{i}": Entry(f"{entry.label}[{i}]", v) for i, v in pair} or {name: entry}
        return entries
    if not (isinstance(variables, tuple) and len(variables) == 2 and hasattr(variables[1], "get")):
        raise TypeError(
            f"variables: got {kind_of(variables)}; expected the pair (model, state) of equinox.nn.make_with_state, or "
            f"nested mappings by field; pass the state beside the model."
        )
    model, state = variables
    named = {
        name: value
        for name, value in _parts(model, state).items()
        if shape_of(value) is not None or name.split("/")[-1] == "momentum"
    }
    used = {id(value) for value in named.values()}
    for i, leaf in enumerate(jax.tree.leaves(state)):  # of other stateful layers
        if id(leaf) not in used:
            named[f"state/{i}"] = leaf
    return {name: Entry(f"variables[{name!r}]", value) for name, value in named.items()}


def _read(pieces: dict[str, Entry], options: dict[str, Any]) -> tuple[BNParams, BNState]:
    learned = pieces.get("weight"), pieces.get("bias")
    if _EMA[1] in pieces:
        first, mean, var = (pieces[leaf] for leaf in _EMA)
        flag = np.asarray(first.value)
        if flag.dtype != np.bool_:
            raise TypeError(f"{first.label}: got dtype {flag.dtype}; expected bool; pass the layer's own state.")
        none_yet = spread(first.label, flag.astype(np.int32), as_numpy(*mean)).astype(bool)
        return as_layer(*learned, mean, var, counted=np.where(none_yet, 0, SATURATED), count=options.get("count"))
    counter, *hidden = (pieces[leaf] for leaf in _BATCH)
    momentum = options.get("momentum")
    if momentum is None and "momentum" in pieces:
        momentum = pieces["momentum"].value
    arrays = [as_weights(*entry) for entry in hidden]
    t = counted(spread(counter.label, counter.value, arrays[0]))
    wide = [a.astype(np.promote_types(a.dtype, np.float32)) for a in arrays]
    mean, var = (Entry(e.label, read_of(a, t, momentum)) for e, a in zip(hidden, wide, strict=True))
    return as_layer(*learned, mean, var, counted=t, count=options.get("count"))


def _write(params: Any, state: Any, like: dict[str, Entry], options: dict[str, Any]) -> dict[str, jax.Array]:
    gamma, beta, mean, var, count = as_arrays(params, state, options.get("dtype"))
    mode = options.get("mode") or "batch"
    if like:
        mode = "ema" if _EMA[1] in like else "batch"
    if mode not in ("batch", "ema"):
        raise ValueError(f'mode: got {mode!r}; expected "batch" or "ema"; pass that of the layer.')
    updates = one_count(count, mean.ndim - 1)
    arrays = {"weight": gamma, "bias": beta}
    if mode == "ema":
        arrays |= dict(zip(_EMA, (np.asarray(updates == 0), mean, var), strict=True))
    else:
        momentum = options.get("momentum")
        if momentum is None and "momentum" in like:
            momentum = like["momentum"].value
        t = counter_of(updates)
        hidden = [hidden_of(average, t[..., None], momentum) for average in (mean, var)]
        arrays |= dict(zip(_BATCH, (t, *hidden), strict=True))
    return {leaf: as_jax(leaf, array) for leaf, array in arrays.items() if array is not None}


def _build(arrays: dict[str, Any], like: Any) -> Any:
    if like is None or isinstance(like, Mapping):
        flat = {tuple(name.split("/")): array for name, array in arrays.items()}
        pairs = [path[:-1] for path in flat if path[-1] == "1" and path[-2].endswith("_index")]
        for path in pairs:
            flat[path] = (flat.pop((*path, "0")), flat.pop((*path, "1")))
        return nested(flat)
    model, state = like
    held, structure = jax.tree.flatten(state)
    # The positions in the state, read by the same indices as its arrays. A state that was set is not to be used again,
    # so that it is not set, but taken apart.
    positions = _parts(model, jax.tree.unflatten(structure, range(len(held))))
    model_arrays = {}
    for name, array in arrays.items():
        position = positions.get(name)
        if isinstance(position, int) and not isinstance(position, bool) and name.split("/")[-1] != "momentum":
            old = held[position]  # a counter may be weakly typed, and Equinox compares that too
            held[position] = lax.full_like(old, array) if np.ndim(array) == 0 else array
        else:
            model_arrays[name] = array
    model = jax.tree_util.tree_map_with_path(lambda path, old: model_arrays.get(_name(path), old), model)
    return model, jax.tree.unflatten(structure, held)


EQUINOX = Format(
    name="equinox",
    argument="variables",
    separator="/",
    learned=("weight", "bias"),
    running=(_BATCH, _EMA),
    optional=("momentum",),
    kernel="weight",
    bias="bias",
    kernels_first=True,
    needs_like=True,
    entries=_entries,
    read=_read,
    write=_write,
    build=_build,
)
