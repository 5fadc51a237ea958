"""What is bound to the batch norm of a network and what folding makes of it: read, known to do nothing, or refused."""

import inspect
from functools import partial

import jax
import numpy as np
import pytest

from jbn import BNState, bn_apply
from jbn.networks import fold, mlp, resnet

small = partial(mlp, (4, 6, 3))
images = partial(resnet, 3, in_channels=2, widths=(4,), blocks=1)


def started(make):
    """Params and a state that is not the start."""
    params, state = make().init(jax.random.key(0))
    moved = jax.tree.map(
        lambda node: BNState(node.mean + 0.5, node.var * 3, node.count + 1),
        state,
        is_leaf=lambda node: isinstance(node, BNState),
    )
    return params, moved


@pytest.mark.parametrize(
    "options",
    [
        {"ghost_size": 4},
        {"renorm": (3.0, 5.0)},
        {"axis_name": "data", "axis_index_groups": ((0, 1),)},
        {"mask": None, "train": True},
        {"axis": -1},
        {"axis": (1,)},
        {"axis": 1, "eps": 0.3},
    ],
    ids=str,
)
def test_options_that_do_nothing_in_evaluation_do_nothing_to_a_folded_network(options):
    make = partial(small, bn=partial(bn_apply, **options))
    params, state = started(make)
    folded, folded_params = fold(make, params, state)
    plain = partial(small, bn=partial(bn_apply, eps=options.get("eps", 1e-5)))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    want, _ = plain().apply(params, state, x, train=False)
    got, _ = folded.apply(folded_params, None, x, train=False)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_axis_of_images_is_their_last_of_four():
    make = partial(images, bn=partial(bn_apply, axis=3))
    params, state = started(make)
    folded, folded_params = fold(make, params, state)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
    want, _ = make().apply(params, state, x, train=False)
    got, _ = folded.apply(folded_params, None, x, train=False)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


KNOWN = "expected eps, axis, train, axis_name, mask, axis_index_groups, ghost_size, renorm"
YOURSELF = "fold a norm that does more in evaluation yourself, with bn_fold."
AXIS = "expected axis=-1, that of the network's features; leave it out."


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (small, {"momentum": 0.9}, ValueError, f"bn: got keyword momentum; {KNOWN}; {YOURSELF}"),
        (small, {"eps": 0.1, "epsilon": 0.1}, ValueError, f"bn: got keyword epsilon; {KNOWN}; {YOURSELF}"),
        (small, {"axis": 0}, ValueError, f"bn: got axis=0; {AXIS}"),
        (small, {"axis": (0, 1)}, ValueError, f"bn: got axis=(0, 1); {AXIS}"),
        (images, {"axis": 1}, ValueError, f"bn: got axis=1; {AXIS}"),
        (
            small,
            {"axis": 3},
            ValueError,
            "axis: got 3; expected -2 ≤ axis < 2 for x of rank 2; name feature axes that x has.",
        ),
        (
            small,
            {"axis": "C"},
            TypeError,
            "axis: got 'C'; expected an int or a tuple of ints; name the feature axes, as in axis=-1.",
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_an_option_that_would_be_lost_is_refused(make, options, error, text):
    params, state = started(make)
    with pytest.raises(error) as caught:
        fold(partial(make, bn=partial(bn_apply, **options)), params, state)
    assert str(caught.value) == text


def test_every_option_of_bn_apply_has_been_judged():
    """A new one is refused until someone has said in ``fold`` what it does in evaluation."""
    options = {name for name, p in inspect.signature(bn_apply).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(KNOWN.removeprefix("expected ").split(", ")) == options
