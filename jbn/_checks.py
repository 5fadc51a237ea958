"""Parse, don't validate: each function takes raw arguments and returns their canonical form, or raises.

Every message is one line: ``<argument>: got …; expected …; <what to do>.`` Only static facts are
checked; what depends on data (a NaN, an empty mask) is defined behaviour, not an error.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn._pytrees import BNParams, BNState, BNStats

_TRAINING_STATS = "pass what normalize_inputs returned for the training set"

__all__ = [
    "as_batch",
    "as_data",
    "as_eps",
    "as_feature_shape",
    "as_flag",
    "as_float_dtype",
    "as_input_eps",
    "as_layer",
    "as_mask",
    "as_matching",
    "as_momentum",
    "as_params",
    "as_renorm",
    "as_size",
    "as_state",
    "as_stats",
    "compute_dtype",
    "static",
]


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for every narrower float."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _kind(value: Any) -> str:
    return type(value).__name__


def static(name: str, value: Any) -> None:
    """A traced value where a Python one is needed is an error that says how to make it static."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: got a traced value; expected a Python value, known when the function is traced; "
            f"name it in static_argnames of jax.jit, or bind it with functools.partial."
        )


def as_flag(name: str, value: Any) -> bool:
    """A bool that is known at trace time."""
    static(name, value)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; expected a bool; pass {name}=True or {name}=False.")
    return value


def as_batch(name: str, x: Any) -> jax.Array:
    """A real floating-point array, of rank 1 or more."""
    x = _as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: got dtype {x.dtype}; expected a real floating-point array; "
            f"convert it with {name}.astype(jnp.float32)."
        )
    if not x.ndim:
        raise ValueError(
            f"{name}: got rank 0; expected at least one axis, the features; pass {name}[None] for a single value."
        )
    return x


def as_data(name: str, x: Any) -> jax.Array:
    """A real array, integers and booleans included."""
    x = _as_array(name, x)
    exact = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_
    return x if exact and x.ndim else as_batch(name, x.astype(jnp.float32) if exact else x)


def _as_array(name: str, x: Any) -> jax.Array:
    if not _is_numbers(x):
        raise TypeError(f"{name}: got {_kind(x)}; expected a real floating-point array; pass the data.")
    return jnp.asarray(x)


def _is_numbers(x: Any) -> bool:
    """Whether ``x`` is an array, a number, or nested lists of them."""
    if isinstance(x, (list, tuple)):
        return not isinstance(x, (BNParams, BNState, BNStats)) and all(map(_is_numbers, x))
    return isinstance(x, (jax.Array, np.ndarray, np.generic, int, float, complex)) or hasattr(x, "__jax_array__")


def as_size(name: str, value: Any, advice: str) -> int:
    """An int of at least 1."""
    try:
        if isinstance(value, bool):
            raise TypeError
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}; expected an int; {advice}.") from None
    if size < 1:
        raise ValueError(f"{name}: got {size}; expected at least 1; {advice}.")
    return size


def as_feature_shape(num_features: Any) -> tuple[int, ...]:
    """The shape of the feature axes, from an int or a tuple of ints."""
    static("num_features", num_features)
    sizes = num_features if isinstance(num_features, (tuple, list)) else (num_features,)
    try:
        if any(isinstance(n, bool) for n in sizes):
            raise TypeError
        shape = tuple(operator.index(n) for n in sizes)
    except TypeError:
        raise TypeError(
            f"num_features: got {num_features!r}; expected an int or a tuple of ints; "
            f"pass the size of the feature axis, as in bn_init(64)."
        ) from None
    if not shape or any(n < 1 for n in shape):
        raise ValueError(
            f"num_features: got {num_features!r}; expected sizes of at least 1; pass the size of each feature axis."
        )
    return shape


def as_float_dtype(dtype: Any) -> Any:
    """A real floating-point dtype for γ and β."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: got {dtype!r}; expected a floating-point dtype; pass jnp.float32.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: got {dtype}; expected a floating-point dtype; pass jnp.float32.")
    return dtype


def as_params(params: Any, shape: tuple[int, ...]) -> BNParams:
    """A BNParams whose fields have the feature shape, or are None."""
    params = _as_bn_params(params)
    for name, value in zip(BNParams._fields, params, strict=True):
        if value is not None:
            _of_shape(f"params.{name}", value, shape)
    return params


def _as_bn_params(params: Any) -> BNParams:
    if not isinstance(params, BNParams):
        raise TypeError(
            f"params: got {_kind(params)}; expected BNParams; "
            f"pass the first of the pair that bn_init returns: params, state = bn_init(...)."
        )
    return params


def _of_shape(name: str, value: Any, shape: tuple[int, ...], hint: str = "") -> None:
    if jnp.shape(value) != shape:
        size = shape[0] if len(shape) == 1 else shape
        hint = hint or f"make it with bn_init({size}), or name other feature axes in axis"
        raise ValueError(f"{name}: got shape {jnp.shape(value)}; expected {shape}, the size of x along axis; {hint}.")


def as_state(state: Any, shape: tuple[int, ...]) -> BNState:
    """A BNState whose fields have the feature shape."""
    state = _as_bn_state(state)
    for name, value in zip(BNState._fields, state, strict=True):
        _of_shape(f"state.{name}", value, shape)
    return state


def _as_bn_state(state: Any) -> BNState:
    if not isinstance(state, BNState):
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], BNParams):
            hint = "unpack the pair of bn_init: params, state = bn_init(...)"
        elif isinstance(state, BNStats):
            hint = "turn stats into a state with bn_update_stats(state, stats)"
        elif isinstance(state, BNParams):
            hint = "the order is bn_apply(params, state, x)"
        else:
            hint = "pass the second of the pair that bn_init returns"
        raise TypeError(f"state: got {_kind(state)}; expected BNState; {hint}.")
    return state


def as_stats(stats: Any, shape: tuple[int, ...]) -> BNStats:
    """BNStats whose fields have the feature shape."""
    if not isinstance(stats, BNStats):
        pair = isinstance(stats, tuple) and len(stats) == 2 and isinstance(stats[1], BNStats)
        hint = "unpack the pair: z, stats = normalize_inputs(...)" if pair else _TRAINING_STATS
        raise TypeError(f"stats: got {_kind(stats)}; expected BNStats; {hint}.")
    for name, value in zip(BNStats._fields, stats, strict=True):
        _of_shape(f"stats.{name}", value, shape, "pass the stats of data with the same features")
    return stats


def as_matching(path: str, state: BNState, stats: BNStats) -> None:
    """Fields of a state and of its stats all have one shape."""
    shape = jnp.shape(state.mean)
    for name, node in (("state", state), ("stats", stats)):
        for field, value in zip(node._fields, node, strict=True):
            if jnp.shape(value) != shape:
                raise ValueError(
                    f"{name}{path}.{field}: got shape {jnp.shape(value)}; expected {shape}, that of "
                    f"state{path}.mean; update each state with stats of its own layer."
                )


def as_layer(params: Any, state: Any) -> tuple[BNParams, BNState]:
    """Params and state of one batch norm, whose fields all have one shape; a None stays None."""
    params, state = _as_bn_params(params), _as_bn_state(state)
    shape = jnp.shape(state.mean)
    for name, node in (("params", params), ("state", state)):
        for field, value in zip(node._fields, node, strict=True):
            if value is not None and jnp.shape(value) != shape:
                raise ValueError(
                    f"{name}.{field}: got shape {jnp.shape(value)}; expected {shape}, that of state.mean; "
                    f"pass the params and the state of one layer."
                )
    return params, state


def as_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """A bool array of x's rank, each size 1 or x's."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask: got dtype {mask.dtype}; expected bool, True where a value counts; "
            f"convert it with mask.astype(bool)."
        )
    if mask.ndim != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"mask: got shape {mask.shape}; expected rank {len(shape)} with each size 1 or that of x {shape}; "
            f"give the missing axes size 1, as in mask[:, None]."
        )
    return mask


def _concrete(value: Any) -> float | None:
    """The number, if it is known at trace time."""
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _scalar(name: str, value: Any) -> None:
    """A real number: a Python one, or an array of shape ()."""
    real = jnp.issubdtype(jnp.result_type(value), jnp.floating) if _is_numeric(value) else False
    integral = _is_numeric(value) and jnp.issubdtype(jnp.result_type(value), jnp.integer)
    if not (real or integral) or jnp.shape(value) != ():
        shown = f"shape {jnp.shape(value)}" if _is_numeric(value) and jnp.shape(value) else repr(value)
        raise TypeError(f"{name}: got {shown}; expected one real number; pass a scalar.")


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "dtype") and hasattr(value, "shape"))


def as_eps(eps: Any) -> Any:
    """ε > 0; range-checked unless traced."""
    _scalar("eps", eps)
    known = _concrete(eps)
    if known is not None and not (math.isfinite(known) and known > 0):
        raise ValueError(
            f"eps: got {eps}; expected a finite number above 0; "
            f"pass eps=1e-5 (without it a constant channel divides by zero)."
        )
    return eps


def as_input_eps(eps: Any) -> Any:
    """ε ≥ 0; range-checked unless traced."""
    _scalar("eps", eps)
    known = _concrete(eps)
    if known is not None and not (math.isfinite(known) and known >= 0):
        raise ValueError(f"eps: got {eps}; expected a finite number, at least 0; pass eps=0.0.")
    return eps


def as_momentum(momentum: Any) -> Any:
    """The share of the running statistic that is kept; range-checked unless traced."""
    _scalar("momentum", momentum)
    known = _concrete(momentum)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(
            f"momentum: got {momentum}; expected 0 ≤ momentum ≤ 1, the share kept; pass 1 - m for PyTorch's momentum m."
        )
    return momentum


def as_renorm(renorm: Any) -> tuple[Any, Any] | None:
    """(r_max, d_max); range-checked unless traced."""
    if renorm is None:
        return None
    if not isinstance(renorm, (tuple, list)) or len(renorm) != 2:
        raise ValueError(
            f"renorm: got {_named(renorm)}; expected a pair (r_max, d_max); pass (1.0, 0.0) for plain batch norm."
        )
    r_max, d_max = renorm
    for limit in (r_max, d_max):
        _scalar("renorm", limit)
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        known = _concrete(limit)
        if known is not None and not known >= least:
            raise ValueError(
                f"renorm: got {name} = {limit}; expected at least {least}; (1.0, 0.0) is plain batch norm."
            )
    return r_max, d_max


def _named(value: Any) -> str:
    return "a traced value" if isinstance(value, jax.core.Tracer) else repr(value)
