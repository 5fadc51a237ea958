"""What there is around a layer, counted: the size of its programs, and what an eager call runs."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support.counting import compilations

from jbn import bn_apply, bn_init, bn_update_stats

LARGE = (64, 64, 64)  # more values than a second read is free for
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def layer(params, state, x):
    """BN, relu and the update of the running statistics."""
    y, stats = bn_apply(params, state, x, train=True)
    return jax.nn.relu(y), bn_update_stats(state, stats)


def gradient(params, state, x):
    def loss(params, x):
        y, new = layer(params, state, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), new

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def equations(fn, *args):
    """How many equations the jaxpr has, those of its parts included."""

    def count(jaxpr):
        parts = [sub for eqn in jaxpr.eqns for value in eqn.params.values() for sub in _jaxprs(value)]
        return len(jaxpr.eqns) + sum(map(count, parts))

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxprs(value):
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in _jaxprs(item)]
    return [value] if hasattr(value, "eqns") else [value.jaxpr] if hasattr(value, "jaxpr") else []


def instructions(fn, *args):
    """How many the HLO module has before it is optimized."""
    text = jax.jit(fn).lower(*args).as_text(dialect="hlo")
    return len(re.findall(r"^\s+(?:ROOT )?\S+ = ", text, re.MULTILINE))


def kernels(fn, *args):
    """Fusions of the compiled module: each costs its compilation and its launch."""
    return jax.jit(fn).lower(*args).compile().as_text().count(" fusion(")


def arguments(dtype, shape=LARGE):
    return *bn_init(shape[-1]), jax.random.normal(jax.random.key(0), shape, dtype)


@DTYPES
def test_the_program_of_a_layer_is_small(dtype):
    """The jaxpr holds the ways of three platforms, two of them with a branch; the program that of one."""
    args = arguments(dtype)
    assert 50 < equations(layer, *args) <= 215
    assert 50 < instructions(layer, *args) <= 230
    assert 5 < kernels(layer, *args) <= 16


@DTYPES
def test_the_program_of_its_gradient_is_small(dtype):
    args = arguments(dtype)
    assert 50 < equations(gradient, *args) <= 290
    assert 50 < instructions(gradient, *args) <= 340
    assert 5 < kernels(gradient, *args) <= 20


@DTYPES
def test_a_small_batch_costs_fewer_kernels_still(dtype):
    args = arguments(dtype, (16, 8))
    assert 2 < kernels(layer, *args) <= 11
    assert 2 < kernels(gradient, *args) <= 13


def test_layers_of_one_shape_share_one_program():
    params, state, x = arguments(jnp.float32)

    def network(depth):
        def loss(params, x):
            news = []
            for own in params:
                x, new = layer(own, state, x)
                news.append(new)
            return jnp.mean(jnp.square(x)), news

        return jax.grad(loss, argnums=(0, 1), has_aux=True)

    one, two, eight = (instructions(network(n), [params] * n, x) for n in (1, 2, 8))
    assert two - one <= one / 10
    assert eight <= one + 7 * (two - one)


def test_an_eager_gradient_is_a_few_compiled_pieces():
    """Some versions of JAX run what is linear in it equation by equation."""
    params, _, x = arguments(jnp.float32, (24, 5))

    def backward():
        out, vjp, _ = jax.vjp(lambda p, x: bn_apply(p, None, x, train=True), params, x, has_aux=True)
        return vjp(out)

    with compilations() as seen:
        jax.block_until_ready(backward())
    assert 1 <= len(seen) <= 25


def test_the_import_brings_nothing_but_jbn_and_the_standard_library():
    """What it costs beyond jax is then its own few files."""
    code = "import sys, jax; before = set(sys.modules); import jbn; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = {name.split(".")[0] for name in done.stdout.split()}
    assert "jbn" in new
    assert new <= {"jbn", "jax", *sys.stdlib_module_names}
