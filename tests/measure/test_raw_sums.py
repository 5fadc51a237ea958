"""The way in which moments of tall float32 arrays are measured on a CPU: two raw sums, the second after the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import oracle
from support.closeness import assert_close, relative_error
from support.counting import compile_hlo
from support.eight import mesh

from jbn import BNParams, BNStats, bn_apply

TALL = (4096, 6)


def stats_of(x, **options):
    return bn_apply(BNParams(None, None), None, x, train=True, **options)[1]


def draw(*shape, offset=0.5):
    return (np.random.default_rng(0).normal(size=shape) + offset).astype(np.float32)


def assert_exact(stats, x, axis=-1):
    want = oracle.moments(x, axis)
    assert_close(stats.mean, want.mean)
    assert relative_error(stats.var, want.var) < 1e-5


@pytest.mark.cpu_path
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU takes raw sums")
@pytest.mark.parametrize(
    ("shape", "dtype", "waits"), [(TALL, "float32", True), (TALL, "bfloat16", False), ((512, 48), "float32", False)]
)
def test_the_second_sum_waits_where_that_is_faster(shape, dtype, waits):
    x = jnp.asarray(draw(*shape), dtype)
    hlo, _ = compile_hlo(stats_of, x)
    assert hlo.reductions(x.size) == 2
    assert hlo.reductions_wait(x.size) == waits


def test_in_every_transform_the_moments_stay_those_of_the_formula():
    x = draw(3, *TALL)
    x[1] += 1e4  # a member that needs the second read
    for got, batch in zip(zip(*jax.jit(jax.vmap(stats_of))(x), strict=True), x, strict=True):
        assert_exact(type(stats_of(x[0]))(*got), batch)
    _, scanned = jax.lax.scan(lambda carry, batch: (carry, stats_of(batch)), 0, x)
    np.testing.assert_allclose(scanned.var, [oracle.moments(batch).var for batch in x], rtol=1e-5)
    same = jax.vmap(lambda _, batch: stats_of(batch), in_axes=(0, None), axis_size=2)(jnp.arange(2), x[0])
    assert same.var.shape == (2, TALL[1])
    gradient = jax.jit(jax.grad(lambda x: stats_of(x).var.sum()))(x[0])
    np.testing.assert_allclose(gradient, 2 * (x[0] - x[0].mean(0)) / TALL[0], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("channel", [0, 3])
def test_a_value_that_is_not_finite_stays_in_its_channel(bad, channel):
    x = draw(*TALL)
    x[7, channel] = bad
    others = np.arange(TALL[1]) != channel
    stats = jax.jit(stats_of)(x)
    assert not np.isfinite(stats.var[channel])
    np.testing.assert_allclose(stats.var[others], oracle.moments(x[:, others]).var, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")], ids=["rows", "channels"])
def test_sharded_arrays_have_the_same_moments(kind, spec):
    x = draw(8 * 2048, 16)
    m = mesh(kind=kind)
    with jax.set_mesh(m):
        stats = jax.jit(stats_of)(jax.device_put(x, NamedSharding(m, spec)))
    assert_exact(stats, x)


def test_shards_have_the_moments_of_the_whole_batch():
    x = draw(8 * 2048, 6, offset=100)
    run = jax.shard_map(
        lambda x: stats_of(x, axis_name="data"), mesh=mesh(), in_specs=P("data"), out_specs=BNStats(P(), P(), P())
    )
    assert_exact(jax.jit(run)(x), x)
