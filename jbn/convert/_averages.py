"""Averages that start at 0 and are corrected when they are read, as Haiku and Equinox store them: hidden and t."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn._checks_layer import as_momentum
from jbn._doors import reading
from jbn.convert._layer import SATURATED

__all__ = ["counted", "counter_of", "hidden_of", "read_of"]

# A saturated count is written as this: dᵗ is 0 for every d < 1, and there is room for as many updates again. Both
# frameworks add to it without a check, and an int32 that wraps would make 1−dᵗ infinite.
_MANY = np.int32(2**30)


def counter_of(count: np.ndarray) -> np.ndarray:
    """t as it is written."""
    return np.where(count >= _MANY, _MANY, count).astype(np.int32)


def counted(counter: np.ndarray) -> np.ndarray:
    """t as it was meant: what `counter_of` writes for a saturated count is one again."""
    return np.where(counter >= _MANY, SATURATED, counter)


def read_of(hidden: np.ndarray, counter: np.ndarray, momentum: Any) -> np.ndarray:
    """hidden/(1−dᵗ), as the framework computes it; hidden where t is 0."""
    if not _corrected(counter):
        return hidden
    return np.asarray(reading(jnp.asarray(hidden), jnp.asarray(counter), _known(momentum))).astype(hidden.dtype)


def hidden_of(average: np.ndarray, counter: np.ndarray, momentum: Any) -> np.ndarray:
    """The hidden average of which ``average`` is read: average·(1−dᵗ), and of its neighbours one that reads best."""
    if not _corrected(counter):
        return average
    ones = np.ones(average.shape, np.promote_types(average.dtype, np.float32))
    share = 1 / read_of(ones, counter, momentum).astype(np.float64)  # as rounded as the framework's own 1−dᵗ is
    hidden = (average.astype(np.float64) * share).astype(average.dtype)
    if average.dtype.itemsize < 4:
        return hidden
    for towards in (-np.inf, np.inf):
        other = np.nextafter(hidden, average.dtype.type(towards))
        errors = [np.abs(read_of(h, counter, momentum) - average) for h in (hidden, other)]
        hidden = np.where(errors[1] < errors[0], other, hidden)
    return hidden


def _corrected(counter: np.ndarray) -> bool:
    """Whether there is a t at which dᵗ is neither 1 nor 0 for certain."""
    return bool(np.any((counter > 0) & (counter < _MANY)))


def _known(momentum: Any) -> Any:
    if momentum is None:
        raise ValueError(
            "momentum: got None; expected the share that the layer keeps, since its averages are stored before they "
            "are divided by 1 - momentum**t; pass the number that it was made with."
        )
    if not as_momentum(momentum) < 1:
        raise ValueError(f"momentum: got {momentum}; expected less than 1; pass the share that the layer keeps.")
    return momentum
