"""Parse, don't validate: the grammar of arguments, which knows nothing of batch norm.

``as_…`` takes what was passed and returns its canonical form, or raises; ``check_…`` and ``refuse_…`` only
raise. Every message is one line: ``<argument>: got …; expected …; <what to do>.`` Only static facts are
checked; what depends on data (a NaN, an empty mask) is defined behaviour, not an error.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "as_array",
    "as_data",
    "as_flag",
    "as_float_dtype",
    "as_function",
    "as_int",
    "as_ints",
    "as_scalar",
    "as_size",
    "as_tuple",
    "check_array",
    "compute_dtype",
    "is_array",
    "kind_of",
    "refuse_traced",
]

# Floats that hold numbers for others to compute with. JAX calls them floating point, but XLA compiles none of 6 bits,
# and e8m0 is a scale, a power of two: without a sign and a zero, what is normalized would be NaN.
_STORED_ONLY = frozenset({"float6_e2m3fn", "float6_e3m2fn", "float8_e8m0fnu"})


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for every narrower float."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_array(value: Any) -> bool:
    """Whether it has a shape and a dtype that JAX knows."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic)) or hasattr(value, "__jax_array__")


def kind_of(value: Any) -> str:
    """How a value is named in an error: its type, and for an array its shape."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"array of shape {tuple(value.shape)}"
    return type(value).__name__


def refuse_traced(name: str, value: Any) -> None:
    """A traced value where a Python one is needed is an error that says how to make it static."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: got a traced value; expected a Python value, known when the function is traced; "
            f"name it in static_argnames of jax.jit, or bind it with functools.partial."
        )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One thing as a tuple of one; a tuple or list of them as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def as_ints(name: str, given: Any, wanted: str, members: Any = None) -> tuple[int, ...]:
    """Ints that are known when the function is traced; a bool is none.

    ``wanted`` ends the message: "expected …; <what to do>." ``members`` are what is parsed, where that is not
    what was given.
    """
    refuse_traced(name, given)
    try:
        members = tuple(given if members is None else members)
    except TypeError:
        members = (None,)
    ints = [_index(name, member) for member in members]
    if None in ints:
        raise TypeError(f"{name}: got {given!r}; {wanted}")
    return tuple(ints)  # type: ignore[arg-type]


def _index(name: str, value: Any) -> int | None:
    refuse_traced(name, value)
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_int(name: str, value: Any, wanted: str) -> int:
    """One int, as in `as_ints`."""
    return as_ints(name, value, wanted, (value,))[0]


def as_size(name: str, value: Any, advice: str) -> int:
    """An int of at least 1."""
    size = as_int(name, value, f"expected an int; {advice}.")
    if size < 1:
        raise ValueError(f"{name}: got {size}; expected at least 1; {advice}.")
    return size


def as_flag(name: str, value: Any) -> bool:
    """A bool that is known when the function is traced."""
    refuse_traced(name, value)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; expected a bool; pass {name}=True or {name}=False.")
    return value


def as_scalar(name: str, value: Any, valid: Callable[[float], bool], wanted: str, label: str = "") -> Any:
    """One real number, a Python one or an array of shape (), and a ``valid`` one unless it is traced."""
    numeric = isinstance(value, (int, float)) or is_array(value)
    kinds = (jnp.floating, jnp.integer)
    if not numeric or jnp.shape(value) or not any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds):
        shown = f"shape {jnp.shape(value)}" if numeric and jnp.shape(value) else repr(value)
        raise TypeError(f"{name}: got {shown}; expected one real number; pass a scalar.")
    if not isinstance(value, jax.core.Tracer) and not valid(float(value)):
        raise ValueError(f"{name}: got {label}{value}; {wanted}")
    return value


def as_array(name: str, x: Any) -> jax.Array:
    """A real floating-point array, of rank 1 or more."""
    return _as_floats(name, _as_numbers(name, x))


def check_array(name: str, value: Any, or_number: bool) -> None:
    """An array as it is, and not what could be made one; a Python number where that is as good."""
    if not (is_array(value) or (or_number and isinstance(value, (int, float)))):
        raise TypeError(f"{name}: got {kind_of(value)}; expected an array; convert it with jnp.asarray.")


def as_data(name: str, x: Any) -> jax.Array:
    """A real array, of integers and booleans too; they are converted where they are read."""
    x = _as_numbers(name, x)
    exact = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_
    return x if exact and x.ndim else _as_floats(name, x.astype(jnp.float32) if exact else x)


def _as_numbers(name: str, x: Any) -> jax.Array:
    if not _is_numbers(x):
        raise TypeError(f"{name}: got {kind_of(x)}; expected a real floating-point array; pass the data.")
    stored = str(getattr(x, "dtype", ""))
    if stored in _STORED_ONLY:
        raise TypeError(
            f"{name}: got dtype {stored}, a storage format; expected a real floating-point array; "
            f"convert it with {name}.astype(jnp.float32)."
        )
    return jnp.asarray(x)


def _is_numbers(x: Any) -> bool:
    """Whether ``x`` is an array, a number, or nested lists of them."""
    if isinstance(x, (list, tuple)):
        return not hasattr(x, "_fields") and all(map(_is_numbers, x))  # a NamedTuple is something else
    return isinstance(x, (int, float, complex)) or is_array(x)


def _as_floats(name: str, x: jax.Array) -> jax.Array:
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


def as_float_dtype(dtype: Any) -> Any:
    """A real floating-point dtype that can be computed with."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: got {dtype!r}; expected a floating-point dtype; pass jnp.float32.") from None
    stored = parsed.name in _STORED_ONLY
    if stored or not jnp.issubdtype(parsed, jnp.floating):
        shown = f"{parsed}, a storage format" if stored else parsed
        raise TypeError(f"dtype: got {shown}; expected a floating-point dtype; pass jnp.float32.")
    return parsed


def as_function(name: str, function: Any) -> Callable[..., Any]:
    """Something to call."""
    if not callable(function):
        named = isinstance(function, str)
        got, instead = (repr(function), "its name") if named else (kind_of(function), "what it returns")
        raise TypeError(f"{name}: got {got}; expected a function; pass it, not {instead}.")
    return function
