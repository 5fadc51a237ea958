"""jbn.linen.BatchNorm under Flax's and JAX's transformations, over named axes and on meshes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.flax_support import assert_close

from jbn.linen import BatchNorm

KEY = jax.random.key(0)
X = 2 * jax.random.normal(jax.random.key(1), (8, 3)) + 1


def both(build, x=X):
    """Variables from ``init``, and output and updates of ``apply``, of a model around the door and around Flax's."""
    found = []
    for kind in (BatchNorm, nn.BatchNorm):
        model = build(kind)
        variables = model.init(KEY, x)
        found.append((variables, model.apply(variables, x, mutable=["batch_stats"])))
    return found


def test_vmap_gives_each_member_its_own_variables():
    def build(kind):
        axes = {"params": 0, "batch_stats": 0}
        mapped = nn.vmap(kind, variable_axes=axes, split_rngs={"params": True})
        return mapped(use_running_average=False, scale_init=nn.initializers.normal())

    ours, theirs = both(build, jnp.stack((X, 3 * X)))
    assert_close(ours, theirs)
    assert ours[0]["params"]["scale"].shape == (2, 3)


def test_a_scan_over_layers_gives_each_its_own_variables():
    def build(kind):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(3)(nn.relu(kind(use_running_average=False)(x))), None

        axes = {"params": 0, "batch_stats": 0}

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)

        return Stack()

    assert_close(*both(build))


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_lifted_layers_are_those_of_flax(lift):
    assert_close(*both(lambda kind: lift(kind)(use_running_average=False)))


def test_statistics_are_a_carry_of_scan_with_64_bit():
    with jax.enable_x64(True):
        layer, x = BatchNorm(use_running_average=False), jnp.stack([X.astype(jnp.float64)] * 3)
        variables = layer.init(KEY, x[0])

        def step(stats, x):
            y, updated = layer.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
            return updated["batch_stats"], y

        stats, y = jax.lax.scan(step, variables["batch_stats"], x)
        assert (y.dtype, stats["var"].dtype) == (jnp.float64, jnp.float32)
        np.testing.assert_allclose(stats["mean"], (1 - 0.99**3) * x[0].mean(0), rtol=1e-5)


def test_a_lifted_scan_carries_statistics_with_64_bit():
    with jax.enable_x64(True):

        class Steps(nn.Module):
            @nn.compact
            def __call__(self, x):
                def step(layer, carry, x):
                    return carry, layer(x)

                layer = BatchNorm(use_running_average=False)
                over = nn.scan(step, variable_broadcast="params", variable_carry="batch_stats", split_rngs={})
                return over(layer, 0, x)[1]

        x = jnp.stack([X.astype(jnp.float64)] * 3)
        variables = BatchNorm(use_running_average=False).init(KEY, x[0])
        nested = {name: {"BatchNorm_0": v} for name, v in variables.items()}
        _, updated = Steps().apply(nested, x, mutable=["batch_stats"])
        np.testing.assert_allclose(jax.tree.leaves(updated)[0], (1 - 0.99**3) * x[0].mean(0), rtol=1e-5)


def test_a_shared_layer_with_a_named_axis_is_initialized_in_training():
    """google/flax#1250."""

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            norm = BatchNorm(name="norm", use_running_average=not train, momentum=0.9, axis_name="batch")
            for _ in range(2):
                x = norm(x)
            return x

    variables = Shared().init(KEY, jnp.ones((10,)))
    apply = jax.vmap(partial(Shared().apply, mutable=["batch_stats"]), (None, 0), axis_name="batch")
    y, _ = apply(variables, jax.random.normal(KEY, (6, 10)))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)


def named(options, x, mask):
    """The layer over the shards of x along the axis ``batch``, each (…, N, C), under `vmap`."""
    layer = BatchNorm(use_running_average=False, momentum=0.0, axis_name="batch", **options)
    variables = layer.init(KEY, x[0])
    apply = partial(layer.apply, mutable=["batch_stats"])
    return jax.vmap(lambda x, mask: apply(variables, x, mask=mask), axis_name="batch")(x, mask)


def test_unequal_masks_are_pooled_by_their_counts():
    x = jax.random.normal(KEY, (2, 4, 3)) + jnp.array([0.0, 5.0])[:, None, None]
    mask = jnp.array([[True] * 4, [True, False, False, False]])[..., None]
    _, updated = named({}, x, mask)
    kept = np.concatenate((x[0], x[1, :1])).astype(np.float64)
    for device in range(2):
        np.testing.assert_allclose(updated["batch_stats"]["mean"][device], kept.mean(0), rtol=1e-5)
        np.testing.assert_allclose(updated["batch_stats"]["var"][device], kept.var(0), rtol=1e-5)


def test_groups_work_under_vmap_where_those_of_jax_do_not():
    x = jax.random.normal(KEY, (4, 4, 3)) + jnp.arange(4.0)[:, None, None]
    _, updated = named({"axis_index_groups": [[0, 1], [2, 3]]}, x, None)
    for device in range(4):
        pair = np.asarray(x[device // 2 * 2 : device // 2 * 2 + 2], np.float64).reshape(-1, 3)
        np.testing.assert_allclose(updated["batch_stats"]["mean"][device], pair.mean(0), rtol=1e-5)


@pytest.mark.parametrize("names", ["data", ("data", "model")])
def test_shards_give_the_numbers_of_the_whole(names):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layer = BatchNorm(use_running_average=False, axis_name=names)
    x = jax.random.normal(KEY, (16, 3)) + 4
    variables = layer.init(KEY, x)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(names)), out_specs=(P(names), P()))
    def apply(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    whole = BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    assert_close(apply(variables, x), whole)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")])
def test_on_an_explicit_mesh_statistics_come_out_as_they_went_in(spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    x = jax.random.normal(KEY, (8, 4))
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)
    expected = layer.apply(variables, x, mutable=["batch_stats"])
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, NamedSharding(mesh, P()))
        _, found = jax.jit(partial(layer.apply, mutable=["batch_stats"]))(
            variables, jax.device_put(x, NamedSharding(mesh, spec))
        )
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(variables["batch_stats"]), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, 1)
    assert_close(jax.device_get(found), jax.device_get(expected[1]))


def test_a_summary_is_that_of_flax():
    shown = [kind(use_running_average=False).tabulate(KEY, X) for kind in (BatchNorm, nn.BatchNorm)]
    assert shown[0] == shown[1]
