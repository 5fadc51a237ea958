"""What is exported: a function of x alone, with weights and input statistics inside, its batch size left open."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jbn import _checks
from jbn._checks import kind_of
from jbn._pytrees import BNStats

__all__ = ["Forward", "forward", "needs_float64"]

# |μ|/σ beyond which a float32 keeps too little of the spread: its rounding is 2⁻²⁴·|μ|, that is 6e-4·σ here.
_OFFSET = 1e4
# A flatbuffer and a protobuf hold offsets of 31 bits.
_MOST_BYTES = 2**31 - 2**20


class Forward(NamedTuple):
    """A function to trace, for x of this shape and dtype, in this context."""

    function: Callable[[jax.Array], Any]
    x: jax.ShapeDtypeStruct
    width: Callable[[], AbstractContextManager[None]]


def forward(apply_fn: Any, params: Any, state: Any, x: Any, inputs: BNStats | None, name: Any) -> Forward:
    """``apply_fn(params, state, z)`` as a function of x, z = (x−μ)/σ where there are ``inputs``."""
    _checks.as_function("apply_fn", apply_fn)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: got {name!r}; expected a Python identifier; pass one, as in name='network'.")
    spec = _as_spec(x)
    params, state = jax.device_get((params, state))
    size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves((params, state)))
    if size > _MOST_BYTES:
        raise ValueError(
            f"params: got {size / 2**30:.1f} GiB of arrays; expected less than 2 GiB, which one such file can hold; "
            f"export parts of the network, or save the params with jbn.convert and its source."
        )
    standardize = None if inputs is None else _standardizer(inputs, spec)

    def function(x: jax.Array) -> Any:
        # In the program as constants, from the host: however they were split over devices, it runs on one.
        weights, running = jax.tree.map(jnp.asarray, (params, state))
        return apply_fn(weights, running, x if standardize is None else standardize(x))

    function.__name__ = function.__qualname__ = name
    wide = spec.dtype.itemsize == 8
    return Forward(function, spec, (lambda: jax.enable_x64(True)) if wide else nullcontext)


def needs_float64(inputs: BNStats) -> bool:
    """Tells whether float32 loses what distinguishes data with these statistics: whether |μ|/σ is above 10⁴.

    A float32 is rounded to 2⁻²⁴ of its size, which at |μ| = 10⁴σ is 6·10⁻⁴σ.

    Args:
        inputs: the statistics of the training set, as `normalize_inputs` gave them.

    Returns:
        True where any feature that is not constant is so far from 0.

    Example:
        >>> import numpy as np
        >>> from jbn import BNStats
        >>> from jbn.export import needs_float64
        >>> clock = 1.7e9 + np.arange(60.0)  # seconds since 1970
        >>> needs_float64(BNStats(clock.mean(keepdims=True), clock.var(keepdims=True), np.float32([60])))
        True
    """
    mean, var = (np.asarray(values, np.float64) for values in inputs[:2])
    return bool(np.any((var > 0) & (np.square(mean) > _OFFSET**2 * var)))


def _as_spec(x: Any) -> jax.ShapeDtypeStruct:
    """x with an open leading size, unless it has open sizes already."""
    advice = "pass an example batch, or jax.ShapeDtypeStruct((1, 64), 'float32')"
    _checks.refuse_traced("x", x)
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"x: got {kind_of(x)}; expected an array, or its shape and dtype; {advice}.")
    shape, dtype = tuple(x.shape), jnp.dtype(x.dtype)
    if not shape:
        raise ValueError(f"x: got shape (); expected a batch along the leading axis; {advice}.")
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"x: got dtype {dtype}; expected numbers; {advice}.")
    if not any(map(export.is_symbolic_dim, shape)):
        shape = (*export.symbolic_shape("n"), *shape[1:])
    return jax.ShapeDtypeStruct(shape, dtype)


def _standardizer(inputs: Any, spec: jax.ShapeDtypeStruct) -> Callable[[jax.Array], jax.Array]:
    """(x−μ)/σ, where μ keeps the digits of float64 whatever the dtype of x; 0 for a constant feature."""
    if not isinstance(inputs, BNStats):
        raise TypeError(
            f"inputs: got {kind_of(inputs)}; expected BNStats; pass those that normalize_inputs gave for the "
            f"training set."
        )
    mean, var = (np.asarray(values, np.float64) for values in inputs[:2])
    if mean.shape != spec.shape[-1:] or var.shape != mean.shape:
        raise ValueError(
            f"inputs: got statistics of shape {mean.shape}; expected {spec.shape[-1:]}, that of the last axis of x; "
            f"pass those of these features."
        )
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise ValueError(
            "inputs: got a mean or variance that is not finite, or a variance below 0; expected those of data; "
            "compute them with normalize_inputs."
        )
    if not jnp.issubdtype(spec.dtype, jnp.floating) and not jnp.issubdtype(spec.dtype, jnp.integer):
        raise TypeError(f"x: got dtype {spec.dtype}; expected real numbers, to be standardized; convert them.")
    dtype = _checks.compute_dtype(spec.dtype)
    if dtype == jnp.float32 and needs_float64(inputs):
        worst = int(np.argmax(np.where(var > 0, np.abs(mean) / np.sqrt(np.where(var > 0, var, 1)), 0)))
        raise ValueError(
            f"x: got dtype {spec.dtype} for feature {worst} of mean {mean[worst]:.3g} and standard deviation "
            f"{np.sqrt(var[worst]):.3g}; expected float64, since float32 loses what distinguishes such values; "
            f"pass x as jax.ShapeDtypeStruct(shape, 'float64'), or subtract a constant from the data first."
        )
    scale = np.where(var > 0, 1 / np.sqrt(np.where(var > 0, var, 1)), 0).astype(dtype)
    high = mean.astype(dtype)
    low = (mean - high).astype(dtype)
    out = spec.dtype if jnp.issubdtype(spec.dtype, jnp.floating) else dtype

    def standardize(x: jax.Array) -> jax.Array:
        centred = x.astype(dtype)
        for values in (high, low):
            centred = centred - lax.expand_dims(jnp.asarray(values), range(x.ndim - 1))
        return (centred * lax.expand_dims(jnp.asarray(scale), range(x.ndim - 1))).astype(out)

    return standardize
