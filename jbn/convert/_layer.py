"""One batch norm out of the arrays that another framework stores for it, and back."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn import _checks_layer
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_count, as_jax, as_numpy, as_weights
from jbn.convert._formats import Entry

__all__ = ["SATURATED", "as_arrays", "as_layer", "one_count", "spread"]

SATURATED = np.int32(np.iinfo(np.int32).max)


def as_layer(
    gamma: Entry | None, beta: Entry | None, mean: Entry, var: Entry, *, counted: Any = None, count: Any = None
) -> tuple[BNParams, BNState]:
    """``(params, state)`` from the entries of one layer.

    ``counted`` is how many updates the format says there were, None where it does not say; ``count`` is what the
    caller says instead. γ and β keep their dtype; running statistics are float32, or float64 where they are stored so.
    """
    moments = [as_weights(*entry) for entry in (mean, var)]
    shape = moments[0].shape
    learned = [None if entry is None else as_weights(*entry) for entry in (gamma, beta)]
    for entry, array in zip((var, gamma, beta), (moments[1], *learned), strict=True):
        if entry is not None and array is not None and array.shape != shape:
            raise ValueError(
                f"{entry.label}: got shape {array.shape}; expected {shape}, that of {mean.label}; "
                f"pass the arrays of one layer."
            )
    if not shape:
        raise ValueError(f"{mean.label}: got a single number; expected (C,), a value for each channel; pass an array.")
    if np.any(moments[1] < 0):
        raise ValueError(
            f"{var.label}: got {float(moments[1].min()):g}; expected variances of 0 or more; look for damage to the "
            f"file, or for arrays that changed places."
        )
    wide = max((array.dtype for array in moments), key=lambda dtype: dtype.itemsize)
    wide = np.dtype(np.float64 if wide == np.float64 else np.float32)
    widest = next((e.label for e, a in zip((mean, var), moments, strict=True) if a.dtype == wide), mean.label)
    running_mean, running_var = (as_jax(widest, array.astype(wide)) for array in moments)
    params = BNParams(
        *(None if a is None or e is None else as_jax(e.label, a) for e, a in zip((gamma, beta), learned, strict=True))
    )
    if count is not None:
        counted = as_count("count", count)
        if counted.shape not in ((), shape):
            raise ValueError(f"count: got shape {counted.shape}; expected one number, or {shape}; pass count=0.")
    counts = np.broadcast_to(SATURATED if counted is None else counted, shape)
    return params, BNState(running_mean, running_var, jnp.array(counts))


def as_arrays(params: Any, state: Any, dtype: Any = None) -> tuple[Any, Any, np.ndarray, np.ndarray, np.ndarray]:
    """γ, β, mean, var and count as NumPy arrays that can be written to; floats in ``dtype`` unless that is None."""
    params, state = _checks_layer.as_layer(params, state)
    named = {f"params.{k}": v for k, v in params._asdict().items()} | {
        f"state.{k}": v for k, v in state._asdict().items() if k != "count"
    }
    floats = [None if v is None else np.array(as_numpy(k, v), dtype) for k, v in named.items()]
    return (*floats, as_count("state.count", state.count))  # type: ignore[return-value]


def one_count(count: np.ndarray, stacked: int) -> np.ndarray:
    """One number for the channels of a layer, of ``stacked`` leading axes of layers: the largest among them."""
    return count.max(axis=tuple(range(stacked, count.ndim)), initial=0)


def spread(label: str, count: Any, like: np.ndarray) -> np.ndarray:
    """One number for the channels of a layer, for each of them: shaped to stand beside an array like ``like``."""
    counted = as_count(label, count)
    if counted.shape != like.shape[: counted.ndim] or counted.ndim >= like.ndim:
        raise ValueError(
            f"{label}: got shape {counted.shape}; expected (), one number for a layer of shape {like.shape}; "
            f"pass the arrays of one layer."
        )
    return counted.reshape(counted.shape + (1,) * (like.ndim - counted.ndim))
