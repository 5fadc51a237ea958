"""What one batch norm costs, counted rather than timed: reductions, memory, collectives, compilations."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.counting import compilations, compile_hlo, jaxpr_reductions

from jbn import bn_apply, bn_init, bn_update_stats

N, C = 4096, 64
SIZE = N * C
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def batch(dtype, n=N):
    return jax.random.normal(jax.random.key(0), (n, C), dtype)


def forward(params, x, **options):
    return bn_apply(params, None, x, train=True, **options)


def forward_backward(params, x, ct, **options):
    y, vjp, stats = jax.vjp(partial(forward, **options), params, x, has_aux=True)
    return y, stats, vjp(ct)


@DTYPES
def test_backward_is_two_reductions(dtype):
    params, _ = bn_init(C)
    out, vjp = jax.vjp(forward, params, batch(dtype))
    assert jaxpr_reductions(lambda vjp, ct: vjp(ct), vjp, out, size=SIZE, branch=max) == 2


@DTYPES
def test_ordinary_data_costs_two_reductions_forward_and_offset_data_two_more(dtype):
    params, _ = bn_init(C)
    count = partial(jaxpr_reductions, forward, params, batch(dtype), size=SIZE)
    assert count(branch=min) <= 2
    assert count(branch=max) <= 4


@DTYPES
def test_compiled_forward_and_backward_are_four_reductions_and_two_full_size_fusions(dtype):
    params, _ = bn_init(C)
    x = batch(dtype)
    hlo, _ = compile_hlo(forward_backward, params, x, x)
    assert 2 < hlo.reductions(SIZE) <= 4
    assert hlo.reductions(SIZE, branch=max) <= 6
    assert hlo.full_size_results(SIZE, branch=max) == 2  # y and dx, nothing in between


@DTYPES
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_forward_writes_nothing_of_full_size_but_its_result(dtype, train):
    params, state = bn_init(C)
    hlo, _ = compile_hlo(partial(bn_apply, train=train), params, state, batch(dtype))
    assert hlo.full_size_results(SIZE, branch=max) == 1
    assert hlo.reductions(SIZE) == (2 if train else 0)


def test_the_counts_see_what_the_plain_formula_wastes():
    def plain(x, ct):
        def normalized(x):
            mean = jnp.mean(x, 0, keepdims=True)
            return (x - mean) / jnp.sqrt(jnp.var(x, 0, keepdims=True) + 1e-5)

        y, vjp = jax.vjp(normalized, x)
        return y, vjp(ct)

    x = batch(jnp.float32)
    hlo, _ = compile_hlo(plain, x, x)
    assert hlo.reductions(SIZE) > 4
    assert jaxpr_reductions(plain, x, x, size=SIZE) > 4


@DTYPES
def test_backward_keeps_one_residual_of_the_size_of_x(dtype):
    params, _ = bn_init(C)
    x = batch(dtype)
    for fn in (forward, jax.jit(forward)):
        _, vjp = jax.vjp(fn, params, x)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) <= 1.01 * x.nbytes


@DTYPES
def test_evaluation_keeps_one_residual_of_the_size_of_x(dtype):
    params, state = bn_init(C)
    x = batch(dtype)
    _, vjp = jax.vjp(partial(bn_apply, train=False), params, state, x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) <= 1.01 * x.nbytes


@DTYPES
def test_no_temporary_comes_near_the_size_of_x(dtype):
    params, state = bn_init(C)
    x = batch(dtype)
    for fn, args in (
        (forward, (params, x)),
        (forward_backward, (params, x, x)),
        (partial(bn_apply, train=False), (params, state, x)),
    ):
        _, memory = compile_hlo(fn, *args)
        assert memory.temp_size_in_bytes <= 0.01 * x.nbytes


MASKS = pytest.mark.parametrize("mask_shape", [(32, 1, 1, 1), (32, 28, 28, 1)], ids=["examples", "pixels"])


@DTYPES
@MASKS
def test_a_mask_adds_no_temporary_that_comes_near_the_size_of_x(dtype, mask_shape):
    params, _ = bn_init(C)
    x, mask = jax.random.normal(jax.random.key(0), (32, 28, 28, C), dtype), jnp.ones(mask_shape, bool)
    for fn, args in ((forward, (params, x)), (forward_backward, (params, x, x))):
        hlo, memory = compile_hlo(lambda *args, fn=fn: fn(*args, mask=mask), *args)
        # One selection: it lies where a result is put later, the output in forward and dx in backward.
        assert hlo.full_size_results(x.size) <= 1 + 2 * (fn is forward_backward)
        assert memory.temp_size_in_bytes <= 0.03 * x.nbytes  # the mask itself, at most twice


@DTYPES
def test_a_mask_adds_no_residual_and_no_reduction_to_ordinary_data(dtype):
    params, _ = bn_init(C)
    x, mask = batch(dtype), jnp.ones((N, 1), bool)
    _, vjp = jax.vjp(partial(forward, mask=mask), params, x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) <= 1.01 * x.nbytes + mask.nbytes
    hlo, _ = compile_hlo(partial(forward_backward, mask=mask), params, x, x)
    assert hlo.reductions(SIZE) <= 4


@DTYPES
def test_channels_first_images_cost_the_same(dtype):
    params, _ = bn_init(16)
    x = jax.random.normal(jax.random.key(0), (32, 16, 32, 32), dtype)
    step = partial(forward_backward, axis=1)
    hlo, memory = compile_hlo(step, params, x, x)
    assert hlo.reductions(x.size) <= 4
    assert hlo.full_size_results(x.size, branch=max) <= 2
    assert memory.temp_size_in_bytes <= 0.01 * x.nbytes


def sharded(fn, in_specs, out_specs):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


@DTYPES
def test_synchronized_forward_is_one_collective(dtype):
    params, _ = bn_init(C)
    step = sharded(partial(forward, axis_name="data"), (P(), P("data")), (P("data"), P()))
    hlo, _ = compile_hlo(step, params, batch(dtype))
    assert hlo.collectives_met() == 1  # a second where digits were lost


@DTYPES
def test_synchronized_backward_is_one_collective(dtype):
    """That of x: the sum of the parameters' gradients over devices is data parallelism's own."""
    params, _ = bn_init(C)
    x = batch(dtype)

    def gradient(x, ct):
        y, vjp, stats = jax.vjp(lambda x: forward(params, x, axis_name="data"), x, has_aux=True)
        return y, stats, vjp(ct)

    step = sharded(gradient, (P("data"), P("data")), (P("data"), P(), P("data")))
    hlo, _ = compile_hlo(step, x, x)
    assert hlo.collectives_met() == 2, [c.opcode for c in hlo.collectives()]


def test_parameter_gradients_add_one_collective_and_each_carries_a_few_numbers_for_each_channel():
    params, _ = bn_init(C)
    x = batch(jnp.float32)
    step = sharded(
        partial(forward_backward, axis_name="data"),
        (P(), P("data"), P("data")),
        (P("data"), P(), (P(), P("data"))),
    )
    hlo, _ = compile_hlo(step, params, x, x)
    assert len(hlo.collectives()) <= 3
    assert all(max(c.sizes) <= 4 * 8 * C for c in hlo.collectives())


def test_the_second_training_step_does_not_compile():
    @jax.jit
    def step(params, state, x):
        def loss(params):
            y, stats = bn_apply(params, state, x, train=True)
            return jnp.mean(jnp.tanh(y)), stats

        grads, stats = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, bn_update_stats(state, stats)

    params, state = bn_init(8)
    x = jax.random.normal(jax.random.key(0), (16, 8), jnp.float32)
    with compilations() as first:
        params, state = step(params, state, x)
    with compilations() as later:
        for _ in range(3):
            params, state = step(params, state, x + 1)
        jax.block_until_ready(state)
    assert len(first) >= 1
    assert len(later) <= 1  # that of x + 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_second_eager_call_does_not_compile(train):
    params, state = bn_init(7)
    x, other = jax.random.normal(jax.random.key(0), (2, 16, 7), jnp.float32)

    def call(x):
        y, stats = bn_apply(params, state, x, train=train, mask=jnp.ones((16, 1), bool))
        return y, bn_update_stats(state, stats)

    with compilations() as first:
        call(x)
    with compilations() as second:
        call(other)
    assert len(first) >= 1
    assert not second


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_an_eager_call_is_one_compiled_piece(train, masked):
    params, state = bn_init(9)
    x, mask = jnp.zeros((12, 9), jnp.float32), jnp.ones((12, 1), bool) if masked else None
    with compilations() as applied:
        _, stats = bn_apply(params, state, x, train=train, mask=mask, eps=0.25)
    with compilations() as updated:
        bn_update_stats(state, stats, momentum=0.25)
    assert len(applied) == 1
    assert len(updated) <= 1


def test_an_eager_gradient_does_not_compile_twice():
    params, _ = bn_init(7)
    x, other = jax.random.normal(jax.random.key(0), (2, 16, 7), jnp.float32)

    def gradient(x):
        out, vjp = jax.vjp(forward, params, x)
        return vjp(out)

    with compilations() as first:
        gradient(x)
    with compilations() as second:
        gradient(other)
    assert len(first) >= 1
    assert not second
