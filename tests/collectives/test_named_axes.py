"""Statistics synchronized over two names at once: those of `vmap`, `pmap` and `shard_map`, nested in every order."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jbn import BNParams, BNState, bn_apply

ROWS, C = 3, 4
KINDS = ("vmap", "pmap", "shard_map", "unchecked shard_map")
NESTS = [
    (outer, inner)
    for outer, inner in itertools.product(KINDS, KINDS)
    # JAX nests neither two mappings over devices of different kinds nor pmap in anything but vmap.
    if "vmap" in (outer, inner) and not (inner == "pmap" and outer != "vmap")
]


def over(kind, name, size, fn):
    """``fn`` of one member, mapped over the leading axis of its arguments."""
    if kind == "vmap":
        return jax.vmap(fn, axis_name=name)
    if kind == "pmap":
        return jax.pmap(fn, axis_name=name)
    mesh = jax.make_mesh((size,), (name,), axis_types=(AxisType.Auto,))

    def shard(*args):
        return jax.tree.map(lambda v: v[None], fn(*jax.tree.map(lambda v: v[0], args)))

    return jax.shard_map(shard, mesh=mesh, in_specs=P(name), out_specs=P(name), check_vma=kind == "shard_map")


def problem(outer, inner, rows=ROWS):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, outer, inner, rows, C)).astype(np.float32)
    mask = rng.random((outer, inner, rows, 1)) < 0.7
    params = BNParams(*jnp.asarray(rng.normal(size=(2, C)), jnp.float32))
    return params, *map(jnp.asarray, (x + 3, weights, mask))


def loss_of(y, stats, weights, mask):
    return jnp.sum(jnp.where(mask, jnp.sin(y) * weights, 0)), jnp.sum(jnp.cos(stats.mean) + jnp.sqrt(stats.var + 1))


def synchronized(nest, names, sizes, params, x, weights, mask):
    """The loss of all members, with their statistics synchronized."""

    def member(x, weights, mask):
        y, stats = bn_apply(params, None, x, train=True, mask=mask, axis_name=names)
        return (*loss_of(y, stats, weights, mask), y, stats)

    (outer, inner), (n_outer, n_inner) = nest, sizes
    of_y, of_stats, y, stats = over(outer, "a", n_outer, over(inner, "b", n_inner, member))(x, weights, mask)
    return jnp.sum(of_y) + jnp.mean(of_stats), (y, stats)


def whole(params, x, weights, mask):
    flat = [v.reshape(-1, v.shape[-1]) for v in (x, weights, mask)]
    y, stats = bn_apply(params, None, flat[0], train=True, mask=flat[2])
    return sum(loss_of(y, stats, *flat[1:])), (y.reshape(x.shape), stats)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids="".join)
@pytest.mark.parametrize("sizes", [(2, 4), (8, 4)], ids=["8", "32"])
@pytest.mark.parametrize("nest", [n for n in NESTS if "shard_map" not in n], ids=" of ".join)
def test_values_gradients_and_hessian_products_are_those_of_the_whole_batch(nest, sizes, names):
    params, x, weights, mask = problem(*sizes)

    def outputs(loss):
        def gradient(params, x):
            return jax.grad(lambda params, x: loss(params, x, weights, mask)[0], (0, 1))(params, x)

        tangents = (params, weights)
        y_and_stats = loss(params, x, weights, mask)[1]
        return y_and_stats, jax.jvp(gradient, (params, x), tangents)

    (y, stats), derivatives = jax.jit(outputs, static_argnums=0)(partial(synchronized, nest, names, sizes))
    (want_y, want_stats), want_derivatives = jax.jit(outputs, static_argnums=0)(whole)
    stats = jax.tree.map(lambda v: v[0, 0], stats)
    for got, want in zip(
        jax.tree.leaves((y, stats, derivatives)), jax.tree.leaves((want_y, want_stats, want_derivatives)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("nest", [n for n in NESTS if "shard_map" in n], ids=" of ".join)
@pytest.mark.parametrize("names", [("a", "b"), "a", "b"], ids="".join)
def test_the_name_of_a_vmap_in_a_checked_shard_map_is_one_line(nest, names):
    name_of_vmap = "ab"[nest.index("vmap")]
    run = partial(synchronized, nest, names, (2, 4), *problem(2, 4))
    if name_of_vmap not in names:
        run()
    else:
        with pytest.raises(ValueError, match=r"^axis_name: got .* collectives over the name of a vmap; .*check_vma"):
            run()


def test_groups_along_a_vmap_inside_an_unchecked_shard_map():
    _, x, _, _ = problem(2, 4)

    def member(x):
        return bn_apply(BNParams(None, None), None, x, train=True, axis_name="b", axis_index_groups=((0, 1), (2, 3)))

    y, stats = over("unchecked shard_map", "a", 2, over("vmap", "b", 4, member))(x)
    for i, j in itertools.product(range(2), (0, 2)):
        want_y, want = bn_apply(BNParams(None, None), None, x[i, j : j + 2].reshape(-1, C), train=True)
        np.testing.assert_allclose(y[i, j : j + 2].reshape(-1, C), want_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats.var[i, j], want.var, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map", "unchecked shard_map"])
def test_devices_whose_states_differ_have_the_statistics_of_the_whole_batch(kind, offset):
    """A running mean may be the shift of the sums; shards of 4096 values and more are summed in one read."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 1024, C)) + offset).astype(np.float32)
    state = BNState(
        *(v.astype(t) for v, t in zip(rng.normal(size=(3, 4, C)) * 10, (np.float32, np.float32, np.int32), strict=True))
    )

    def member(x, state):
        return bn_apply(BNParams(None, None), state, x, train=True, axis_name="a")[1]

    stats = jax.jit(over(kind, "a", 4, member))(x, state)
    flat = x.reshape(-1, C).astype(np.float64)
    np.testing.assert_allclose(stats.var[0], flat.var(0), rtol=1e-5)
    np.testing.assert_allclose(stats.mean[0], flat.mean(0), rtol=1e-6, atol=1e-6)


def test_a_compiled_vmap_is_differentiated_from_outside():
    _, x, weights, _ = problem(1, 4)

    def loss(x):
        member = partial(bn_apply, BNParams(None, None), None, train=True, axis_name="b")
        y, _ = jax.jit(jax.vmap(member, axis_name="b"))(x)
        return jnp.sum(jnp.sin(y) * weights[0])

    def whole_loss(x):
        y, _ = bn_apply(BNParams(None, None), None, x.reshape(-1, C), train=True)
        return jnp.sum(jnp.sin(y.reshape(x.shape)) * weights[0])

    np.testing.assert_allclose(jax.grad(loss)(x[0]), jax.grad(whole_loss)(x[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("inside", "members", "options"),
    [
        (jax.jit, 24, {}),
        (jax.checkpoint, 6, {}),
        (jax.jit, 6, {"ghost_size": 3}),
        (jax.checkpoint, 24, {"renorm": (1.5, 0.5)}),
    ],
    ids=["jit", "checkpoint", "jit-ghost", "checkpoint-renorm"],
)
def test_a_compiled_or_rematerialized_layer_inside_a_vmap_is_differentiated_from_outside(inside, members, options):
    params, x, weights, mask = problem(members, 1)
    state = BNState(jnp.full(C, 2.5), jnp.full(C, 0.8), jnp.ones(C, jnp.int32))

    def loss(wrap, params, x):
        def member(x, weights, mask):
            y, stats = bn_apply(params, state, x, train=True, mask=mask, axis_name="a", **options)
            return sum(loss_of(y, stats, weights, mask))

        return jnp.sum(jax.vmap(wrap(member), axis_name="a")(x[:, 0], weights[:, 0], mask[:, 0]))

    def derivatives(wrap, params, x):
        gradient = jax.grad(partial(loss, wrap), (0, 1))
        along = jax.tree.map(jnp.cos, (params, x))
        return gradient(params, x), jax.jvp(gradient, (params, x), along)[1]

    got = jax.jit(partial(derivatives, inside))(params, x)
    want = jax.jit(partial(derivatives, lambda member: member))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("members", [6, 24])
def test_statistics_over_the_members_of_a_vmap_are_typed_as_one_value_for_all(members):
    params, x, _, mask = problem(members, 1)
    state = BNState(jnp.full(C, 2.5), jnp.full(C, 0.8), jnp.ones(C, jnp.int32))

    def member(x, mask):
        return bn_apply(params, state, x, train=True, mask=mask, axis_name="a")[1]

    stats = jax.vmap(member, axis_name="a", out_axes=None)(x[:, 0], mask[:, 0])
    np.testing.assert_allclose(stats.count, mask.sum())
    np.testing.assert_allclose(stats.mean, x[:, 0].mean((0, 1), where=mask[:, 0]), rtol=1e-6)
    assert jax.vmap(lambda x: member(x, None), axis_name="a", out_axes=None)(x[:, 0]).mean.shape == (C,)
