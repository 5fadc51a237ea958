"""Functions that take and return the three pytrees, saved with ``jax.export`` and read back."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.closeness import assert_close
from support.hostile import loss, problem, step

from jbn import BNParams, bn_apply, bn_init, bn_merge_stats, bn_update_stats

pytest.importorskip("flatbuffers")


def round_trip(fn, *args, vjp_order=0, **options):
    """``fn`` exported for the shapes of ``args``, to bytes and back."""
    return export.deserialize(export.export(jax.jit(fn), **options)(*args).serialize(vjp_order=vjp_order))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", ["plain", "masked", "nan", "bf16"])
def test_a_step_survives_serialization(case, train):
    args = problem(case)
    fn = partial(step, train=train)
    got = round_trip(fn, *args).call(*args)
    assert_close(got, jax.jit(fn)(*args))
    assert [type(node).__name__ for node in got[1:]] == ["BNStats", "BNState"]


def test_params_without_gamma_or_beta_survive_serialization():
    _, state, x, _ = problem()
    for params in (BNParams(None, None), bn_init(3, use_beta=False)[0], bn_init(3, use_gamma=False)[0]):
        fn = partial(bn_apply, train=False)
        assert_close(round_trip(fn, params, state, x).call(params, state, x), fn(params, state, x))


def test_a_training_step_over_a_network_survives_serialization():
    params, state, x, _ = problem()

    def train_step(params, state, x):
        def of_params(params):
            y, first = bn_apply(params["a"], state["a"], x, train=True)
            y, second = bn_apply(params["b"], state["b"], jnp.tanh(y), train=True)
            return jnp.sum(jnp.sin(y)), {"a": first, "b": second}

        gradient, stats = jax.grad(of_params, has_aux=True)(params)
        merged = bn_merge_stats(stats, stats)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), bn_update_stats(state, merged)

    args = {"a": params, "b": params}, {"a": state, "b": state}, x
    assert_close(round_trip(train_step, *args).call(*args), jax.jit(train_step)(*args))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_what_was_read_back_can_be_differentiated(train):
    params, state, x, mask = problem("masked")
    fn = partial(loss, train=train)
    read = round_trip(fn, params, x, state, mask, vjp_order=1).call
    got, expected = (jax.jit(jax.grad(f, (0, 1)))(params, x, state, mask) for f in (read, fn))
    assert_close(got, expected, roundings=128)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_batch_size_may_stay_open(train):
    params, state, _, _ = problem()
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 3), jnp.float32)
    fn = partial(step, train=train)
    read = round_trip(fn, params, state, x)
    rng = np.random.default_rng(0)
    for size in (2, 7, 300):
        batch = jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)
        assert_close(read.call(params, state, batch), jax.jit(fn)(params, state, batch))


def test_an_open_batch_size_that_ghost_batches_may_not_divide_is_an_error():
    params, state, *_ = problem()

    def exported(size):
        x = jax.ShapeDtypeStruct((*export.symbolic_shape(size), 3), jnp.float32)
        return round_trip(partial(bn_apply, train=True, ghost_size=4), params, state, x)

    with pytest.raises(ValueError, match=r"^ghost_size: got 4; expected a divisor of the batch of n; use one of its"):
        exported("n")
    y, _ = exported("4*n").call(params, state, jnp.arange(24.0, dtype=jnp.float32).reshape(8, 3))
    assert y.shape == (8, 3)


def test_one_export_serves_all_platforms():
    params, state, x, _ = problem()
    fn = partial(step, train=True)
    platforms = ("cpu", "cuda", "tpu")
    read = round_trip(fn, params, state, x, platforms=platforms)
    assert read.platforms == platforms
    assert_close(read.call(params, state, x), jax.jit(fn)(params, state, x))


READER = """
import sys, jax, jax.export
import jbn
params, state = jbn.bn_init(3)
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
y, stats, new = exported.call(params, state, jax.numpy.ones((6, 3), jax.numpy.float32))
print(type(stats).__name__, type(new).__name__, new.count.tolist())
"""


def test_another_process_reads_it_after_importing_jbn(tmp_path):
    params, state, x, _ = problem()
    file = tmp_path / "step.bin"
    file.write_bytes(export.export(jax.jit(partial(step, train=True)))(params, state, x).serialize())
    done = subprocess.run([sys.executable, "-c", READER, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=2) == ["BNStats", "BNState", "[1, 1, 1]\n"]
