"""Every static error, in one table: the call, the exception, its full text."""

import builtins
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np  # noqa: F401
import pytest

from jbn import (  # noqa: F401
    BNStats,
    bn_affine,
    bn_apply,
    bn_calibrate,
    bn_fold,
    bn_init,
    bn_merge_stats,
    bn_update_stats,
    normalize_inputs,
)

C = 3
# Each call is an expression over these names and the imports, so that the table shows what was typed.
pair = params, state = bn_init(C)
x = jnp.ones((4, C), jnp.float32)
stats = BNStats(jnp.ones(C), jnp.ones(C), jnp.full(C, 4.0))
zero, two = jnp.float32(0), jnp.float32(2)
apply = partial(bn_apply, params, state, x, train=True)
apply_to = partial(bn_apply, params, state, train=True)
evaluate = partial(bn_apply, params, state, x, train=False)
observe = partial(bn_apply, train=True)


def traced(fn, value):
    return jax.jit(fn)(value)


TABLE = r"""
bn_init(0)
    ValueError: num_features: got 0; expected sizes of at least 1; pass the size of each feature axis.
bn_init((3, -1))
    ValueError: num_features: got (3, -1); expected sizes of at least 1; pass the size of each feature axis.
bn_init(2.5)
    TypeError: num_features: got 2.5; expected an int or a tuple of ints; pass the size of the feature axis,
    as in bn_init(64).
bn_init("64")
    TypeError: num_features: got '64'; expected an int or a tuple of ints; pass the size of the feature axis,
    as in bn_init(64).
traced(bn_init, 3)
    TypeError: num_features: got a traced value; expected a Python value, known when the function is traced;
    name it in static_argnames of jax.jit, or bind it with functools.partial.
bn_init(3, dtype=jnp.int32)
    TypeError: dtype: got int32; expected a floating-point dtype; pass jnp.float32.
bn_init(3, dtype="float33")
    TypeError: dtype: got 'float33'; expected a floating-point dtype; pass jnp.float32.
bn_init(3, use_gamma=1)
    TypeError: use_gamma: got 1; expected a bool; pass use_gamma=True or use_gamma=False.
bn_apply(params, state, x, train=1)
    TypeError: train: got 1; expected a bool; pass train=True or train=False.
bn_apply(params, state, x, train=np.True_)
    TypeError: train: got np.True_; expected a bool; pass train=True or train=False.
traced(lambda train: bn_apply(params, state, x, train=train), True)
    TypeError: train: got a traced value; expected a Python value, known when the function is traced; name it
    in static_argnames of jax.jit, or bind it with functools.partial.
bn_apply(params, state, jnp.ones((4, C), jnp.int32), train=True)
    TypeError: x: got dtype int32; expected a real floating-point array; convert it with
    x.astype(jnp.float32).
bn_apply(params, state, jnp.ones((4, C), jnp.complex64), train=False)
    TypeError: x: got dtype complex64; expected a real floating-point array; convert it with
    x.astype(jnp.float32).
bn_apply(params, state, np.ones((4, C), np.uint8), train=True)
    TypeError: x: got dtype uint8; expected a real floating-point array; convert it with
    x.astype(jnp.float32).
bn_apply(params, state, None, train=True)
    TypeError: x: got NoneType; expected a real floating-point array; pass the data.
bn_apply(params, state, "x", train=True)
    TypeError: x: got str; expected a real floating-point array; pass the data.
bn_apply(params, state, 1.0, train=True)
    ValueError: x: got rank 0; expected at least one axis, the features; pass x[None] for a single value.
apply(axis=2)
    ValueError: axis: got 2; expected -2 ≤ axis < 2 for x of rank 2; name feature axes that x has.
apply(axis=(1, -1))
    ValueError: axis: got (1, -1); expected distinct axes; name each feature axis once.
apply(axis=())
    ValueError: axis: got (); expected at least one feature axis; pass axis=-1 for channels last.
apply(axis=1.0)
    TypeError: axis: got 1.0; expected an int or a tuple of ints; name the feature axes, as in axis=-1.
apply(axis="C")
    TypeError: axis: got 'C'; expected an int or a tuple of ints; name the feature axes, as in axis=-1.
apply(axis=True)
    TypeError: axis: got True; expected an int or a tuple of ints; name the feature axes, as in axis=-1.
traced(lambda axis: apply(axis=axis), 1)
    TypeError: axis: got a traced value; expected a Python value, known when the function is traced; name it
    in static_argnames of jax.jit, or bind it with functools.partial.
traced(lambda axis: apply(axis=(0, axis)), 1)
    TypeError: axis: got a traced value; expected a Python value, known when the function is traced; name it
    in static_argnames of jax.jit, or bind it with functools.partial.
apply(axis=(0, 1))
    ValueError: params.gamma: got shape (3,); expected (4, 3), the size of x along axis; make it with
    bn_init((4, 3)), or name other feature axes in axis.
bn_apply(params._replace(beta=jnp.zeros(5)), state, x, train=True)
    ValueError: params.beta: got shape (5,); expected (3,), the size of x along axis; make it with bn_init(3),
    or name other feature axes in axis.
bn_apply(params._replace(gamma=1.0), state, x, train=True)
    ValueError: params.gamma: got shape (); expected (3,), the size of x along axis; make it with bn_init(3),
    or name other feature axes in axis.
bn_apply(params, bn_init(5)[1], x, train=True)
    ValueError: state.mean: got shape (5,); expected (3,), the size of x along axis; make it with bn_init(3),
    or name other feature axes in axis.
bn_apply(params, state._replace(var=jnp.ones(5)), x, train=False)
    ValueError: state.var: got shape (5,); expected (3,), the size of x along axis; make it with bn_init(3),
    or name other feature axes in axis.
bn_apply({"gamma": params.gamma, "beta": params.beta}, state, x, train=True)
    TypeError: params: got dict; expected BNParams; pass the first of the pair that bn_init returns: params,
    state = bn_init(...).
bn_apply(tuple(params), state, x, train=True)
    TypeError: params: got tuple; expected BNParams; pass the first of the pair that bn_init returns: params,
    state = bn_init(...).
bn_apply(pair, state, x, train=True)
    TypeError: params: got tuple; expected BNParams; pass the first of the pair that bn_init returns: params,
    state = bn_init(...).
bn_apply(state, params, x, train=True)
    TypeError: params: got BNState; expected BNParams; pass the first of the pair that bn_init returns:
    params, state = bn_init(...).
bn_apply(x, params, state, train=True)
    TypeError: x: got BNState; expected a real floating-point array; pass the data.
bn_apply(params, None, x, train=False)
    TypeError: state: got NoneType; expected BNState; pass the second of the pair that bn_init returns.
bn_apply(params, stats, x, train=False)
    TypeError: state: got BNStats; expected BNState; turn stats into a state with bn_update_stats(state,
    stats).
bn_apply(params, pair, x, train=True)
    TypeError: state: got tuple; expected BNState; unpack the pair of bn_init: params, state = bn_init(...).
bn_apply(params, {"bn": state}, x, train=True)
    TypeError: state: got dict; expected BNState; pass the second of the pair that bn_init returns.
apply(mask=jnp.ones((4, 1), jnp.int32))
    TypeError: mask: got dtype int32; expected bool, True where a value counts; convert it with
    mask.astype(bool).
apply(mask=jnp.ones(4, bool))
    ValueError: mask: got shape (4,); expected rank 2 with each size 1 or that of x (4, 3); give the missing
    axes size 1, as in mask[:, None].
apply(mask=jnp.ones((4, 2), bool))
    ValueError: mask: got shape (4, 2); expected rank 2 with each size 1 or that of x (4, 3); give the missing
    axes size 1, as in mask[:, None].
apply(mask=jnp.ones((1, 4, C), bool))
    ValueError: mask: got shape (1, 4, 3); expected rank 2 with each size 1 or that of x (4, 3); give the
    missing axes size 1, as in mask[:, None].
evaluate(mask=jnp.ones((4, 1), jnp.float32))
    TypeError: mask: got dtype float32; expected bool, True where a value counts; convert it with
    mask.astype(bool).
apply(eps=0)
    ValueError: eps: got 0; expected a finite number above 0; pass eps=1e-5 (without it a constant channel
    divides by zero).
apply(eps=-1e-5)
    ValueError: eps: got -1e-05; expected a finite number above 0; pass eps=1e-5 (without it a constant
    channel divides by zero).
apply(eps=zero)
    ValueError: eps: got 0.0; expected a finite number above 0; pass eps=1e-5 (without it a constant channel
    divides by zero).
evaluate(eps=0.0)
    ValueError: eps: got 0.0; expected a finite number above 0; pass eps=1e-5 (without it a constant channel
    divides by zero).
apply(eps="1e-5")
    TypeError: eps: got '1e-5'; expected one real number; pass a scalar.
apply(eps=True)
    TypeError: eps: got True; expected one real number; pass a scalar.
apply(eps=jnp.ones(C))
    TypeError: eps: got shape (3,); expected one real number; pass a scalar.
traced(lambda eps: apply(eps=eps), jnp.ones(C))
    TypeError: eps: got shape (3,); expected one real number; pass a scalar.
apply(axis_name="data")
    ValueError: axis_name: got 'data', which is not bound here; expected the name of an enclosing axis; call
    inside shard_map, pmap or vmap with that axis_name, or leave it out.
jax.vmap(partial(apply, axis_name=("i", "i")), axis_name="i", axis_size=2)()
    ValueError: axis_name: got ('i', 'i'); expected distinct names; name each axis once.
apply(axis_name=[["data"]])
    TypeError: axis_name: got [['data']]; expected an axis name or a tuple of them; pass the name that
    shard_map, pmap or vmap binds.
traced(lambda name: apply(axis_name=name), 1)
    TypeError: axis_name: got a traced value; expected a Python value, known when the function is traced; name
    it in static_argnames of jax.jit, or bind it with functools.partial.
bn_apply(params, state, x[:1], train=True)
    ValueError: x: got shape (1, 3), one value per channel; expected at least 2 in training, since the
    variance of one is 0; use a larger batch, synchronize over devices with axis_name, or pass train=False.
bn_apply(params, state, jnp.ones(C), train=True)
    ValueError: x: got shape (3,), one value per channel; expected at least 2 in training, since the variance
    of one is 0; use a larger batch, synchronize over devices with axis_name, or pass train=False.
jax.vmap(partial(bn_apply, params, state, train=True))(x[:, None])
    ValueError: x: got shape (1, 3), one value per channel; expected at least 2 in training, since the
    variance of one is 0; use a larger batch, synchronize over devices with axis_name, or pass train=False.
apply(ghost_size=3)
    ValueError: ghost_size: got 3; expected a divisor of the batch of 4; use one of 1, 2, 4.
apply(ghost_size=1)
    ValueError: ghost_size: got 1 for x of shape (4, 3), one value per channel in a block; expected at least 2,
    since the variance of one is 0; use a larger ghost_size, or pass train=False.
apply(ghost_size=0)
    ValueError: ghost_size: got 0; expected at least 1; pass the number of examples in a block.
apply(ghost_size=2.0)
    TypeError: ghost_size: got 2.0; expected an int; pass the number of examples in a block.
evaluate(ghost_size=True)
    TypeError: ghost_size: got True; expected an int; pass the number of examples in a block.
bn_apply(*bn_init((4, C)), x, train=True, axis=(0, 1), ghost_size=2)
    ValueError: ghost_size: got 2 with feature axis 0; expected the leading axis to be the batch; move the
    features to another axis.
traced(lambda size: apply(ghost_size=size), 2)
    TypeError: ghost_size: got a traced value; expected a Python value, known when the function is traced; name
    it in static_argnames of jax.jit, or bind it with functools.partial.
apply(renorm=3.0)
    ValueError: renorm: got 3.0; expected a pair (r_max, d_max); pass (1.0, 0.0) for plain batch norm.
apply(renorm=(3.0, 5.0, 1.0))
    ValueError: renorm: got (3.0, 5.0, 1.0); expected a pair (r_max, d_max); pass (1.0, 0.0) for plain batch
    norm.
apply(renorm=(0.5, 0.0))
    ValueError: renorm: got r_max = 0.5; expected at least 1; (1.0, 0.0) is plain batch norm.
apply(renorm=(1.0, -1.0))
    ValueError: renorm: got d_max = -1.0; expected at least 0; (1.0, 0.0) is plain batch norm.
evaluate(renorm=(float("nan"), 0.0))
    ValueError: renorm: got r_max = nan; expected at least 1; (1.0, 0.0) is plain batch norm.
apply(renorm=("3", 5.0))
    TypeError: renorm: got '3'; expected one real number; pass a scalar.
bn_apply(params, None, x, train=True, renorm=(3.0, 5.0))
    TypeError: state: got NoneType; expected BNState; pass the second of the pair that bn_init returns.
apply(axis_index_groups=((0, 1),))
    ValueError: axis_index_groups: got groups with 0 axis names; expected one name; pass axis_name, or name the
    axis of a mesh whose devices are to be synchronized.
evaluate(axis_name="data", axis_index_groups=3)
    TypeError: axis_index_groups: got 3; expected a tuple of tuples of ints; as in ((0, 1), (2, 3)).
jax.vmap(partial(apply, axis_name="i", axis_index_groups=((0,), (2,))), axis_name="i", axis_size=3)()
    ValueError: axis_index_groups: got ((0,), (2,)); expected each of the indices 0 to 2 in one group; name
    every index once.
jax.vmap(partial(apply_to, axis_name="i", axis_index_groups=((0, 1), (2,))), axis_name="i")(x[:3, None])
    ValueError: x: got shape (1, 3), one value per channel; expected at least 2 in training, since the
    variance of one is 0; use a larger batch, synchronize over devices with axis_name, or pass train=False.
bn_update_stats(state, stats, momentum=-0.1)
    ValueError: momentum: got -0.1; expected 0 ≤ momentum ≤ 1, the share kept; pass 1 - m for PyTorch's
    momentum m.
bn_update_stats(state, stats, momentum=1.1)
    ValueError: momentum: got 1.1; expected 0 ≤ momentum ≤ 1, the share kept; pass 1 - m for PyTorch's
    momentum m.
bn_update_stats(state, stats, momentum=two)
    ValueError: momentum: got 2.0; expected 0 ≤ momentum ≤ 1, the share kept; pass 1 - m for PyTorch's
    momentum m.
bn_update_stats(state, stats, momentum=None)
    TypeError: momentum: got None; expected one real number; pass a scalar.
bn_update_stats(state, stats, momentum=True)
    TypeError: momentum: got True; expected one real number; pass a scalar.
bn_update_stats(state, stats, momentum=jnp.ones(C))
    TypeError: momentum: got shape (3,); expected one real number; pass a scalar.
bn_update_stats(state, stats, debias=1)
    TypeError: debias: got 1; expected a bool; pass debias=True or debias=False.
bn_update_stats(state, stats, unbiased=None)
    TypeError: unbiased: got None; expected a bool; pass unbiased=True or unbiased=False.
traced(lambda flag: bn_update_stats(state, stats, debias=flag), True)
    TypeError: debias: got a traced value; expected a Python value, known when the function is traced; name it
    in static_argnames of jax.jit, or bind it with functools.partial.
traced(lambda flag: bn_update_stats(state, stats, unbiased=flag), True)
    TypeError: unbiased: got a traced value; expected a Python value, known when the function is traced; name
    it in static_argnames of jax.jit, or bind it with functools.partial.
bn_update_stats(stats, state)
    TypeError: state: got BNStats; expected BNState, or a pytree of them; stats are what a batch showed; the
    running statistics go first.
bn_update_stats(state, state)
    TypeError: stats: got BNState; expected BNStats; give it the structure of state, with None where there is
    no batch norm.
bn_update_stats(state, params)
    TypeError: stats: got BNParams; expected BNStats; give it the structure of state, with None where there is
    no batch norm.
bn_update_stats(params, stats)
    TypeError: state: got BNParams; expected BNState, or a pytree of them; params hold gamma and beta; bn_init
    returns (params, state).
bn_update_stats(pair, stats)
    TypeError: state: got tuple; expected BNState, or a pytree of them; unpack the pair of bn_init: params,
    state = bn_init(...).
bn_update_stats(state, apply())
    TypeError: stats: got tuple; expected BNStats; unpack the pair of bn_apply: y, stats = bn_apply(...).
bn_update_stats(state, None)
    TypeError: stats: got NoneType; expected BNStats; give it the structure of state, with None where there is
    no batch norm.
bn_update_stats(state, x)
    TypeError: stats: got array of shape (4, 3); expected BNStats; give it the structure of state, with None
    where there is no batch norm.
bn_update_stats(x, stats)
    TypeError: state: got array of shape (4, 3); expected BNState, or a pytree of them; pass what bn_init or a
    network's init returned.
bn_update_stats({"bn": state}, stats)
    ValueError: stats: got BNStats; expected dict with ['bn']; give it the structure of state, with None where
    there is no batch norm.
bn_update_stats({"bn": pair}, {"bn": stats})
    TypeError: state['bn']: got tuple; expected BNState, or a pytree of them; unpack the pair of bn_init:
    params, state = bn_init(...).
bn_update_stats({"bn": stats}, {"bn": state})
    TypeError: state['bn']: got BNStats; expected BNState, or a pytree of them; stats are what a batch showed;
    the running statistics go first.
bn_update_stats({"bn": state}, {"bn": state})
    ValueError: stats['bn']: got BNState; expected BNStats; give it the structure of state, with None where
    there is no batch norm.
bn_update_stats({"bn": params}, {"bn": stats})
    TypeError: state['bn']: got BNParams; expected BNState, or a pytree of them; params hold gamma and beta;
    bn_init returns (params, state).
bn_update_stats({"a": {"bn": state}}, {"a": {"bn": x}})
    ValueError: stats['a']['bn']: got array of shape (4, 3); expected BNStats; give it the structure of state,
    with None where there is no batch norm.
bn_update_stats({"a": state, "b": state}, {"a": stats})
    ValueError: stats: got dict with ['a']; expected dict with ['a'], ['b']; give it the structure of state,
    with None where there is no batch norm.
bn_update_stats({"a": state}, {"a": stats, "b": stats})
    ValueError: stats: got dict with ['a'], ['b']; expected dict with ['a']; give it the structure of state,
    with None where there is no batch norm.
bn_update_stats([state, state], [stats])
    ValueError: stats: got list with [0]; expected list with [0], [1]; give it the structure of state, with
    None where there is no batch norm.
bn_update_stats([state], (stats,))
    ValueError: stats: got tuple with [0]; expected list with [0]; give it the structure of state, with None
    where there is no batch norm.
bn_update_stats({"block": [state, state]}, {"block": [stats, {"bn": stats}]})
    ValueError: stats['block'][1]: got dict with ['bn']; expected BNStats; give it the structure of state,
    with None where there is no batch norm.
bn_update_stats(state, BNStats(*jnp.ones((3, 5))))
    ValueError: stats.mean: got shape (5,); expected (3,), that of state.mean; update each state with stats of
    its own layer.
bn_update_stats({"block": [bn_init(5)[1]]}, {"block": [stats]})
    ValueError: stats['block'][0].mean: got shape (3,); expected (5,), that of state['block'][0].mean; update
    each state with stats of its own layer.
bn_update_stats(state, stats._replace(count=4.0))
    ValueError: stats.count: got shape (); expected (3,), that of state.mean; update each state with stats of
    its own layer.
bn_update_stats(state._replace(var=jnp.ones(5)), stats)
    ValueError: state.var: got shape (5,); expected (3,), that of state.mean; update each state with stats of
    its own layer.
bn_update_stats({}, [])
    ValueError: stats: got empty list; expected empty dict; give it the structure of state, with None where
    there is no batch norm.
bn_merge_stats()
    ValueError: stats: got no arguments; expected at least one BNStats; pass what bn_apply returned.
bn_merge_stats(state)
    TypeError: stats: got BNState; expected BNStats, or a pytree of them; pass the stats that bn_apply
    returned.
bn_merge_stats(stats, state)
    TypeError: stats: got BNState; expected BNStats; give it the structure of stats, with None where there is
    no batch norm.
bn_merge_stats(stats, None)
    TypeError: stats: got NoneType; expected BNStats; give it the structure of stats, with None where there is
    no batch norm.
bn_merge_stats(x)
    TypeError: stats: got array of shape (4, 3); expected BNStats, or a pytree of them; pass the stats that
    bn_apply returned.
bn_merge_stats(apply())
    TypeError: stats: got tuple; expected BNStats, or a pytree of them; unpack the pair of bn_apply: y, stats
    = bn_apply(...).
bn_merge_stats({"a": stats}, {"b": stats})
    ValueError: stats: got dict with ['b']; expected dict with ['a']; give it the structure of stats, with
    None where there is no batch norm.
bn_merge_stats({"bn": stats}, {"bn": state})
    ValueError: stats['bn']: got BNState; expected BNStats; give it the structure of stats, with None where
    there is no batch norm.
bn_merge_stats(stats, BNStats(*jnp.ones((3, 5))))
    ValueError: stats: got shapes [(3,), (5,)]; expected one; merge statistics of the same layer.
bn_merge_stats({"a": [stats]}, {"a": [BNStats(*jnp.ones((3, 5)))]})
    ValueError: stats['a'][0]: got shapes [(3,), (5,)]; expected one; merge statistics of the same layer.
bn_merge_stats(stats, axis=1)
    ValueError: axis: got 1 for stats with fields of shape (3,); expected an axis of theirs; pass axis=None to
    merge the arguments with each other.
bn_merge_stats(stats, axis=0.0)
    TypeError: axis: got 0.0; expected None or an int; pass axis=0 where each argument is a stack.
bn_merge_stats(stats, axis=(0, 1))
    TypeError: axis: got (0, 1); expected None or an int; pass axis=0 where each argument is a stack.
bn_merge_stats(stats, axis=True)
    TypeError: axis: got True; expected None or an int; pass axis=0 where each argument is a stack.
traced(lambda axis: bn_merge_stats(stats, axis=axis), 0)
    TypeError: axis: got a traced value; expected a Python value, known when the function is traced; name it
    in static_argnames of jax.jit, or bind it with functools.partial.
bn_merge_stats(BNStats(jnp.ones((2, C)), jnp.ones((3, C)), jnp.ones((2, C))), axis=0)
    ValueError: stats: got shapes [(2, 3), (3, 3)]; expected one; merge statistics of the same layer.
normalize_inputs(jnp.ones((4, C), jnp.complex64))
    TypeError: x: got dtype complex64; expected a real floating-point array; convert it with
    x.astype(jnp.float32).
normalize_inputs(None)
    TypeError: x: got NoneType; expected a real floating-point array; pass the data.
normalize_inputs(x, axis=2)
    ValueError: axis: got 2; expected -2 ≤ axis < 2 for x of rank 2; name feature axes that x has.
normalize_inputs(x, state)
    TypeError: stats: got BNState; expected BNStats; pass what normalize_inputs returned for the training set.
normalize_inputs(x, normalize_inputs(x))
    TypeError: stats: got tuple; expected BNStats; unpack the pair: z, stats = normalize_inputs(...).
normalize_inputs(x, BNStats(*jnp.ones((3, 5))))
    ValueError: stats.mean: got shape (5,); expected (3,), the size of x along axis; pass the stats of data
    with the same features.
normalize_inputs(x, eps=-1e-5)
    ValueError: eps: got -1e-05; expected a finite number, at least 0; pass eps=0.0.
traced(lambda axis: normalize_inputs(x, axis=axis), 1)
    TypeError: axis: got a traced value; expected a Python value, known when the function is traced; name it
    in static_argnames of jax.jit, or bind it with functools.partial.
bn_affine(state, params)
    TypeError: params: got BNState; expected BNParams; pass the first of the pair that bn_init returns:
    params, state = bn_init(...).
bn_affine(params, stats)
    TypeError: state: got BNStats; expected BNState; turn stats into a state with bn_update_stats(state,
    stats).
bn_affine(bn_init(5)[0], state)
    ValueError: params.gamma: got shape (5,); expected (3,), that of state.mean; pass the params and the state of
    one layer.
bn_affine(params, state._replace(var=jnp.ones(5)))
    ValueError: state.var: got shape (5,); expected (3,), that of state.mean; pass the params and the state of
    one layer.
bn_affine(params, state, eps=0.0)
    ValueError: eps: got 0.0; expected a finite number above 0; pass eps=1e-5 (without it a constant channel
    divides by zero).
bn_fold(params, state, x.T)
    ValueError: kernel: got size 4 along kernel_axis -1 of shape (3, 4); expected 3, the size of state.mean; name
    the axis of the output features, -1 for kernels (…, in, out), 0 for OIHW.
bn_fold(params, state, x, kernel_axis=2)
    ValueError: kernel_axis: got 2; expected -2 ≤ kernel_axis < 2 for a kernel of rank 2; name the axis of the
    output features.
bn_fold(params, state, x, kernel_axis=(0, 1))
    TypeError: kernel_axis: got (0, 1); expected an int; pass -1 for kernels (…, in, out), 0 for OIHW.
bn_fold(params, state, x, kernel_axis=True)
    TypeError: kernel_axis: got True; expected an int; pass -1 for kernels (…, in, out), 0 for OIHW.
traced(lambda axis: bn_fold(params, state, x, kernel_axis=axis), 1)
    TypeError: kernel_axis: got a traced value; expected a Python value, known when the function is traced; name
    it in static_argnames of jax.jit, or bind it with functools.partial.
bn_fold(params, state, jnp.ones((4, C), jnp.int8))
    TypeError: kernel: got dtype int8; expected a real floating-point array; convert it with
    kernel.astype(jnp.float32).
bn_fold(params, state, {"W": x})
    TypeError: kernel: got dict; expected a real floating-point array; pass the data.
bn_fold(params, state, x, jnp.ones(4))
    ValueError: bias: got shape (4,); expected (3,), that of state.mean; pass one value for each output feature,
    or None.
bn_fold(params, state, x, jnp.ones(C, jnp.int32))
    TypeError: bias: got dtype int32; expected a real floating-point array; convert it with
    bias.astype(jnp.float32).
bn_fold(params, state, x, eps=-1.0)
    ValueError: eps: got -1.0; expected a finite number above 0; pass eps=1e-5 (without it a constant channel
    divides by zero).
bn_fold(*bn_init((2, C)), jnp.ones((2, 4, C)))
    ValueError: state.mean: got shape (2, 3); expected one axis, the output features of one kernel; fold layers
    that are stacked with jax.vmap.
bn_calibrate(observe, params, state, [])
    ValueError: batches: got an empty iterable; expected at least one batch; make it anew if it is a generator,
    which can be read only once.
bn_calibrate(observe, params, state, 3)
    TypeError: batches: got int; expected an iterable; pass a list, a generator or a data loader.
bn_calibrate(None, params, state, [x])
    TypeError: apply_fn: got NoneType; expected a function; pass it, not what it returns.
bn_calibrate(observe, params, state, [x], progress=1)
    TypeError: progress: got 1; expected a bool; pass progress=True or progress=False.
bn_calibrate(observe, params, stats, [x])
    TypeError: state: got BNStats; expected BNState, or a pytree of them; stats are what a batch showed; the
    running statistics go first.
bn_calibrate(observe, params, [None], [x])
    ValueError: state: got no BNState in it; expected at least one; pass that of a network with batch norm, any
    other has nothing to calibrate.
bn_calibrate(lambda *args: stats, params, state, [x])
    TypeError: apply_fn: got a function that returns BNStats; expected one that returns a pair (anything, stats);
    return what the network's apply returns in training.
bn_calibrate(lambda *args: (None, {"bn": stats}), params, state, [x])
    TypeError: stats: got dict with ['bn']; expected BNStats; give it the structure of state, with None where
    there is no batch norm.
bn_calibrate(lambda *args: (None, BNStats(*np.ones((3, 5)))), params, state, [x])
    ValueError: stats.mean: got shape (5,); expected (3,), that of state.mean; update each state with stats of
    its own layer.
bn_calibrate(lambda *args: (None, BNStats(*np.zeros((3, C)))), params, state, [x, x])
    ValueError: batches: got 2 without usable statistics, count 0 or not finite in all channels; expected one or
    more with; call the network with train=True in apply_fn, and look for NaN in data and weights.
traced(lambda x: bn_calibrate(observe, params, state, [x]), x)
    TypeError: apply_fn: got a function that returns traced stats; expected arrays; call bn_calibrate outside
    jax.jit and other transformations, since it reads batches on the host.
"""


def rows():
    """A call starts its line; the exception and its text follow, indented, in one or more lines."""
    for entry in re.split(r"\n(?=\S)", TABLE.strip()):
        call, _, rest = entry.partition("\n")
        exception, _, text = " ".join(line.strip() for line in rest.splitlines()).partition(": ")
        yield pytest.param(call, getattr(builtins, exception), text, id=call)


@pytest.mark.parametrize(("call", "exception", "text"), list(rows()))
def test_what_was_given_what_was_expected_and_what_to_do(call, exception, text):
    def run():
        return eval(call, globals())

    for attempt in (run, jax.jit(run)):  # eagerly, and when traced
        with pytest.raises(exception) as caught:
            attempt()
        assert type(caught.value) is exception
        assert str(caught.value) == text


@pytest.mark.parametrize(("call", "exception", "text"), list(rows()))
def test_an_error_is_one_line_with_the_name_of_the_argument_first(call, exception, text):
    assert re.fullmatch(r"[a-z_]+[\w.\[\]']*: got [^\n]+; expected [^\n]+; [^\n]+\.", text)
