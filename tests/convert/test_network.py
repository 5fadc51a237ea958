"""Whole networks by a mapping: layouts, sharing, nesting, what is skipped, and the dry run."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.beside_stock import bits
from support.refusals import assert_refused, refusals

import jbn
from jbn import convert
from jbn.networks import mlp

F32 = np.float32
zeros = partial(jnp.zeros, dtype=F32)


def numbers(shape, seed=0, low=0.5):
    return np.random.default_rng(seed).uniform(low, 2, shape).astype(F32)


def torch_norm(name, size, seed=0):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": numbers(size, seed + i) for i, leaf in enumerate(leaves)} | {
        f"{name}.num_batches_tracked": np.asarray(7)
    }


NETWORK = mlp((4, 3, 2))
PARAMS, STATE = NETWORK.init(jax.random.key(0))
STATE_DICT = {
    "net.fc1.weight": numbers((3, 4)),
    "net.fc1.bias": numbers(3),
    **torch_norm("net.bn", 3),
    "net.fc2.weight": numbers((2, 3)),
    "net.fc2.bias": numbers(2),
}
MAPPING = {"net.fc1": "0", "net.bn": "0/bn", "net.fc2": "1"}


def load(mapping=MAPPING, state_dict=STATE_DICT, params=PARAMS, state=STATE, **options):
    return convert.load_network(params, state, state_dict, mapping, format="torch", **options)


def dump(params, state, mapping=MAPPING, **options):
    return convert.dump_network(params, state, mapping, format="torch", **options)


def assert_tree_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert bits(got) == bits(want)


def test_a_network_is_loaded_and_goes_back_bit_for_bit():
    params, state = load()
    np.testing.assert_array_equal(params[0]["W"], STATE_DICT["net.fc1.weight"].T)
    np.testing.assert_array_equal(params[0]["bn"].gamma, STATE_DICT["net.bn.weight"])
    np.testing.assert_array_equal(state[0].var, STATE_DICT["net.bn.running_var"])
    assert state[0].count.tolist() == [7] * 3
    for like in (None, STATE_DICT):
        back = dump(params, state, like=like)
        assert_tree_equal(back, STATE_DICT)
    assert_tree_equal(load(state_dict=back), (params, state))


def test_the_loaded_network_computes_what_its_arrays_say():
    params, state = load()
    x = numbers((5, 4))
    z = x @ STATE_DICT["net.fc1.weight"].T + STATE_DICT["net.fc1.bias"]
    gamma, beta, mean, var = (STATE_DICT[f"net.bn.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
    a = np.maximum((z - mean) / np.sqrt(var + 1e-5) * gamma + beta, 0)
    expected = a @ STATE_DICT["net.fc2.weight"].T + STATE_DICT["net.fc2.bias"]
    y, _ = NETWORK.apply(params, state, x, train=False)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_shapes_are_enough_to_fill():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0))
    assert_tree_equal(load(params=shapes[0], state=shapes[1]), load())


def test_tuples_name_paths_as_well():
    mapping = {("net", "fc1"): ("0",), ("net", "bn"): {"params": (0, "bn"), "state": ("0",)}, ("net", "fc2"): ("1",)}
    assert_tree_equal(load(mapping), load())


def test_single_arrays_may_be_mapped():
    mapping = {"net.fc1.weight": "0/W", "net.fc1.bias": "0/b", "net.bn": "0/bn", "net.fc2": "1"}
    assert_tree_equal(load(mapping), load())
    assert_tree_equal(dump(*load(), mapping), STATE_DICT)


def test_one_layer_of_theirs_may_stand_at_two_places_of_ours():
    params, state = {"a": PARAMS[0], "b": PARAMS[0]}, {"a": STATE[0], "b": STATE[0]}
    state_dict = {k: v for k, v in STATE_DICT.items() if "fc2" not in k}
    mapping = {"net.fc1": ["a", "b"], "net.bn": ["a/bn", "b/bn"]}
    loaded = load(mapping, state_dict, params, state)
    assert_tree_equal(loaded[0]["a"], loaded[0]["b"])
    assert_tree_equal(dump(*loaded, mapping), state_dict)
    loaded[0]["b"]["W"] = loaded[0]["b"]["W"] + 1
    with pytest.raises(
        ValueError, match=r"^state_dict\['net.fc1.weight'\]: got different numbers from 'a/W' and 'b/W'"
    ):
        dump(*loaded, mapping)


def test_two_names_of_theirs_may_share_one_place_of_ours():
    twice = {k.replace("net", "tied"): v for k, v in STATE_DICT.items() if "fc2" not in k}
    mapping = {**MAPPING, "tied.fc1": "0", "tied.bn": "0/bn"}
    state_dict = STATE_DICT | twice
    loaded = load(mapping, state_dict)
    assert_tree_equal(loaded, load())
    assert_tree_equal(dump(*loaded, mapping), state_dict)
    for name, wrong in (("tied.fc1.bias", "params['0/b']"), ("tied.bn.running_mean", "state['0']")):
        with pytest.raises(ValueError, match=f"^{re.escape(wrong)}: got different numbers from "):
            load(mapping, state_dict | {name: state_dict[name] + 1})


def test_what_is_skipped_stays():
    state_dict = {k: v for k, v in STATE_DICT.items() if k != "net.fc1.bias"} | {"ema.decay": numbers(1)}
    params, state = load(state_dict=state_dict, skip=["0/b", "ema"])
    assert params[0]["b"] is PARAMS[0]["b"]
    back = dump(params, state, like=state_dict, skip=["0/b", "ema"])
    assert_tree_equal(back, state_dict)


def test_the_dry_run_is_a_table():
    state_dict = {k: v for k, v in STATE_DICT.items() if k != "net.fc1.bias"} | {"ema.decay": numbers(1)}
    plan = convert.plan_network(PARAMS, STATE, state_dict, MAPPING, format="torch", skip=["0/b", "ema"])
    assert str(plan) == (
        "theirs          ours           layout      shape\n"
        "net.fc1.weight  0/W            OI → IO     (4, 3)\n"
        "net.bn          0/bn, state 0  batch norm  (3,)\n"
        "net.fc2.weight  1/W            OI → IO     (3, 2)\n"
        "net.fc2.bias    1/b                        (2,)\n"
        "skipped: state_dict['ema.decay']\n"
        "skipped: params['0/b']"
    )
    assert [move.theirs for move in plan.moves][1] == "net.bn"


CONVOLUTIONS = [
    ((5, 2), (2, 5)),
    ((5, 2, 3), (3, 2, 5)),
    ((5, 2, 3, 4), (3, 4, 2, 5)),
    ((5, 2, 3, 4, 6), (3, 4, 6, 2, 5)),
]


@pytest.mark.parametrize(("theirs", "ours"), CONVOLUTIONS)
def test_kernels_with_outputs_first_are_turned(theirs, ours):
    kernel = numbers(theirs)
    params = {"W": zeros(ours), "b": None}
    loaded, _ = convert.load_network(params, None, {"conv.weight": kernel}, {"conv": ""}, format="torch")
    np.testing.assert_array_equal(loaded["W"], np.moveaxis(kernel, (0, 1), (-1, -2)))
    back = convert.dump_network(loaded, None, {"conv": ""}, format="torch")
    assert_tree_equal(back, {"conv.weight": kernel})


def test_kernels_that_are_kept_with_outputs_first_stay():
    kernel = numbers((5, 2, 3, 4))
    params = {"W": zeros((5, 2, 3, 4)), "b": None}
    loaded, _ = convert.load_network(params, None, {"conv.weight": kernel}, {"conv": ""}, format="torch")
    np.testing.assert_array_equal(loaded["W"], kernel)


@pytest.mark.parametrize("shape", [(3, 3), (2, 2, 2), (3, 3, 3, 3)])
@pytest.mark.parametrize("name", ["conv", "conv.weight"])
def test_a_kernel_that_fits_both_ways_is_asked_about(shape, name):
    kernel, params = {"conv.weight": numbers(shape)}, {"W": zeros(shape), "b": None}
    mapping = {name: "" if name == "conv" else "W"}
    with pytest.raises(ValueError, match=r"^layout: got None, and state_dict\['conv.weight'\] of shape .* fits"):
        convert.load_network(params, None, kernel, mapping, format="torch")
    turned = np.moveaxis(kernel["conv.weight"], (0, 1), (-1, -2))
    for layout, expected in (("HWIO", turned), ("OIHW", kernel["conv.weight"]), ({"conv": "HWIO"}, turned)):
        loaded, _ = convert.load_network(params, None, kernel, mapping, format="torch", layout=layout)
        np.testing.assert_array_equal(loaded["W"], expected)
        back = convert.dump_network(loaded, None, mapping, format="torch", layout=layout, like=kernel)
        assert_tree_equal(back, kernel)


def test_formats_with_outputs_last_are_taken_as_they_are_unless_told():
    variables, params = {"params": {"fc": {"kernel": numbers((3, 3))}}}, {"W": zeros((3, 3)), "b": None}
    for layout, turn in ((None, lambda a: a), ("HWIO", lambda a: a), ("OIHW", np.transpose)):
        loaded, _ = convert.load_network(params, None, variables, {"fc": ""}, format="flax", layout=layout)
        np.testing.assert_array_equal(loaded["W"], turn(variables["params"]["fc"]["kernel"]))


def test_transposed_convolutions_are_told_by_a_pattern():
    kernel = {"up.weight": numbers((2, 5, 3, 4))}  # PyTorch's are IOHW
    params = {"W": zeros((3, 4, 2, 5)), "b": None}
    layout = {"up": "IOHW -> HWIO"}
    loaded, _ = convert.load_network(params, None, kernel, {"up": ""}, format="torch", layout=layout)
    np.testing.assert_array_equal(loaded["W"], kernel["up.weight"].transpose(2, 3, 0, 1))
    assert_tree_equal(convert.dump_network(loaded, None, {"up": ""}, format="torch", layout=layout), kernel)


def test_a_dense_layer_after_flattened_images_is_told_by_functions():
    kernel = {"fc.weight": numbers((5, 2 * 3 * 4))}  # over (channel, row, column)
    params = {"W": zeros((3 * 4 * 2, 5)), "b": None}
    to_ours = lambda w: w.reshape(5, 2, 3, 4).transpose(2, 3, 1, 0).reshape(-1, 5)  # noqa: E731
    to_theirs = lambda w: w.reshape(3, 4, 2, 5).transpose(3, 2, 0, 1).reshape(5, -1)  # noqa: E731
    layout = {"fc": (to_ours, to_theirs)}
    loaded, _ = convert.load_network(params, None, kernel, {"fc": ""}, format="torch", layout=layout)
    x = numbers((7, 2, 3, 4))
    expected = x.reshape(7, -1) @ kernel["fc.weight"].T
    np.testing.assert_allclose(x.transpose(0, 2, 3, 1).reshape(7, -1) @ loaded["W"], expected, rtol=1e-5)
    assert_tree_equal(convert.dump_network(loaded, None, {"fc": ""}, format="torch", layout=layout), kernel)


def test_a_bias_with_axes_of_size_1_behind_is_read_and_written():
    fields = {"conv": {"weight": numbers((5, 2, 3, 4)), "bias": numbers((5, 1, 1))}}  # as Equinox's convolutions
    params = {"W": zeros((3, 4, 2, 5)), "b": zeros(5)}
    loaded, _ = convert.load_network(params, None, fields, {"conv": ""}, format="equinox")
    np.testing.assert_array_equal(loaded["b"], fields["conv"]["bias"].ravel())
    assert_tree_equal(convert.dump_network(loaded, None, {"conv": ""}, format="equinox", like=fields), fields)


def test_narrow_arrays_are_widened_and_come_back():
    state_dict = {k: v.astype(jnp.bfloat16) if "tracked" not in k else v for k, v in STATE_DICT.items()}
    params, state = load(state_dict=state_dict)
    assert params[0]["W"].dtype == params[0]["bn"].gamma.dtype == jnp.float32
    assert_tree_equal(dump(params, state, like=state_dict), state_dict)
    wide = load()
    with pytest.raises(TypeError, match=r"^state_dict\['net.fc1.weight'\]: got dtype bfloat16, which would round"):
        dump(*wide, like=state_dict)
    rounded = dump(*wide, like=state_dict, dtype=jnp.bfloat16)
    assert_tree_equal(rounded, state_dict)


def without(*names):
    return {k: v for k, v in STATE_DICT.items() if k not in names}


BARE = [{**PARAMS[0], "bn": jbn.BNParams(PARAMS[0]["bn"].gamma, None)}, PARAMS[1]]
HALF = jax.tree.map(lambda a: a.astype(jnp.float16), PARAMS)

REFUSALS = [
    (
        lambda: load(state_dict=STATE_DICT | {"head.bias": numbers(2)}),
        ValueError,
        "state_dict['head.bias']: got an array that mapping does not name; expected a place for each; map 'head.bias', "
        "or name it in skip.",
    ),
    (
        lambda: load(state_dict=without("net.fc2.bias")),
        ValueError,
        "params['1/b']: got nothing for it from mapping; expected something for each place; map a name to it, or name "
        "it in skip.",
    ),
    (
        lambda: load(skip=["head"]),
        ValueError,
        "skip: got 'head', which is mapped or is not there; expected a leftover; drop it.",
    ),
    (
        lambda: load(skip="head"),
        TypeError,
        "skip: got str; expected names of arrays or modules in a tuple; pass ('head',).",
    ),
    (
        lambda: load({**MAPPING, "net.fc3": "1"}),
        ValueError,
        "mapping['net.fc3']: got a name with no array, batch norm, 'weight' or 'bias' in state_dict; expected one of "
        "theirs; there is 'net.fc1.weight', 'net.fc1.bias', 'net.bn.weight', 'net.bn.bias', 'net.bn.running_mean', "
        "'net.bn.running_var', … (9 in all).",
    ),
    (
        lambda: load({**MAPPING, "net.fc2": "2"}),
        ValueError,
        "mapping: got 'net.fc2.weight' for params['2/W'], no such place; expected an array; map it to one of '0/W', "
        "'0/b', '1/W', '1/b', or name it in skip.",
    ),
    (
        lambda: load({**MAPPING, "net.bn": "1"}),
        ValueError,
        "mapping['net.bn']: got '1', no such place; expected a BNParams, one of '0/bn'; name its path in params.",
    ),
    (
        lambda: load({**MAPPING, "net.bn": {"params": "0/bn", "state": "1"}}),
        ValueError,
        "mapping['net.bn']: got no BNState at '1' in state; expected the running statistics of '0/bn'; name both "
        "places, {'params': …, 'state': …}.",
    ),
    (
        lambda: load({**MAPPING, "net.bn": {"params": "0/bn"}}),
        ValueError,
        "mapping['net.bn']: got a dict of params; expected 'params' and 'state', the two places of a batch norm; pass "
        "both.",
    ),
    (
        lambda: load({**MAPPING, "net.fc2": 1.5}),
        TypeError,
        "mapping['net.fc2']: got float; expected a path, as text or as a tuple of names; pass 'block/bn'.",
    ),
    (
        lambda: load(["net.fc1"]),
        TypeError,
        "mapping: got list; expected a dict from their names to places in ours; pass {'conv1': 'stem', 'bn1': "
        "'stem/bn'}.",
    ),
    (
        lambda: load(state_dict=STATE_DICT | {"net.fc2.weight": numbers((4, 3))}),
        ValueError,
        "state_dict['net.fc2.weight']: got shape (4, 3); expected one that fits params['1/W'] of shape (3, 2) as OI → "
        "IO or OI; map the layer elsewhere, or name another layout.",
    ),
    (
        lambda: load(state_dict=STATE_DICT | {"net.fc2.bias": numbers((2, 2))}),
        ValueError,
        "state_dict['net.fc2.bias']: got shape (2, 2); expected (2,), that of params['1/b']; map the array elsewhere.",
    ),
    (
        lambda: load(state_dict=STATE_DICT | torch_norm("net.bn", 4)),
        ValueError,
        "params['0/bn'].gamma: got shape (4,) from 'net.bn'; expected (3,); map the layer elsewhere.",
    ),
    (
        lambda: load(state_dict=without("net.bn.bias")),
        ValueError,
        "params['0/bn'].beta: got nothing from 'net.bn'; expected an array, which stands there; make both layers with "
        "γ and β, or both without.",
    ),
    (
        lambda: load(params=BARE),
        ValueError,
        "params['0/bn'].beta: got an array from 'net.bn'; expected None, which stands there; make both layers with γ "
        "and β, or both without.",
    ),
    (
        lambda: dump(BARE, STATE, like=STATE_DICT),
        ValueError,
        "state_dict: got net.bn.bias in like alone, and no such thing in params; expected γ and β on both sides or on "
        "neither; make both layers alike.",
    ),
    (
        lambda: load(state_dict=without("net.bn.running_var")),
        ValueError,
        "state_dict: got no net.bn.running_var; expected the running statistics running_mean, running_var; convert a "
        "layer that keeps them.",
    ),
    (
        lambda: load(params=HALF),
        TypeError,
        "state_dict['net.fc1.weight']: got dtype float32, numbers that params['0/W'] of dtype float16 would round; "
        "expected float16; convert it with astype, or make params of a wider dtype.",
    ),
    (
        lambda: load(state_dict=STATE_DICT | {"net.fc2.weight": np.ones((2, 3), np.int8)}),
        TypeError,
        "state_dict['net.fc2.weight']: got dtype int8; expected real floating-point numbers; look whether this is the "
        "array you mean.",
    ),
    (
        lambda: load(layout={"net.fc3": "HWIO"}),
        ValueError,
        "layout['net.fc3']: got a name that is not mapped; expected one of 'net.bn', 'net.fc1.bias', "
        "'net.fc1.weight', 'net.fc2.bias', 'net.fc2.weight'; correct it.",
    ),
    (
        lambda: load(layout="NHWC"),
        ValueError,
        "layout: got 'NHWC'; expected \"HWIO\" or \"OIHW\", a pattern such as 'IOHW -> HWIO', or two functions (to "
        "ours, to theirs); say how the kernel lies.",
    ),
    (
        lambda: convert.load_network(PARAMS, STATE, STATE_DICT, MAPPING, format="pytorch"),
        ValueError,
        "format: got 'pytorch'; expected one of 'torch', 'flax', 'nnx', 'haiku', 'equinox', 'keras'; name theirs.",
    ),
    (
        lambda: convert.dump_network(PARAMS, STATE, MAPPING, format="haiku"),
        ValueError,
        "like: got None; expected a foreign tree to fill, which haiku needs; pass what its init returned.",
    ),
    (
        lambda: dump(PARAMS, STATE, {**MAPPING, "net.fc3": "5"}),
        ValueError,
        "mapping['net.fc3']: got '5'; expected a place in params; there is '0/W', '0/b', '0/bn', '1/W', '1/b', '1/bn'.",
    ),
]


@refusals(REFUSALS)
def test_what_is_wrong_is_named(call, error, text):
    assert_refused(call, error, text)
