"""The one place that knows how close is close: every tolerance is a number of roundings of a dtype.

Bounds that the design states as such (1e-5 for a variance, 1e-4 for a gradient) are asserted where they are stated,
with :func:`relative_error`.
"""

import jax
import ml_dtypes
import numpy as np

# For what a network computes in one step or several, a chain of operations each of which rounds.
CHAIN = 256


def eps_of(dtype):
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps)


def assert_close(got, want, *, roundings=16, computed_in=None):
    """The tree ``got`` is ``want``, computed with so many roundings and then rounded once to its own dtype.

    An entry is made of sums and differences of numbers as large as the largest of its array, so that a rounding
    is relative to that. An array of ``want`` that JAX computed itself carries roundings of numbers of size 1 as
    well, and ``got`` has to be of its dtype; a NumPy array, or a number, is exact. What is not finite is at the
    same places, and the same. ``computed_in`` is float32 for narrower dtypes unless told.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.shape(a) == np.shape(b)
        if isinstance(b, jax.Array):
            assert np.asarray(a).dtype == b.dtype
        _assert_array_close(np.asarray(a), np.asarray(b), isinstance(b, jax.Array), roundings, computed_in)


def _assert_array_close(got, want, rounded, roundings, computed_in):
    if got.dtype.kind in "biu":
        np.testing.assert_array_equal(got, want)
        return
    own = eps_of(got.dtype)
    rounding = min(own, eps_of(np.float32)) if computed_in is None else eps_of(computed_in)
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.where(finite, 0, want), np.where(np.isfinite(got), 0, got))
    largest = np.max(np.abs(want[finite]), initial=1 if rounded else 0)
    allowed = own * np.abs(want[finite]) + roundings * rounding * largest
    error = np.abs(got[finite] - want[finite])
    worst = np.max(error - allowed, initial=-np.inf)
    assert worst <= 0, (
        f"off by {np.max(error):.3g}, {np.max(error) / rounding / largest:.3g} roundings, where {roundings} are allowed"
    )


def relative_error(actual, desired):
    """The worst channel's; 0/0 counts as 0."""
    actual, desired = (np.asarray(v).astype(np.float64) for v in (actual, desired))
    error = np.abs(actual - desired)
    return float(np.max(np.where(error == 0, 0, error / np.maximum(np.abs(desired), np.finfo(float).tiny))))


def bits(tree):
    """Comparable bit for bit, NaNs and signed zeros included."""
    array = np.asarray(tree)
    return array.dtype.name, array.shape, array.tobytes()


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert list(map(bits, jax.tree.leaves(got))) == list(map(bits, jax.tree.leaves(want)))
