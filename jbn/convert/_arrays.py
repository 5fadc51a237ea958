"""Arrays of any framework as NumPy arrays, and what can be wrong about them: refused in one line that names the key.

No framework is imported for it. What is not an array of NumPy or JAX is known by what it can do: a tensor of PyTorch
has ``detach``, a boxed parameter of Flax linen ``unbox``, and all others have the array protocol.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn._checks import as_float_dtype

__all__ = ["as_count", "as_jax", "as_numpy", "as_weights", "shape_of"]

_MOST = np.iinfo(np.int32).max


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array, or of what only describes one (`jax.ShapeDtypeStruct`); None of anything else."""
    shape = getattr(_unboxed(value), "shape", None)
    try:
        return None if shape is None else tuple(int(n) for n in shape)
    except TypeError:
        return None


def as_numpy(label: str, value: Any) -> np.ndarray:
    """The array as NumPy has it, in its own dtype and the byte order of this machine."""
    value = _unboxed(value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{label}: got a traced value; expected an array with its values; convert before jax.jit and outside of it."
        )
    kind = f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
    if getattr(value, "shape", None) is None or isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{label}: got {kind}; expected an array; pass the values themselves.")
    try:
        array = _from_torch(value) if hasattr(value, "detach") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise TypeError(
            f"{label}: got {kind}, which gives no NumPy array ({reason}); expected numbers in memory; "
            f"copy it to the CPU, or leave it out."
        ) from error
    if array.dtype == object:
        raise TypeError(f"{label}: got {kind} of objects; expected an array of numbers; pass the values themselves.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _unboxed(value: Any) -> Any:
    """Without the box in which Flax linen notes how a parameter is partitioned."""
    return value.unbox() if callable(getattr(value, "unbox", None)) else value


def _from_torch(tensor: Any) -> np.ndarray:
    """A tensor, wherever it lies and whether or not it wants gradients."""
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    return tensor.float().numpy().astype(jnp.bfloat16)  # NumPy has no such dtype; wider and back it is exact


def as_weights(label: str, value: Any) -> np.ndarray:
    """An array of real floating-point numbers, all of them finite."""
    array = as_numpy(label, value)
    try:
        as_float_dtype(array.dtype)
    except TypeError:
        raise TypeError(
            f"{label}: got dtype {array.dtype}; expected real floating-point numbers; "
            f"look whether this is the array you mean."
        ) from None
    bad = int(np.sum(~np.isfinite(array.astype(np.float64))))
    if bad:
        raise ValueError(
            f"{label}: got {bad} of {array.size} values that are NaN or infinite; expected finite numbers; "
            f"take a checkpoint from before the training diverged, or look for damage to the file."
        )
    return array


def as_count(label: str, value: Any) -> np.ndarray:
    """How many updates there were, as int32 and saturated."""
    plain = isinstance(value, (int, list, tuple)) and not isinstance(value, bool)
    array = np.asarray(value) if plain else as_numpy(label, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{label}: got dtype {array.dtype}; expected integers; pass how many updates there were.")
    if np.any(array < 0):
        raise ValueError(f"{label}: got {array.min()}; expected 0 or more; pass how many updates there were.")
    return np.minimum(array, _MOST).astype(np.int32)


def as_jax(label: str, array: np.ndarray) -> jax.Array:
    """A JAX array of the same dtype, on its own memory."""
    if array.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{label}: got dtype float64, which JAX would round to float32; expected float32, or 64 bit enabled; "
            f"set jax_enable_x64, or round it yourself with astype."
        )
    return jnp.array(array)
