"""The cases that each transformation has to survive, and what a layer computes of them."""

import jax
import jax.numpy as jnp
import pytest
from support.nightly import by_day
from support.problems import pose

from jbn import bn_apply, bn_update_stats

N, C = 6, 3
CASES = (
    "plain",
    "masked",
    "empty mask",
    "mask differing between channels",
    "nan",
    "offset",
    "bf16",
    "one example",
)
ALL = [(c, t) for c in CASES for t in (True, False) if not (t and c == "one example")]
# Each case once, and both modes.
HALF = [(c, i % 2 == 0) for i, c in enumerate(CASES)]


def hostile(combinations):
    """Runs a test of ``case`` and ``train`` on these."""
    ids = lambda v: v if isinstance(v, str) else "train" if v else "eval"  # noqa: E731
    return pytest.mark.parametrize(("case", "train"), combinations, ids=ids)


HOSTILE = hostile(ALL)
BY_DAY_HALF = hostile(by_day(ALL, HALF))


def problem(case="plain", members=()):
    """(params, state, x, mask); each leaf with the leading axes ``members``."""
    posed = pose(
        (1 if case == "one example" else N, C),
        dtype="bfloat16" if case == "bf16" else "float32",
        offset=1e3 if case == "offset" else 0.0,
        mask={"masked": (N, 1), "mask differing between channels": (N, C)}.get(case),
        members=members,
    )
    params, state, x, mask, _ = posed
    state = state._replace(count=state.count - 1)  # some channels are at the start
    if case == "nan":
        x = x.at[..., 0, 1].set(jnp.nan)
    if case == "empty mask":
        mask = jnp.zeros((*members, N, 1), bool)
    return params, state, x, mask


def step(params, state, x, mask=None, *, train, **options):
    """Everything that a layer computes: (y, stats, new state)."""
    y, stats = bn_apply(params, state, x, train=train, mask=mask, **options)
    return y, stats, bn_update_stats(state, stats)


def loss(params, x, state, mask=None, *, train):
    y, stats, _ = step(params, state, x, mask, train=train)
    shown = True if mask is None else mask
    y = jnp.sum(jnp.where(shown, jnp.sin(y.astype(jnp.float32)), 0))
    return y + jnp.sum(jnp.cos(stats.mean) + jnp.sqrt(stats.var + 1))


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)
