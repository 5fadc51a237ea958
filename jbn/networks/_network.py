"""What the networks share: the pair they are, how a layer starts, and what does not fit them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks
from jbn._checks import kind_of
from jbn._core import bn_init
from jbn._pytrees import BNParams, BNState
from jbn._shardings import for_product, sharding_of

__all__ = ["Layer", "Network", "affine", "as_compute_dtype", "check_fit", "entered", "init_layer"]

_FROM_INIT = "pass what the network's init returned: params, state = init(key)"


class Network(NamedTuple):
    """A network as a pair of pure functions, as optax's transformations are.

    Attributes:
        init: ``init(key) -> (params, state)``, what is learned and the running statistics.
        apply: ``apply(params, state, x, *, train, axis_name=None, mask=None) -> (outputs, stats)``;
            ``stats`` are for ``bn_update_stats(state, stats)``. ``train`` and ``axis_name`` are static.
            In training ``state``, or a part of it, may be None where no running statistics are wanted.

    Example:
        >>> import jax
        >>> from jbn.networks import mlp
        >>> init, apply = mlp((4, 8, 3))
        >>> params, state = init(jax.random.key(0))
        >>> outputs, stats = apply(params, state, jax.numpy.ones((2, 4)), train=True)
        >>> outputs.shape
        (2, 3)
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]


class Layer(NamedTuple):
    """One affine map and the batch norm after it: what its params look like, and how they start."""

    shape: tuple[int, ...]  # of W, the outputs last
    normed: bool
    biased: bool = True
    zero_gamma: bool = False


def init_layer(noise: jax.Array, layer: Layer) -> tuple[dict[str, Any], BNState | None]:
    """``({"W", "b", "bn"}, state)``: noise from N(0, 1) becomes W from N(0, 2/n), n the inputs of one output."""
    outputs = layer.shape[-1]
    W = math.sqrt(2 / math.prod(layer.shape[:-1])) * noise.reshape(layer.shape)
    b = jnp.zeros(outputs, jnp.float32) if layer.biased else None
    bn: BNParams | None = None
    state: BNState | None = None
    if layer.normed:
        bn, state = bn_init(outputs)
        bn = BNParams(jnp.zeros(outputs, jnp.float32), bn.beta) if layer.zero_gamma else bn
    return {"W": W, "b": b, "bn": bn}, state


def affine(a: jax.Array, W: jax.Array, b: jax.Array) -> jax.Array:
    """a·W + b in the dtype of a, on an explicit mesh too, however W and b are split."""
    a, W, spec = for_product(a, W.astype(a.dtype))
    z = jnp.matmul(a, W, out_sharding=sharding_of(a, spec))
    return z + lax.expand_dims(b.astype(a.dtype), range(a.ndim - 1))


def entered(x: jax.Array, mask: jax.Array | None, compute: Any) -> jax.Array:
    """x in the dtype of the computation; what the mask leaves out becomes 0, so that a NaN there does no harm."""
    x = x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))
    return x.astype(_checks.compute_dtype(x.dtype) if compute is None else compute)


def check_fit(params: Any, state: Any, layers: Any) -> None:
    """Raises unless params, and a state if there is one, have the structure of ``layers``, a tree of `Layer`."""
    _check_fit("params", params, layers)
    if state is not None:
        _check_fit("state", state, layers)


def _check_fit(name: str, tree: Any, layers: Any, entries: str = "layers") -> None:
    if name.startswith("state") and (tree is None or isinstance(layers, Layer)):
        return  # what stands in the place of a norm's state is for that norm to judge
    if isinstance(layers, list):
        if not isinstance(tree, (list, tuple)) or len(tree) != len(layers):
            got = f"{len(tree)} entries" if isinstance(tree, (list, tuple)) else kind_of(tree)
            raise ValueError(
                f"{name}: got {got}; expected a list with one entry for each of {len(layers)} {entries}; {_FROM_INIT}."
            )
        for i, layer in enumerate(layers):
            _check_fit(f"{name}[{i}]", tree[i], layer)
        return
    keys = ["W", "b", "bn"] if isinstance(layers, Layer) else list(layers)
    if not isinstance(tree, Mapping) or set(tree) != set(keys):
        got = f"a dict of {', '.join(map(str, tree))}" if isinstance(tree, Mapping) and tree else kind_of(tree)
        raise ValueError(f"{name}: got {got}; expected a dict of {', '.join(keys)}; {_FROM_INIT}.")
    if not isinstance(layers, Layer):
        for key in keys:
            _check_fit(f"{name}[{key!r}]", tree[key], layers[key], key)
    elif jnp.shape(tree["W"]) != layers.shape:
        raise ValueError(f"{name}['W']: got shape {jnp.shape(tree['W'])}; expected {layers.shape}; {_FROM_INIT}.")
    elif tree["bn"] is not None and not layers.normed:
        raise ValueError(
            f"{name}['bn']: got {kind_of(tree['bn'])}; expected None, for the network has no norm there; "
            f"fold the norm into W and b, or make the network with the norm it was trained with."
        )


def as_compute_dtype(dtype: Any) -> Any:
    """A real floating-point dtype, or None for that of x."""
    return None if dtype is None else _checks.as_float_dtype(dtype)
