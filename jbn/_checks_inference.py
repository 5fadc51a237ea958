"""What can be wrong about folding and calibration: parse, don't validate, as in ``_checks``."""

from collections.abc import Iterator
from typing import Any

import jax

from jbn._checks import as_array, as_int, kind_of
from jbn._pytrees import BNState, BNStats

__all__ = [
    "as_bias",
    "as_iterator",
    "as_kernel_axis",
    "as_returned_stats",
    "check_states",
    "check_usable",
]


def as_kernel_axis(kernel_axis: Any, shape: tuple[int, ...], channels: tuple[int, ...]) -> int:
    """The axis of a kernel's output features, which are the channels of one batch norm."""
    axis = as_int("kernel_axis", kernel_axis, "expected an int; pass -1 for kernels (…, in, out), 0 for OIHW.")
    if len(channels) != 1:
        raise ValueError(
            f"state.mean: got shape {channels}; expected one axis, the output features of one kernel; "
            f"fold layers that are stacked with jax.vmap."
        )
    ndim = len(shape)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"kernel_axis: got {axis}; expected {-ndim} ≤ kernel_axis < {ndim} for a kernel of rank {ndim}; "
            f"name the axis of the output features."
        )
    if shape[axis] != channels[0]:
        raise ValueError(
            f"kernel: got size {shape[axis]} along kernel_axis {axis} of shape {shape}; expected {channels[0]}, the "
            f"size of state.mean; name the axis of the output features, -1 for kernels (…, in, out), 0 for OIHW."
        )
    return axis % ndim


def as_bias(bias: Any, channels: tuple[int, ...]) -> jax.Array:
    """A floating-point bias with one value a channel."""
    bias = as_array("bias", bias)
    if bias.shape != channels:
        raise ValueError(
            f"bias: got shape {bias.shape}; expected {channels}, that of state.mean; pass one value for each output "
            f"feature, or None."
        )
    return bias


def as_iterator(name: str, values: Any) -> Iterator[Any]:
    """An iterator over any iterable."""
    try:
        return iter(values)
    except TypeError:
        raise TypeError(
            f"{name}: got {kind_of(values)}; expected an iterable; pass a list, a generator or a data loader."
        ) from None


def as_returned_stats(returned: Any) -> Any:
    """The second of the pair that a network returned, as concrete arrays."""
    if not isinstance(returned, tuple) or isinstance(returned, BNStats) or len(returned) != 2:
        raise TypeError(
            f"apply_fn: got a function that returns {kind_of(returned)}; expected one that returns a pair "
            f"(anything, stats); return what the network's apply returns in training."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(returned[1])):
        raise TypeError(
            "apply_fn: got a function that returns traced stats; expected arrays; call bn_calibrate outside "
            "jax.jit and other transformations, since it reads batches on the host."
        )
    return returned[1]


def check_states(states: list[BNState]) -> None:
    """Without any batch norm there is nothing to calibrate."""
    if not states:
        raise ValueError(
            "state: got no BNState in it; expected at least one; pass that of a network with batch norm, "
            "any other has nothing to calibrate."
        )


def check_usable(seen: int, usable: bool) -> None:
    """Statistics of nothing are an error, so that the old ones are not taken for new."""
    if not seen:
        raise ValueError(
            "batches: got an empty iterable; expected at least one batch; make it anew if it is a generator, "
            "which can be read only once."
        )
    if not usable:
        raise ValueError(
            f"batches: got {seen} without usable statistics, count 0 or not finite in all channels; expected one or "
            f"more with; call the network with train=True in apply_fn, and look for NaN in data and weights."
        )
