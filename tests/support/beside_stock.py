"""How what a door computes is compared with what the framework's own layer does."""

import jax
import numpy as np


def assert_same(got, expected, tolerance=2e-6):
    """One structure, dtypes and shapes; values to ``tolerance`` of the largest in each leaf."""
    got, structure = jax.tree.flatten(got)
    expected, expected_structure = jax.tree.flatten(expected)
    assert str(structure) == str(expected_structure)
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_near(a, b, tolerance)


def assert_near(got, expected, tolerance):
    """Values alone, to ``tolerance`` of the largest, or of 0.1: what is smaller is a difference of larger ones."""
    kind = np.complex128 if np.iscomplexobj(got) else np.float64
    got, expected = np.asarray(got).astype(kind), np.asarray(expected).astype(kind)
    largest = np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(largest, 0.1))


def outline(signature):
    """Names, kinds and defaults of the parameters; annotations are each library's own."""
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def bits(tree):
    """Comparable bit for bit."""
    return [(np.asarray(leaf).dtype.name, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]
