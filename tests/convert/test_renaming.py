"""Whole files of arrays from one framework's names to another's: what each array becomes, and back bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import golden

from jbn import BNParams, BNState, bn_apply, convert
from jbn.convert import rename_arrays
from jbn.networks import mlp, resnet

SATURATED = np.iinfo(np.int32).max
PATTERNS = ("torch", "flax", "jbn")


def array(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def norm(name, channels, tracked=7):
    values = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
    made = {f"{name}.{leaf}": array(channels, seed=seed) for leaf, seed in values.items()}
    made[f"{name}.running_var"] = np.square(made[f"{name}.running_var"]) + 1
    return made | {f"{name}.num_batches_tracked": np.array(tracked, np.int64)}


def torchvision():
    """The keys of a small residual network of torchvision's."""
    made = {"conv1.weight": array(4, 3, 7, 7), **norm("bn1", 4)}
    for block, channels in (("layer1.0", 4), ("layer2.0", 6)):
        made |= {f"{block}.conv1.weight": array(channels, 4, 3, 3), **norm(f"{block}.bn1", channels)}
        made |= {f"{block}.conv2.weight": array(channels, channels, 3, 3), **norm(f"{block}.bn2", channels, 0)}
    made |= {"layer2.0.downsample.0.weight": array(6, 4, 1, 1), **norm("layer2.0.downsample.1", 6)}
    return made | {"fc.weight": array(10, 6), "fc.bias": array(10)}


OTHERS = {
    "torchvision": torchvision(),
    "no affine": {"bn.running_mean": array(3), "bn.running_var": np.ones(3, np.float32)},
    "a layer by itself": {k.removeprefix("."): v for k, v in norm("", 3).items()},
    "layer norm and attention": {
        "ln.weight": array(4),
        "ln.bias": array(4),
        "attn.in_proj_weight": array(12, 4),
        "attn.out_proj.weight": array(4, 4),
        "attn.out_proj.bias": array(4),
        "pos_embed": array(1, 5, 4),
        "mask": np.array([0, -np.inf], np.float32),
        "scalar.weight": np.array(1.5, np.float32),
        **norm("bn", 4),
    },
    "dtypes": {
        "half.weight": array(3, 2, dtype=np.float16),
        "wide.weight": array(3, 2, 5, dtype=np.float64),
        "bf.weight": np.asarray(jnp.ones((2, 3, 1, 1, 1), jnp.bfloat16)),
        **{name: value.astype(np.float64) if value.ndim else value for name, value in norm("bn", 4).items()},
    },
    "as jbn calls a layer": {"0.weight": array(4, 3), "0.bias": array(4), **norm("0.bn", 4)},
}


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        value = np.asarray(value)
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("target", ["flax", "jbn"])
@pytest.mark.parametrize("case", OTHERS)
def test_there_and_back_is_the_same_bit_for_bit(case, target):
    there = rename_arrays(OTHERS[case], target)
    assert (there.source, there.target) == ("torch", target)
    back = rename_arrays(there.arrays, "torch", source=target)
    # jbn counts updates where the file did not.
    more = {"bn.num_batches_tracked": np.array(0)} if (case, target) == ("no affine", "jbn") else {}
    same(back.arrays, OTHERS[case] | more)


def model(network):
    params, state = network.init(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "state": state})
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


JBN = {
    "mlp": model(mlp((4, 6, 3))) | {"inputs/mean": array(4), "inputs/count": np.full(4, 9, np.float32)},
    "resnet": model(resnet(3, in_channels=2, widths=(4, 5), blocks=1)),
    "folded": model(mlp((4, 6, 3), norm=None)),
}


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(("torch", "flax")), ("flax", "jbn")])
@pytest.mark.parametrize("case", JBN)
def test_a_model_of_jbn_comes_back_through_all(case, first, second):
    there = rename_arrays(JBN[case], first)
    on = rename_arrays(there.arrays, second, source=first)
    same(rename_arrays(on.arrays, "jbn", source=second).arrays, JBN[case])


FLAX = {
    "params/odd/kernel": array(3),
    "params/odd/scale": array(2, 3),
    "params/dense/kernel": array(3, 2),
    "params/dense/bias": array(2),
    "params/ln/scale": array(3),
    "params/ln/bias": array(3),
    "params/embed/embedding": array(5, 3),
    "cache/index": np.array(3),
}


def test_what_has_another_rank_than_it_should_is_left_as_it_is():
    there = rename_arrays(FLAX).arrays
    assert there.keys() == {
        *("odd.kernel", "odd.scale", "dense.weight", "dense.bias", "ln.weight", "ln.bias", "embed.embedding"),
        "cache/index",
    }
    same(rename_arrays(there, "flax").arrays, FLAX)
    odd = {"params/a/W": array(3), "params/b/W": array(3, 2)}
    same(rename_arrays(rename_arrays(odd).arrays, "jbn").arrays, odd)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_is_recognized_and_may_stay(pattern):
    arrays = rename_arrays(torchvision(), pattern).arrays
    again = rename_arrays(arrays, pattern)
    assert again.source == pattern
    same(again.arrays, arrays)


def test_what_each_array_becomes():
    moves = {move.theirs: move[1:] for move in rename_arrays(torchvision(), "flax").moves}
    assert moves["layer2.0.downsample.0.weight"] == (
        "params/layer2/0/downsample/0/kernel",
        "layer2/0/downsample/0",
        "convolution",
        "OIHW → HWIO",
        (1, 1, 4, 6),
    )
    assert moves["fc.weight"] == ("params/fc/kernel", "fc", "dense", "OI → IO", (6, 10))
    assert moves["fc.bias"] == ("params/fc/bias", "fc", "dense", "", (10,))
    assert moves["bn1.running_var"] == ("batch_stats/bn1/var", "bn1", "batch norm", "", (4,))
    assert moves["bn1.num_batches_tracked"][0] == "counts/bn1/count"
    into = {move.theirs: move.ours for move in rename_arrays(OTHERS["as jbn calls a layer"], "jbn").moves}
    assert into == {
        "0.weight": "params/0/W",
        "0.bias": "params/0/b",
        "0.bn.weight": "params/0/bn/gamma",
        "0.bn.bias": "params/0/bn/beta",
        "0.bn.running_mean": "state/0/mean",
        "0.bn.running_var": "state/0/var",
        "0.bn.num_batches_tracked": "state/0/count",
    }


def test_layers_are_those_that_are_converted_one_by_one():
    state_dict = torchvision()
    variables = golden.nested(rename_arrays(state_dict, "flax").arrays, "/")
    ours = golden.nested(rename_arrays(state_dict, "jbn").arrays, "/")
    for torch, flax in (("bn1", "bn1"), ("layer2.0.downsample.1", "layer2/0/downsample/1")):
        wanted = convert.from_torch({k: v for k, v in state_dict.items() if k.startswith(f"{torch}.")}, torch)
        within = {kind: variables[kind] for kind in ("params", "batch_stats")}
        got = convert.from_flax(within, flax, count=7)
        params, state = ours["params"], ours["state"]
        for key in flax.split("/"):
            params, state = params[key], state[key]
        for other in (got, (BNParams(**params), BNState(**state))):
            for mine, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_flax_computes_the_same_from_it():
    nn = pytest.importorskip("flax.linen", reason="needs Flax: pip install flax")
    state_dict = {
        "conv.weight": array(4, 3, 3, 3),
        "conv.bias": array(4),
        "fc.weight": array(5, 4),
        "fc.bias": array(5),
    }
    state_dict |= norm("bn", 4)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
            x = nn.BatchNorm(use_running_average=True, name="bn")(x)
            return nn.Dense(5, name="fc")(x.mean((1, 2)))

    x = array(2, 3, 6, 5)
    got = Model().apply(golden.nested(rename_arrays(state_dict, "flax").arrays, "/"), x.transpose(0, 2, 3, 1))
    z = lax.conv(x, state_dict["conv.weight"], (1, 1), "SAME") + state_dict["conv.bias"][:, None, None]
    params, state = convert.from_torch({k: v for k, v in state_dict.items() if k.startswith("bn.")}, "bn")
    z, _ = bn_apply(params, state, z, train=False, axis=1)
    np.testing.assert_allclose(got, z.mean((2, 3)) @ state_dict["fc.weight"].T + state_dict["fc.bias"], atol=1e-5)


class TestCounts:
    """torch has one for a layer and 0 for unknown, jbn one for each channel, flax none."""

    def through(self, arrays, *targets):
        for target in targets:
            arrays = rename_arrays(arrays, target).arrays
        return arrays

    def test_one_for_the_layer_becomes_one_for_each_channel(self):
        count = self.through(norm("bn", 3), "jbn")["state/count"]
        assert (count.dtype, count.tolist()) == (np.int32, [7, 7, 7])

    def test_what_is_not_known_is_warm_unless_the_statistics_are_new(self):
        assert self.through(norm("bn", 3, 0), "jbn")["state/count"].tolist() == [SATURATED] * 3
        new = norm("bn", 3, 0) | {"bn.running_mean": np.zeros(3), "bn.running_var": np.ones(3)}
        assert self.through(new, "jbn")["state/count"].tolist() == [0] * 3

    def test_more_than_jbn_counts_is_saturated(self):
        assert self.through(norm("bn", 2, 2**40), "jbn")["state/count"].tolist() == [SATURATED] * 2

    def test_of_several_torch_gets_the_largest(self):
        arrays = self.through(norm("bn", 3), "jbn") | {"state/count": np.array([3, 9, 0], np.int32)}
        count = self.through(arrays, "torch")["bn.num_batches_tracked"]
        assert (count.dtype, count.shape, count) == (np.int64, (), 9)
        same(self.through(arrays, "flax", "jbn"), arrays)

    def test_where_nobody_counted_jbn_says_warm_and_flax_nothing(self):
        bare = OTHERS["no affine"]
        arrays = self.through(bare, "jbn")
        assert arrays["state/bn/count"].tolist() == [SATURATED] * 3
        assert self.through(bare, "flax").keys() == {"batch_stats/bn/mean", "batch_stats/bn/var"}
        assert self.through(arrays, "flax").keys() == {"batch_stats/bn/mean", "batch_stats/bn/var"}


def bad(**changes):
    return {**norm("bn", 3), "w.weight": array(2, 3), **{name.replace("__", "."): v for name, v in changes.items()}}


REFUSED = {
    "a variance below 0": (
        (bad(bn__running_var=np.array([1, -2, 1])),),
        "arrays['bn.running_var']: got -2; expected variances of 0 or more; look for damage to the file, or for arrays",
    ),
    "NaN": (
        (bad(w__weight=np.array([[1, np.nan]])),),
        "arrays['w.weight']: got 1 of 2 values that are NaN or infinite; expected finite numbers; take a checkpoint",
    ),
    "infinity in bfloat16": (
        (bad(bn__weight=np.asarray(jnp.full(3, jnp.inf, jnp.bfloat16))),),
        "arrays['bn.weight']: got 3 of 3 values that are NaN or infinite; expected finite numbers; take a checkpoint",
    ),
    "shapes": (
        (bad(bn__bias=np.ones(4)),),
        "arrays['bn.bias']: got shape (4,); expected (3,), that of 'bn.running_mean'; look for arrays that changed",
    ),
    "a single number": (
        ({"bn.running_mean": np.ones(()), "bn.running_var": np.ones(()), "bn.num_batches_tracked": np.array(1)}, "jbn"),
        "arrays['bn.running_mean']: got a single number; expected (C,), a value for each channel; look for damage",
    ),
    "one moment": (
        ({k: v for k, v in bad().items() if k != "bn.running_var"},),
        "arrays: got 'bn.weight', 'bn.bias', 'bn.running_mean', … (4 in all) without the var beside them; expected",
    ),
    "count": (
        (bad(bn__num_batches_tracked=np.array(-1)),),
        "arrays['bn.num_batches_tracked']: got shape () and dtype int64; expected the number of updates, whole numbers",
    ),
    "no pattern": (
        ({"a": array(2)},),
        "source: got None for 'a'; expected names that are clearly those of one of",
    ),
    "nothing": (
        ({},),
        "source: got None for no names; expected names that are clearly those of one",
    ),
    "two patterns": (
        ({"params/a/kernel": array(2, 2), "params/b/W": array(2, 2)},),
        "source: got None for 'params/a/kernel', 'params/b/W'; expected names that are clearly those of one of",
    ),
    "source": ((bad(), "flax", "keras"), "source: got 'keras'; expected one of torch, flax, jbn; choose one of them."),
    "target": ((bad(), "keras"), "target: got 'keras'; expected one of torch, flax, jbn; choose one of them."),
    "one name for two": (
        (norm("a", 3) | norm("a.bn", 3), "jbn"),
        "arrays['a.bn.running_mean']: got a name that becomes 'state/a/mean', as 'a.running_mean' does; expected names",
    ),
    "no way back": (
        ({"w.weight": array(2, 3), "block.gamma": array(3)}, "jbn"),
        "arrays['block.gamma']: got a name that becomes 'params/block/gamma' in 'jbn', where it would be read as "
        "'block.weight'; expected one that comes back; rename it.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_renamed_is_one_line(case):
    (arrays, target, source), message = (*REFUSED[case][0], None, None)[:3], REFUSED[case][1]
    with pytest.raises(ValueError, match=r"^(arrays|source|target)") as caught:
        rename_arrays(arrays, target, source=source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_no_mapping_of_arrays_is_a_type_error():
    with pytest.raises(TypeError, match=r"^arrays: got a name that is no text; expected the names of a file; flatten"):
        rename_arrays({1: array(2)}, "flax")
    with pytest.raises(TypeError, match=r"^arrays: got list; expected a mapping from names; pass a dict of arrays\."):
        rename_arrays([], "flax")
    with pytest.raises(TypeError, match=r"^arrays\['w\.weight'\]: got builtins\.str; expected an array; "):
        rename_arrays({"w.weight": "text"}, "flax")
