"""jbn.nnx.BatchNorm under Flax's and JAX's transformations, over named axes, and beside linen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from support.flax_support import assert_close

import jbn.linen
from jbn.nnx import BatchNorm

X = 2 * jax.random.normal(jax.random.key(1), (8, 3)) + 1


def make(kind, **options):
    return kind(3, **options, rngs=nnx.Rngs(0))


def both(call, **options):
    """What ``call`` of the door and of Flax's layer gives, and the state after it."""
    found = []
    for kind in (BatchNorm, nnx.BatchNorm):
        layer = make(kind, **options)
        found.append((call(layer), nnx.to_pure_dict(nnx.state(layer))))
    return found


def loss(layer, x):
    return jnp.sum(jnp.sin(layer(x)))


def gradients(layer, x):
    return jax.tree.leaves(nnx.grad(loss)(layer, x))


@pytest.mark.parametrize(
    "call",
    [
        nnx.jit(lambda layer, x: layer(x)),
        nnx.remat(lambda layer, x: layer(x)),
        gradients,
        nnx.jit(gradients),
        nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_size=1),
    ],
    ids=["jit", "remat", "grad", "jit of grad", "vmap"],
)
def test_transformed_calls_are_those_of_flax(call, request):
    evaluate = "vmap" in request.node.callspec.id  # of one layer for all members, which cannot update it
    assert_close(*both(lambda layer: call(layer, X[None] if evaluate else X), use_running_average=evaluate))


def test_vmap_makes_and_runs_an_ensemble():
    def ensemble(kind):
        create = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: kind(3, rngs=rngs)))
        layers = create(nnx.Rngs(0))
        y = nnx.vmap(lambda layer, x: layer(x))(layers, jnp.stack((X, 3 * X)))
        return y, nnx.to_pure_dict(nnx.state(layers))

    found = [ensemble(kind) for kind in (BatchNorm, nnx.BatchNorm)]
    assert_close(*found)
    assert found[0][1]["mean"].shape == (2, 3)


def test_scan_carries_the_layer():
    over = nnx.scan(lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    assert_close(*both(lambda layer: over(layer, jnp.stack((X, 2 * X)))[1]))


@pytest.mark.parametrize("copy", [lambda m: nnx.merge(*nnx.split(m), copy=True), nnx.clone])
def test_a_copy_is_a_door_that_goes_its_own_way(copy):
    layer = make(BatchNorm)
    other = copy(layer)
    other(X)
    assert type(other) is BatchNorm
    np.testing.assert_array_equal(layer.mean[...], 0)
    assert np.abs(other.mean[...]).min() > 0


def test_unequal_masks_are_pooled_by_their_counts():
    x = jax.random.normal(jax.random.key(0), (2, 4, 3)) + jnp.array([0.0, 5.0])[:, None, None]
    mask = jnp.array([[True] * 4, [True, False, False, False]])[..., None]
    graph, state = nnx.split(make(BatchNorm, axis_name="batch", momentum=0.0))

    @partial(jax.vmap, axis_name="batch")
    def call(x, mask):
        layer = nnx.merge(graph, state, copy=True)
        layer(x, mask=mask)
        return layer.mean[...], layer.var[...]

    kept = np.concatenate((x[0], x[1, :1])).astype(np.float64)
    for found, exact in zip(call(x, mask), (kept.mean(0), kept.var(0)), strict=True):
        np.testing.assert_allclose(found, np.stack((exact, exact)), rtol=1e-5)


def test_shards_give_the_numbers_of_the_whole():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = make(BatchNorm, axis_name="data")
    call = nnx.jit(nnx.shard_map(lambda layer, x: layer(x), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
    whole = make(BatchNorm)
    assert_close(call(layer, X), whole(X))
    assert_close(*(nnx.to_pure_dict(nnx.state(v)) for v in (layer, whole)))


def test_the_bridges_to_and_from_linen_take_the_doors():
    wrapped = nnx.bridge.ToNNX(jbn.linen.BatchNorm(use_running_average=False), rngs=nnx.Rngs(0)).lazy_init(X)
    linen = nnx.bridge.ToLinen(BatchNorm, args=(3,))
    variables = linen.init(jax.random.key(0), X)
    y, _ = linen.apply(variables, X, mutable=["batch_stats"])
    assert_close(wrapped(X, mutable=["batch_stats"]), y)
