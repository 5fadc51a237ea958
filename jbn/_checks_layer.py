"""Batch norm's own words: its three pytrees, its mask and its numbers; parsed, or refused in one line."""

import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jbn._checks import as_ints, as_scalar, as_tuple, check_array, is_array, kind_of
from jbn._pytrees import BNParams, BNState, BNStats

__all__ = [
    "as_eps",
    "as_feature_shape",
    "as_input_eps",
    "as_layer",
    "as_mask",
    "as_momentum",
    "as_params",
    "as_renorm",
    "as_state",
    "as_stats",
    "check_matching",
]


def as_feature_shape(num_features: Any) -> tuple[int, ...]:
    """The shape of the feature axes, from an int or a tuple of ints."""
    wanted = "expected an int or a tuple of ints; pass the size of the feature axis, as in bn_init(64)."
    shape = as_ints("num_features", num_features, wanted, as_tuple(num_features))
    if not shape or any(n < 1 for n in shape):
        raise ValueError(
            f"num_features: got {num_features!r}; expected sizes of at least 1; pass the size of each feature axis."
        )
    return shape


def as_params(params: Any, shape: tuple[int, ...]) -> BNParams:
    """A BNParams whose fields have the feature shape, or are None."""
    params = _as_bn_params(params)
    _check_fields("params", params, shape, _along_axis(shape))
    return params


def as_state(state: Any, shape: tuple[int, ...]) -> BNState:
    """A BNState whose fields have the feature shape."""
    state = _as_bn_state(state)
    _check_fields("state", state, shape, _along_axis(shape))
    return state


def as_stats(stats: Any, shape: tuple[int, ...]) -> BNStats:
    """BNStats whose fields have the feature shape."""
    if not isinstance(stats, BNStats):
        hint = "pass what normalize_inputs returned for the training set"
        if isinstance(stats, tuple) and len(stats) == 2 and isinstance(stats[1], BNStats):
            hint = "unpack the pair: z, stats = normalize_inputs(...)"
        raise TypeError(f"stats: got {kind_of(stats)}; expected BNStats; {hint}.")
    _check_fields("stats", stats, shape, "the size of x along axis; pass the stats of data with the same features.")
    return stats


def as_layer(params: Any, state: Any) -> tuple[BNParams, BNState]:
    """Params and state of one batch norm, whose fields all have one shape; a None in params stays None."""
    params, state = _as_bn_params(params), _as_bn_state(state)
    for name, node in (("state", state), ("params", params)):
        _check_fields(name, node, _shape_of(state), "that of state.mean; pass the params and the state of one layer.")
    return params, state


def check_matching(path: str, state: BNState, stats: BNStats) -> None:
    """Fields of a state and of its stats all have one shape."""
    wanted = f"that of state{path}.mean; update each state with stats of its own layer."
    for name, node in (("state", state), ("stats", stats)):
        _check_fields(f"{name}{path}", node, _shape_of(state), wanted)


def _as_bn_params(params: Any) -> BNParams:
    if not isinstance(params, BNParams):
        raise TypeError(
            f"params: got {kind_of(params)}; expected BNParams; "
            f"pass the first of the pair that bn_init returns: params, state = bn_init(...)."
        )
    return params


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
        raise TypeError(f"state: got {kind_of(state)}; expected BNState; {hint}.")
    return state


def _along_axis(shape: tuple[int, ...]) -> str:
    size = shape[0] if len(shape) == 1 else shape
    return f"the size of x along axis; make it with bn_init({size}), or name other feature axes in axis."


def _shape_of(state: BNState) -> tuple[int, ...]:
    """The shape that all fields should have; that of the mean, if it has one."""
    return jnp.shape(state.mean) if is_array(state.mean) else ()


def _check_fields(name: str, node: Any, shape: tuple[int, ...], wanted: str) -> None:
    """All fields of a node are arrays of one shape; γ and β may be None."""
    for field, value in zip(node._fields, node, strict=True):
        if value is None and isinstance(node, BNParams):
            continue
        check_array(f"{name}.{field}", value, or_number=bool(shape))  # a number has the wrong shape then
        if jnp.shape(value) != shape:
            raise ValueError(f"{name}.{field}: got shape {jnp.shape(value)}; expected {shape}, {wanted}")


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


def as_eps(eps: Any) -> Any:
    """ε > 0; range-checked unless traced."""
    wanted = "expected a finite number above 0; pass eps=1e-5 (without it a constant channel divides by zero)."
    return as_scalar("eps", eps, lambda known: math.isfinite(known) and known > 0, wanted)


def as_input_eps(eps: Any) -> Any:
    """ε ≥ 0; range-checked unless traced."""
    wanted = "expected a finite number, at least 0; pass eps=0.0."
    return as_scalar("eps", eps, lambda known: math.isfinite(known) and known >= 0, wanted)


def as_momentum(momentum: Any) -> Any:
    """The share of the running statistic that is kept; range-checked unless traced."""
    wanted = "expected 0 ≤ momentum ≤ 1, the share kept; pass 1 - m for PyTorch's momentum m."
    return as_scalar("momentum", momentum, lambda known: 0 <= known <= 1, wanted)


def as_renorm(renorm: Any) -> tuple[Any, Any] | None:
    """(r_max, d_max); range-checked unless traced."""
    if renorm is None:
        return None
    if not isinstance(renorm, (tuple, list)) or len(renorm) != 2:
        shown = "a traced value" if isinstance(renorm, jax.core.Tracer) else repr(renorm)
        raise ValueError(f"renorm: got {shown}; expected a pair (r_max, d_max); pass (1.0, 0.0) for plain batch norm.")
    r_max, d_max = renorm
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        wanted = f"expected at least {least}; (1.0, 0.0) is plain batch norm."
        as_scalar("renorm", limit, partial(operator.le, least), wanted, label=f"{name} = ")
    return r_max, d_max
