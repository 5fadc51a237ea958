"""What the tests of the Flax doors share: cases that touch every pair of their parts, and closeness by dtype."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (6, 3, 4)

PARTS = {
    "x_dtype": ("float32", "bfloat16", "float16", "int32"),
    "dtype": (None, "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "axis": (-1, 1, (1, 2)),
    "mask": (None, "whole", "rows", "lower rank", "numbers"),
    "learned": ((True, True), (True, False), (False, True), (False, False)),
    "train": (True, False),
}


class Case(NamedTuple):
    x_dtype: str
    dtype: str | None
    param_dtype: str
    axis: int | tuple[int, ...]
    mask: str | None
    learned: tuple[bool, bool]  # whether there is a scale, a bias
    train: bool

    @property
    def features(self) -> tuple[int, ...]:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis % len(SHAPE),)
        return tuple(SHAPE[a] for a in axes)

    @property
    def arguments(self) -> dict[str, Any]:
        """What both of Flax's constructors take."""
        return {
            "use_running_average": not self.train,
            "axis": self.axis,
            "momentum": 0.9,
            "dtype": None if self.dtype is None else jnp.dtype(self.dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
            "use_scale": self.learned[0],
            "use_bias": self.learned[1],
            "use_fast_variance": False,
        }

    def data(self) -> tuple[jax.Array, jax.Array | None]:
        """x and a mask that leaves every channel some values."""
        x = 3 * jax.random.normal(jax.random.key(0), SHAPE) + 1
        shown = jax.random.bernoulli(jax.random.key(1), 0.6, SHAPE).at[:2].set(True)
        rows = jnp.array([True, True, False, True, True, False])[:, None, None]
        # Whole channels are never hidden: along a feature axis this one has size 1.
        lower = jnp.arange(SHAPE[1])[:, None] != 1 if self.axis == -1 else jnp.ones((1, 1), bool)
        masks = {"whole": shown, "rows": rows, "lower rank": lower, "numbers": shown.astype(jnp.float32)}
        return x.astype(self.x_dtype), masks.get(self.mask)

    def filled(self, tree: Any) -> Any:
        """Parameters and statistics of another value in each place, positive, in their dtypes."""
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        leaves = [
            jax.random.uniform(key, v.shape, minval=0.5, maxval=2).astype(v.dtype)
            for key, v in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)


def cases(**instead: Any) -> list[Case]:
    """Cases of which some one has each pair of values of two parts; ``instead`` replaces parts."""
    parts = {**PARTS, **instead}
    everything = [Case(*values) for values in itertools.product(*parts.values())]
    order = np.random.default_rng(0).permutation(len(everything))
    pairs = {everything[i]: set(itertools.combinations(enumerate(map(str, everything[i])), 2)) for i in order}
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(pairs, key=lambda case: len(pairs[case] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def assert_close(actual: Any, expected: Any, *, narrow: bool = False, tolerance: float = 3e-5) -> None:
    """The same structure, shapes and dtypes; values to the rounding of the dtype, or of a narrow one on the way."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        allowed = 0.05 if narrow or ours.dtype.itemsize < 4 else tolerance
        ours, theirs = (np.asarray(v, np.float64) for v in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=allowed, atol=allowed * max(1, np.abs(theirs).max(initial=0)))
