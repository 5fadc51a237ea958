"""Flax linen: the variables of a batch norm, in the collections ``params`` and ``batch_stats``."""

from collections.abc import Mapping
from typing import Any

import jax

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_jax
from jbn.convert._formats import Entry, Format, as_names, found, named, nested, refilled, slashed
from jbn.convert._layer import as_arrays, as_layer

__all__ = ["FLAX", "from_flax", "read_four", "to_flax", "write_four"]

_RUNNING = ("mean", "var")


def from_flax(variables: Any, prefix: Any = "", *, count: Any = None) -> tuple[BNParams, BNState]:
    """A batch norm of Flax linen as ``(params, state)``; the variables of `jbn.linen.BatchNorm` are the same.

    γ, β, μ and σ² are ``scale`` and ``bias`` in ``params``, ``mean`` and ``var`` in ``batch_stats``. Flax's
    ``momentum`` is jbn's, the share kept, 0.99 by default; it stores the biased variance and does not correct the
    start: go on with ``bn_update_stats(state, stats, momentum=0.99, debias=False, unbiased=False)``. ``epsilon`` is no
    variable; Flax's default is jbn's, 1e-5.

    Args:
        variables: what ``module.init`` returns, nested mappings of arrays; boxed parameters are unboxed.
        prefix: the path of the layer, ``"block/bn"``, or a tuple of the names along it; for the variables of the
            layer itself none.
        count: how many updates the running statistics hold. Flax does not say: without it they count as fully warmed
            up, saturated, so that debias never erases them; ``count=0`` is a layer that has seen nothing.

    Returns:
        ``(params, state)`` of the layer's feature shape, with leading axes where layers are stacked by ``nn.scan`` or
        ``nn.vmap``. γ and β keep their dtype and are None where the layer has none; running statistics are float32, or
        float64 where they are stored so.

    Raises:
        TypeError: a variable that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: no batch norm at ``prefix``, a running statistic missing, a key too many, shapes that differ, a
            negative variance, a number that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn.convert import from_flax
        >>> variables = {
        ...     "params": {"bn": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}},
        ...     "batch_stats": {"bn": {"mean": jnp.array([3.0, 4.0]), "var": jnp.array([5.0, 6.0])}},
        ... }
        >>> params, state = from_flax(variables, "bn", count=7)
        >>> state
        BNState(mean=Array([3., 4.], dtype=float32), var=Array([5., 6.], dtype=float32),
            count=Array([7, 7], dtype=int32))

    References:
        Flax, `flax.linen.BatchNorm`.
    """
    return read_four(found(FLAX, _entries(variables), prefix), {"count": count})


def to_flax(params: BNParams, state: BNState, prefix: Any = "", *, dtype: Any = None) -> dict[str, Any]:
    """A batch norm as Flax linen has it among its variables; `jbn.linen.BatchNorm` takes them as well.

    The converse of `from_flax`; counts are left behind.

    Args:
        params: γ and β; what is None is left out, as with ``use_scale=False``.
        state: running statistics.
        prefix: the path of the layer, ``"block/bn"``.
        dtype: of all arrays; None keeps the dtype that each has.

    Returns:
        ``{"params": …, "batch_stats": …}``, nested dicts of JAX arrays; without ``"params"`` where γ and β are None.

    Raises:
        TypeError: ``params`` or ``state`` of another type.
        ValueError: fields that differ in shape.

    Example:
        >>> import jbn
        >>> jbn.convert.to_flax(*jbn.bn_init(1), prefix="bn")
        {'params': {'bn': {'scale': Array([1.], dtype=float32), 'bias': Array([0.], dtype=float32)}},
            'batch_stats': {'bn': {'mean': Array([0.], dtype=float32), 'var': Array([1.], dtype=float32)}}}

    References:
        Flax, `flax.linen.BatchNorm`.
    """
    names = as_names("prefix", prefix, "/")
    arrays = write_four(params, state, {}, {"dtype": dtype})
    return _build({"/".join((*names, leaf)): array for leaf, array in arrays.items()}, None)


def _entries(variables: Any) -> dict[str, Entry]:
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables: got {kind_of(variables)}; expected a mapping of collections; pass what module.init returned."
        )
    if "params" not in variables and "batch_stats" not in variables:
        raise ValueError(
            "variables: got neither 'params' nor 'batch_stats'; expected the collections that module.init returned; "
            "pass them whole, {'params': …, 'batch_stats': …}."
        )
    return named("variables", variables, _name)


def _name(path: tuple[Any, ...]) -> str:
    """Without the collection: a module has one name for what it learns and what it averages."""
    return slashed(path[1:] if path[0] in ("params", "batch_stats") else path)


def read_four(pieces: dict[str, Entry], options: dict[str, Any]) -> tuple[BNParams, BNState]:
    """From scale, bias, mean and var, as linen and nnx have them."""
    learned = pieces.get("scale"), pieces.get("bias")
    return as_layer(*learned, pieces["mean"], pieces["var"], count=options.get("count"))


def write_four(params: Any, state: Any, like: dict[str, Entry], options: dict[str, Any]) -> dict[str, jax.Array]:
    """As scale, bias, mean and var."""
    *arrays, _ = as_arrays(params, state, options.get("dtype"))
    leaves_ = zip(("scale", "bias", *_RUNNING), arrays, strict=True)
    return {leaf: as_jax(leaf, array) for leaf, array in leaves_ if array is not None}


def _build(arrays: dict[str, Any], like: Any) -> dict[str, Any]:
    """Running statistics go to their collection, all else to the params."""
    if like is not None:
        return refilled(like, arrays, _name)
    collection = {name: "batch_stats" if name.split("/")[-1] in _RUNNING else "params" for name in arrays}
    return nested({(collection[name], *name.split("/")): array for name, array in arrays.items()})


FLAX = Format(
    name="flax",
    argument="variables",
    separator="/",
    learned=("scale", "bias"),
    running=(_RUNNING,),
    optional=(),
    kernel="kernel",
    bias="bias",
    kernels_first=False,
    needs_like=False,
    entries=_entries,
    read=read_four,
    write=write_four,
    build=_build,
)
