"""Fields of the three pytrees that are no arrays: one line with the field's path, wherever a layer is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusals import assert_refused, refusals

from jbn import (
    BNParams,
    BNState,
    BNStats,
    bn_affine,
    bn_apply,
    bn_calibrate,
    bn_fold,
    bn_init,
    bn_merge_stats,
    bn_update_stats,
    normalize_inputs,
)
from jbn.report import summary

C = 2
PARAMS, STATE = bn_init(C)
STATS = BNStats(jnp.ones(C), jnp.ones(C), jnp.full(C, 4.0))
X = jnp.array([[1.0, 2.0], [3.0, 5.0]])
LISTED = BNState([0.0, 0.0], [1.0, 1.0], [0, 0])
DO = "expected an array; convert it with jnp.asarray."


def calibrate(state, stats):
    return bn_calibrate(lambda *args: (None, stats), None, state, [None])


@refusals(
    [
        (lambda: bn_apply(PARAMS, LISTED, X, train=True), TypeError, f"state.mean: got list; {DO}"),
        (
            lambda: bn_apply(PARAMS, STATE._replace(count=[0, 0]), X, train=False),
            TypeError,
            f"state.count: got list; {DO}",
        ),
        (
            lambda: bn_apply(BNParams([1.0, 1.0], None), None, X, train=True),
            TypeError,
            f"params.gamma: got list; {DO}",
        ),
        (
            lambda: bn_apply(BNParams(None, (1.0, 1.0)), STATE, X, train=False),
            TypeError,
            f"params.beta: got tuple; {DO}",
        ),
        (
            lambda: bn_apply(PARAMS, BNState([[0], [0, 1]], [1.0], [0]), X, train=True),
            TypeError,
            f"state.mean: got list; {DO}",
        ),
        (
            lambda: bn_apply(PARAMS, STATE._replace(mean=None), X, train=False),
            TypeError,
            f"state.mean: got NoneType; {DO}",
        ),
        (lambda: bn_update_stats(LISTED, STATS), TypeError, f"state.mean: got list; {DO}"),
        (
            lambda: bn_update_stats(STATE, STATS._replace(var=[1.0, 1.0])),
            TypeError,
            f"stats.var: got list; {DO}",
        ),
        (
            lambda: bn_update_stats({"a": [STATE, LISTED]}, {"a": [STATS, STATS]}),
            TypeError,
            f"state['a'][1].mean: got list; {DO}",
        ),
        (
            lambda: bn_update_stats(BNState(0.0, 1.0, 0), BNStats(0.0, 1.0, 2.0)),
            TypeError,
            f"state.mean: got float; {DO}",
        ),
        (
            lambda: bn_update_stats(jax.tree.map(lambda leaf: leaf[0], STATE), BNStats(0.0, 1.0, 2.0)),
            TypeError,
            f"stats.mean: got float; {DO}",
        ),
        (lambda: bn_affine(PARAMS, LISTED), TypeError, f"state.mean: got list; {DO}"),
        (lambda: bn_affine(BNParams([1.0, 1.0], None), STATE), TypeError, f"params.gamma: got list; {DO}"),
        (lambda: bn_fold(PARAMS, STATE._replace(var=[1.0, 1.0]), X), TypeError, f"state.var: got list; {DO}"),
        (
            lambda: normalize_inputs(X, BNStats([0.0, 0.0], [1.0, 1.0], [2.0, 2.0])),
            TypeError,
            f"stats.mean: got list; {DO}",
        ),
        (lambda: calibrate(LISTED, STATS), TypeError, f"state.mean: got list; {DO}"),
        (lambda: calibrate([STATE], [STATS._replace(mean="12")]), TypeError, f"stats[0].mean: got str; {DO}"),
        (lambda: bn_merge_stats(STATS, STATS._replace(mean=[1.0, 1.0])), TypeError, f"stats.mean: got list; {DO}"),
        (lambda: bn_merge_stats({"a": BNStats([1.0], [0.0], [3.0])}), TypeError, f"stats['a'].mean: got list; {DO}"),
        (lambda: summary(PARAMS, LISTED, STATS), TypeError, f"state.mean: got list; {DO}"),
    ]
)
def test_a_field_that_is_no_array_is_named(call, error, text):
    assert_refused(call, error, text)
    with pytest.raises(error) as caught:  # and when traced, wherever that is allowed
        jax.eval_shape(call)
    assert str(caught.value) == text


def test_fields_of_numpy_and_numbers_of_numpy_are_arrays():
    as_numpy = jax.tree.map(np.asarray, (PARAMS, STATE))
    for got, want in zip(
        jax.tree.leaves(bn_apply(*as_numpy, X, train=True)),
        jax.tree.leaves(bn_apply(PARAMS, STATE, X, train=True)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    one = BNState(np.float32(0), np.float32(1), np.int32(0))
    assert bn_update_stats(one, BNStats(*map(np.float32, (2, 3, 1)))).mean == 2
