"""Keras: the variables of a batch normalization, by path or in Keras's order."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._formats import Entry, Format, as_names, found, layer_of, named, refilled, slashed
from jbn.convert._layer import as_arrays, as_layer

__all__ = ["KERAS", "from_keras", "to_keras"]

_NAMES = ("gamma", "beta", "moving_mean", "moving_variance")


def from_keras(variables: Any, prefix: Any = "", *, count: Any = None) -> tuple[BNParams, BNState]:
    """A ``BatchNormalization`` of Keras as ``(params, state)``; the variables of `jbn.keras.BatchNormalization` too.

    γ, β, μ and σ² are ``gamma``, ``beta``, ``moving_mean`` and ``moving_variance``. Keras's ``momentum`` is jbn's, the
    share kept, 0.99 by default; it stores the biased variance and does not correct the start: go on with
    ``bn_update_stats(state, stats, momentum=0.99, debias=False, unbiased=False)``. ``epsilon`` is no variable, and
    Keras's default is not jbn's: pass ``eps=1e-3`` to what takes one.

    Args:
        variables: a mapping from paths to arrays, ``{v.path: v for v in model.weights}``; or ``model.weights`` itself,
            a list of variables; or the list of arrays that ``layer.get_weights()`` returns, of one layer.
        prefix: the path of the layer, ``"sequential/batch_normalization"``; where ``variables`` are those of one batch
            norm alone it may be left out.
        count: how many updates the moving averages hold. Keras does not say: without it they count as fully warmed up,
            saturated, so that debias never erases them; ``count=0`` is a layer that has seen nothing.

    Returns:
        ``(params, state)`` of shape (C,). γ and β keep their dtype and are None where the layer has none; running
        statistics are float32, or float64 where they are stored so.

    Raises:
        TypeError: a variable that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: no batch norm at ``prefix``, a running statistic missing, a key too many (a layer with ``renorm``
            has some), shapes that differ, a negative variance, a number that is not finite; three arrays without
            names, of which the first may be gamma or beta.

    Example:
        >>> import numpy as np
        >>> from jbn.convert import from_keras
        >>> weights = [np.float32([1, 2]), np.float32([0, 0]), np.float32([3, 4]), np.float32([5, 6])]
        >>> params, state = from_keras(weights)                       # layer.get_weights()
        >>> state.var
        Array([5., 6.], dtype=float32)

    References:
        Keras, `keras.layers.BatchNormalization`.
    """
    entries = _entries(variables)
    layers = {layer_of(KERAS, name) for name in entries} - {None}
    if not as_names("prefix", prefix, "/") and len(layers) == 1:
        (layer,) = layers
        if all(name.startswith(f"{layer}/") for name in entries):
            prefix = layer
    return _read(found(KERAS, entries, prefix), {"count": count})


def to_keras(params: BNParams, state: BNState, prefix: Any = "", *, dtype: Any = None) -> dict[str, np.ndarray]:
    """A batch norm as Keras has it among its variables; `jbn.keras.BatchNormalization` takes them as well.

    The converse of `from_keras`; counts are left behind. To load it: ``layer.set_weights([*arrays.values()])``.

    Args:
        params: γ and β, (C,); what is None is left out, as with ``scale=False``.
        state: running statistics, (C,).
        prefix: the path of the layer, ``"sequential/batch_normalization"``.
        dtype: of all arrays; None keeps the dtype that each has.

    Returns:
        A dict of NumPy arrays by path, in Keras's order: gamma, beta, moving_mean, moving_variance.

    Raises:
        TypeError: ``params`` or ``state`` of another type.
        ValueError: fields that differ in shape.

    Example:
        >>> import jbn
        >>> list(jbn.convert.to_keras(*jbn.bn_init(2), prefix="bn"))
        ['bn/gamma', 'bn/beta', 'bn/moving_mean', 'bn/moving_variance']

    References:
        Keras, `keras.layers.BatchNormalization`.
    """
    start = "".join(f"{name}/" for name in as_names("prefix", prefix, "/"))
    return {start + leaf: array for leaf, array in _write(params, state, {}, {"dtype": dtype}).items()}


def _entries(variables: Any) -> dict[str, Entry]:
    if isinstance(variables, Mapping):
        return named("variables", variables, slashed)
    if not isinstance(variables, (list, tuple)):
        hint = "pass model.weights" if hasattr(variables, "weights") else "pass {v.path: v for v in model.weights}"
        raise TypeError(f"variables: got {kind_of(variables)}; expected variables by path, or a list; {hint}.")
    if all(isinstance(getattr(v, "path", None), str) for v in variables):
        return {v.path: Entry(f"variables[{v.path!r}]", v) for v in variables}
    if len(variables) not in (2, 4):
        raise ValueError(
            f"variables: got {len(variables)} arrays without names; expected 4 (gamma, beta, moving_mean, "
            f"moving_variance), or the last 2; pass a dict with these names."
        )
    names = _NAMES[-len(variables) :]
    return {n: Entry(f"variables[{i}]", v) for i, (n, v) in enumerate(zip(names, variables, strict=True))}


def _read(pieces: dict[str, Entry], options: dict[str, Any]) -> tuple[BNParams, BNState]:
    learned = pieces.get("gamma"), pieces.get("beta")
    return as_layer(*learned, pieces["moving_mean"], pieces["moving_variance"], count=options.get("count"))


def _write(params: Any, state: Any, like: dict[str, Entry], options: dict[str, Any]) -> dict[str, np.ndarray]:
    *arrays, _ = as_arrays(params, state, options.get("dtype"))
    return {name: array for name, array in zip(_NAMES, arrays, strict=True) if array is not None}


def _build(arrays: dict[str, Any], like: Any) -> Any:
    if isinstance(like, (list, tuple)):  # in the order in which set_weights wants them
        return [arrays.get(name, entry.value) for name, entry in _entries(like).items()]
    return dict(arrays) if like is None else refilled(like, arrays, slashed)


KERAS = Format(
    name="keras",
    argument="variables",
    separator="/",
    learned=("gamma", "beta"),
    running=(("moving_mean", "moving_variance"),),
    optional=(),
    kernel="kernel",
    bias="bias",
    kernels_first=False,
    needs_like=False,
    entries=_entries,
    read=_read,
    write=_write,
    build=_build,
)
