"""Flax nnx: the state of a batch norm, as nested mappings of variables or of arrays."""

from collections.abc import Mapping
from typing import Any

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._flax import FLAX, read_four, write_four
from jbn.convert._formats import Entry, as_names, found, named, nested, refilled, slashed

__all__ = ["NNX", "from_nnx", "to_nnx"]


def from_nnx(variables: Any, prefix: Any = "", *, count: Any = None) -> tuple[BNParams, BNState]:
    """A batch norm of Flax nnx as ``(params, state)``; the state of `jbn.nnx.BatchNorm` is the same.

    γ, β, μ and σ² are ``scale``, ``bias``, ``mean`` and ``var``. Flax's ``momentum`` is jbn's, the share kept, 0.99 by
    default; it stores the biased variance and does not correct the start: go on with
    ``bn_update_stats(state, stats, momentum=0.99, debias=False, unbiased=False)``. ``epsilon`` is no variable; Flax's
    default is jbn's, 1e-5.

    Args:
        variables: what ``nnx.state(model)`` returns, the pure dict of it, or any nested mappings of variables or
            arrays.
        prefix: the path of the layer, ``"layers/1"``, or a tuple of the names along it; for the state of the layer
            itself none.
        count: how many updates the running statistics hold. Flax does not say: without it they count as fully warmed
            up, saturated, so that debias never erases them; ``count=0`` is a layer that has seen nothing.

    Returns:
        ``(params, state)`` of the layer's feature shape, with leading axes where layers are stacked by ``nnx.vmap``.
        γ and β keep their dtype and are None where the layer has none; running statistics are float32, or float64
        where they are stored so.

    Raises:
        TypeError: a variable that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: no batch norm at ``prefix``, a running statistic missing, a key too many, shapes that differ, a
            negative variance, a number that is not finite.

    Example:
        >>> from flax import nnx
        >>> from jbn.convert import from_nnx
        >>> model = nnx.Sequential(nnx.BatchNorm(2, use_bias=False, rngs=nnx.Rngs(0)))
        >>> params, state = from_nnx(nnx.state(model), "layers/0")
        >>> params
        BNParams(gamma=Array([1., 1.], dtype=float32), beta=None)

    References:
        Flax, `flax.nnx.BatchNorm`.
    """
    return read_four(found(NNX, _entries(variables), prefix), {"count": count})


def to_nnx(params: BNParams, state: BNState, prefix: Any = "", *, dtype: Any = None) -> dict[Any, Any]:
    """A batch norm as Flax nnx has it in the pure dict of a state; `jbn.nnx.BatchNorm` takes it as well.

    The converse of `from_nnx`; counts are left behind. To load it: ``nnx.update(layer, to_nnx(params, state))``.

    Args:
        params: γ and β; what is None is left out, as with ``use_scale=False``.
        state: running statistics.
        prefix: the path of the layer, ``"layers/1"``; a number in it becomes an index.
        dtype: of all arrays; None keeps the dtype that each has.

    Returns:
        Nested dicts of JAX arrays.

    Raises:
        TypeError: ``params`` or ``state`` of another type.
        ValueError: fields that differ in shape.

    Example:
        >>> import jbn
        >>> jbn.convert.to_nnx(*jbn.bn_init(1, use_beta=False), prefix="layers/0")
        {'layers': {0: {'scale': Array([1.], dtype=float32), 'mean': Array([0.], dtype=float32),
            'var': Array([1.], dtype=float32)}}}

    References:
        Flax, `flax.nnx.BatchNorm`.
    """
    names = as_names("prefix", prefix, "/")
    arrays = write_four(params, state, {}, {"dtype": dtype})
    return _build({"/".join((*names, leaf)): array for leaf, array in arrays.items()}, None)


def _entries(variables: Any) -> dict[str, Entry]:
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables: got {kind_of(variables)}; expected nested mappings of variables; pass nnx.state(model)."
        )
    return named("variables", variables, slashed)


def _build(arrays: dict[str, Any], like: Any) -> dict[Any, Any]:
    """Numbers in a path are indices of a list of modules."""
    if like is not None:
        return refilled(like, arrays, slashed)
    return nested(
        {tuple(int(k) if k.isdecimal() else k for k in name.split("/")): array for name, array in arrays.items()}
    )


NNX = FLAX._replace(name="nnx", entries=_entries, build=_build)  # the leaves of a module are linen's
