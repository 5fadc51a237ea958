"""What is no residual network of torchvision's, or none that it could hold: refused in one line that names the key."""

import jax
import numpy as np
import pytest

from jbn.convert import from_torchvision, to_torchvision
from jbn.networks import resnet

make = lambda **options: resnet(3, widths=(2, 3), blocks=(1, 2), stem="imagenet", **options)  # noqa: E731


def state_dict(block="bottleneck"):
    return to_torchvision(*make(block=block).init(jax.random.key(0)))


def assert_refused(call, error, start):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(start), text
    assert text.count("\n") == 0
    assert text.count("; ") == 2
    assert text.endswith(".")


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_every_missing_key_is_named(block):
    whole = state_dict(block)
    optional = [name for name in whole if "num_batches_tracked" in name]
    for name in whole:
        rest = {key: array for key, array in whole.items() if key != name}
        if name in optional:
            from_torchvision(rest)
        else:
            assert_refused(lambda: from_torchvision(rest), ValueError, f"state_dict: got no {name}; ")  # noqa: B023


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_every_wrong_shape_is_named(block):
    whole = state_dict(block)
    for name, array in whole.items():
        wrong = {**whole, name: np.zeros((*array.shape, 2), array.dtype)}
        assert_refused(lambda: from_torchvision(wrong), ValueError, f"state_dict[{name!r}]: got shape ")  # noqa: B023


@pytest.mark.parametrize(
    "name", ["fc2.weight", "layer1.0.conv4.weight", "layer3.0.bn1.weight", "layer2.2.conv1.weight"]
)
def test_an_extra_key_is_named_or_what_it_would_need(name):
    more = {**state_dict(), name: np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"^state_dict.*(fc2\.weight|layer1\.0\.conv4|layer3\.0\.|layer2\.2\.)"):
        from_torchvision(more)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(wrong):
    whole = state_dict()
    for name in ("layer1.0.conv2.weight", "fc.bias", "bn1.running_var"):
        bad = {**whole, name: np.full_like(whole[name], wrong)}
        assert_refused(lambda: from_torchvision(bad), ValueError, f"state_dict[{name!r}]: got ")  # noqa: B023


def test_what_is_no_floating_point_array_or_no_variance_is_refused():
    whole = state_dict()
    conv, var = "layer2.1.conv3.weight", "layer2.1.bn3.running_var"
    for change, error in (
        ({conv: whole[conv].astype(np.int32)}, TypeError),
        ({var: -whole[var]}, ValueError),
    ):
        (name,) = change
        assert_refused(lambda: from_torchvision(whole | change), error, f"state_dict[{name!r}]: got ")  # noqa: B023
    assert_refused(lambda: from_torchvision([1]), TypeError, "state_dict: got list; expected a mapping")
    assert_refused(lambda: from_torchvision({}), ValueError, "state_dict: got no conv1.weight; ")


def test_a_network_inside_another_is_found_by_its_prefix():
    params, state = make(block="basic").init(jax.random.key(0))
    inside = {"head.weight": np.ones(3, np.float32), **to_torchvision(params, state, "backbone")}
    assert list(inside)[1] == "backbone.conv1.weight"
    again = from_torchvision(inside, "backbone")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, (params, state)))
    assert_refused(lambda: from_torchvision(inside), ValueError, "state_dict: got no conv1.weight; ")
    del inside["backbone.fc.bias"]
    assert_refused(lambda: from_torchvision(inside, "backbone"), ValueError, "state_dict: got no backbone.fc.bias; ")


def test_the_dtypes_and_the_counts_are_kept_unless_told():
    params, state = make().init(jax.random.key(0))
    params = jax.tree.map(lambda p: p.astype(jax.numpy.bfloat16), params)
    narrow, again = from_torchvision(to_torchvision(params, state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (narrow, again), (params, state)))
    written = to_torchvision(params, state, dtype=np.float16)
    assert {array.dtype.name for array in written.values()} == {"float16", "int64"}
    _, counted = from_torchvision(written, count=3)
    assert (counted["stem"].count == 3).all()


def test_what_torchvision_has_no_place_for_is_refused():
    params, state = make().init(jax.random.key(0))
    small = resnet(3, widths=(2, 3), blocks=1).init(jax.random.key(0))
    bare, _ = make(norm=None).init(jax.random.key(0))
    bn = params["stem"]["bn"]
    cases = [
        (small, ValueError, "params['stem']['W']: got shape (3, 3, 3, 2); expected (7, 7, in, out)"),
        ((bare, state), TypeError, "params['stem']['bn']: got NoneType; expected BNParams"),
        ((params, None), TypeError, "state: got NoneType; expected"),
        (([], state), ValueError, "params: got list; expected a dict of stem, blocks, head"),
        (
            ({**params, "stem": {**params["stem"], "bn": bn._replace(gamma=None)}}, state),
            ValueError,
            "params['stem']['bn'].gamma: got None; expected shape (2,)",
        ),
        ((params, {**state, "stem": bn}), TypeError, "state['stem']: got BNParams; expected BNState"),
    ]
    for given, error, start in cases:
        assert_refused(lambda: to_torchvision(*given), error, start)  # noqa: B023
