"""What Flax stored loads into the doors, and what they store into Flax: msgpack, orbax, pickle."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from support.flax_support import Case, assert_close

import jbn.linen
import jbn.nnx

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 4))
CASE = Case("float32", None, "float32", -1, None, (True, True), False)


def by_msgpack(tree, like, _):
    return serialization.from_bytes(like, serialization.to_bytes(tree))


def by_orbax(tree, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def by_pickle(tree, _, __):
    return pickle.loads(pickle.dumps(tree))


WAYS = pytest.mark.parametrize("way", [by_msgpack, by_orbax, by_pickle])


def linen_model(kind):
    return nn.Sequential([nn.Dense(3), kind(use_running_average=True)])


def nnx_model(kind):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), kind(3, use_running_average=True, rngs=rngs))


@WAYS
@pytest.mark.parametrize(("stored", "loaded"), [(nn, jbn.linen), (jbn.linen, nn)])
def test_linen_variables_are_exchanged(way, stored, loaded, tmp_path):
    source, target = linen_model(stored.BatchNorm), linen_model(loaded.BatchNorm)
    variables = CASE.filled(source.init(KEY, X))
    restored = way(variables, target.init(KEY, X), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    assert_close(target.apply(restored, X), source.apply(variables, X))


@WAYS
@pytest.mark.parametrize(("stored", "loaded"), [(nnx, jbn.nnx), (jbn.nnx, nnx)])
def test_nnx_states_are_exchanged(way, stored, loaded, tmp_path):
    source, target = nnx_model(stored.BatchNorm), nnx_model(loaded.BatchNorm)
    nnx.update(source, CASE.filled(nnx.state(source)))
    pure, like = (nnx.to_pure_dict(nnx.state(model)) for model in (source, target))
    # msgpack and orbax want names for keys; Sequential numbers its layers.
    pure, like = ({"layers": {str(i): v for i, v in tree["layers"].items()}} for tree in (pure, like))
    restored = way(pure, like, tmp_path)
    state = nnx.state(target)
    nnx.replace_by_pure_dict(state, {"layers": {int(i): v for i, v in restored["layers"].items()}})
    nnx.update(target, state)
    assert_close(target(X), source(X))


def test_a_linen_module_is_pickled():
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.5)
    copy = pickle.loads(pickle.dumps(layer))
    assert copy == layer
    assert type(copy) is jbn.linen.BatchNorm


def test_a_trained_statistic_survives_and_goes_on():
    theirs = nn.BatchNorm(use_running_average=False)
    ours = jbn.linen.BatchNorm(use_running_average=False)
    variables = theirs.init(KEY, X)
    for step, layer in enumerate((theirs, ours, theirs, ours)):
        _, updated = layer.apply(variables, X + step, mutable=["batch_stats"])
        variables = {**variables, **updated}
    expected = sum(0.01 * 0.99 ** (3 - step) * (X + step).mean(0) for step in range(4))
    np.testing.assert_allclose(variables["batch_stats"]["mean"], expected, rtol=1e-4, atol=1e-6)
    assert jnp.all(variables["batch_stats"]["var"] < 1.1)
