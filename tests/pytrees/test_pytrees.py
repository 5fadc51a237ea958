"""The three pytrees, and the two labelings of parameters for optax."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jbn import BNParams, BNState, BNStats, bn_apply, bn_init, bn_labels, bn_update_stats, weight_decay_mask


class Layer(NamedTuple):
    W: Any
    b: Any
    bn: Any


def network():
    """What the two functions meet: names of many frameworks, nesting, stacks, left-out fields."""
    bn, _ = bn_init(3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), bn, bn, bn)
    weight, vector = jnp.ones((3, 3)), jnp.ones(3)
    return {
        "mlp": [{"W": weight, "b": vector, "bn": bn}, {"W": weight, "b": vector, "bn": None}],
        "flax": {
            "Dense_0": {"kernel": weight, "bias": vector},
            "LayerNorm_0": {"scale": vector, "bias": vector},
        },
        "haiku": {"batch_norm": {"scale": vector, "offset": vector}},
        "keras": {"gamma": vector, "beta": vector},
        "tuple": (weight, Layer(weight, vector, bn)),
        "stacked": {"W": jnp.ones((3, 3, 3)), "b": jnp.ones((3, 3)), "bn": stacked},
        "no gamma": bn_init(3, use_gamma=False)[0],
        "vector weight": {"W": vector, "embedding": vector},
        "bigger": {"bias_kernel": weight, "B": weight, "bias": {"W": weight}},
    }


def test_weights_decay_and_gamma_beta_and_biases_do_not():
    off = BNParams(False, False)
    assert weight_decay_mask(network()) == {
        "mlp": [{"W": True, "b": False, "bn": off}, {"W": True, "b": False, "bn": None}],
        "flax": {"Dense_0": {"kernel": True, "bias": False}, "LayerNorm_0": {"scale": False, "bias": False}},
        "haiku": {"batch_norm": {"scale": False, "offset": False}},
        "keras": {"gamma": False, "beta": False},
        "tuple": (True, Layer(True, False, off)),
        "stacked": {"W": True, "b": False, "bn": off},
        "no gamma": BNParams(None, False),
        "vector weight": {"W": True, "embedding": True},
        "bigger": {"bias_kernel": True, "B": True, "bias": {"W": True}},
    }


def test_everything_in_a_batch_norm_is_labeled_bn_and_all_else_other():
    bn = BNParams("bn", "bn")
    assert bn_labels(network()) == {
        "mlp": [{"W": "other", "b": "other", "bn": bn}, {"W": "other", "b": "other", "bn": None}],
        "flax": {
            "Dense_0": {"kernel": "other", "bias": "other"},
            "LayerNorm_0": {"scale": "other", "bias": "other"},
        },
        "haiku": {"batch_norm": {"scale": "other", "offset": "other"}},
        "keras": {"gamma": "other", "beta": "other"},
        "tuple": ("other", Layer("other", "other", bn)),
        "stacked": {"W": "other", "b": "other", "bn": bn},
        "no gamma": BNParams(None, "bn"),
        "vector weight": {"W": "other", "embedding": "other"},
        "bigger": {"bias_kernel": "other", "B": "other", "bias": {"W": "other"}},
    }


@pytest.mark.parametrize("labeling", [weight_decay_mask, bn_labels])
def test_labelings_keep_the_structure_of_the_parameters(labeling):
    params = network()
    assert jax.tree.structure(labeling(params)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("labeling", "inside", "outside"), [(weight_decay_mask, False, True), (bn_labels, "bn", "other")]
)
def test_labelings_take_single_nodes_leaves_and_nothing(labeling, inside, outside):
    assert labeling(bn_init(3)[0]) == BNParams(inside, inside)
    assert labeling(jnp.ones(3)) == outside
    assert labeling({}) == {}
    assert labeling(None) is None


@pytest.mark.parametrize("labeling", [weight_decay_mask, bn_labels])
def test_labelings_of_vmapped_parameters_are_those_of_one_member(labeling):
    def init(key):
        return {"W": jax.random.normal(key, (2, 3)), "b": jnp.zeros(3), "bn": bn_init(3)[0]}

    members = jax.vmap(init)(jax.random.split(jax.random.key(0), 3))
    assert labeling(members) == labeling(init(jax.random.key(0)))


@pytest.mark.parametrize("labeling", [weight_decay_mask, bn_labels])
def test_labelings_need_shapes_alone(labeling):
    params = network()
    assert labeling(jax.eval_shape(network)) == labeling(params)


@pytest.mark.parametrize("node", [*bn_init(3), BNStats(*jnp.ones((3, 3)))], ids=["params", "state", "stats"])
def test_nodes_flatten_and_unflatten_to_themselves_with_named_paths(node):
    leaves, structure = jax.tree.flatten(node)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(node)
    assert all(a is b for a, b in zip(again, node, strict=True))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    assert paths == [f".{name}" for name in node._fields]


def test_left_out_parameters_are_no_leaves():
    assert jax.tree.leaves(BNParams(None, None)) == []
    assert len(jax.tree.leaves(BNParams(None, jnp.ones(3)))) == 1


def test_the_fields_are_those_of_the_design_in_its_order():
    assert BNParams._fields == ("gamma", "beta")
    assert BNState._fields == BNStats._fields == ("mean", "var", "count")


def test_all_three_are_registered_for_export_under_the_name_of_the_package():
    for node in (BNParams, BNState, BNStats):
        with pytest.raises(ValueError, match="Duplicate"):
            jax.export.register_namedtuple_serialization(node, serialized_name=f"tests.{node.__name__}")


def test_an_exported_training_step_comes_back_with_its_types():
    pytest.importorskip("flatbuffers")
    params, state = bn_init(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    def step(params, state, x):
        y, stats = bn_apply(params, state, x, train=True)
        return y, stats, bn_update_stats(state, stats), params

    data = jax.export.export(jax.jit(step))(params, state, x).serialize()
    got = jax.export.deserialize(data).call(params, state, x)
    want = step(params, state, x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
