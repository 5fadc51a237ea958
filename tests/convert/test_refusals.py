"""What is wrong about a foreign tree is said in one line that names the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusals import assert_refused, refusals

import jbn
from jbn import convert

PARAMS, STATE = jbn.bn_init(2)
TORCH = convert.to_torch(PARAMS, STATE, "bn")
FLAX = convert.to_flax(PARAMS, STATE, "bn")
HAIKU = convert.to_haiku(PARAMS, STATE, "bn", ndim=4)
EQUINOX = convert.to_equinox(PARAMS, STATE, "bn")
KERAS = convert.to_keras(PARAMS, STATE, "bn")


def torch(prefix="bn", drop=(), **entries):
    changed = {f"bn.{name}": value for name, value in entries.items()}
    return lambda: convert.from_torch({k: v for k, v in (TORCH | changed).items() if k not in drop}, prefix)


def flax(collection, name, value):
    """With one variable exchanged, or without it."""
    tree = {c: {"bn": dict(v["bn"])} for c, v in FLAX.items()}
    tree[collection]["bn"][name] = value
    return lambda: convert.from_flax(tree, "bn")


def haiku(axis=-1, **var_ema):
    params, state = HAIKU
    changed = {**state, "bn/~/var_ema": {**state["bn/~/var_ema"], **var_ema}}
    return lambda: convert.from_haiku((params, changed), "bn", axis=axis)


ONES = np.ones(2, np.float32)

REFUSALS = [
    (
        torch(drop=["bn.running_var"]),
        ValueError,
        "state_dict: got no bn.running_var; expected the running statistics running_mean, running_var; convert a layer "
        "that keeps them.",
    ),
    (
        torch(scale=ONES),
        ValueError,
        "state_dict['bn.scale']: got a key that is no part of a batch norm; expected bias, num_batches_tracked, "
        "running_mean, running_var, weight; leave it out, or name the layer in prefix.",
    ),
    (
        torch(weight=np.ones(3, np.float32)),
        ValueError,
        "state_dict['bn.weight']: got shape (3,); expected (2,), that of state_dict['bn.running_mean']; pass the "
        "arrays of one layer.",
    ),
    (
        torch(weight=np.ones(2, np.int32)),
        TypeError,
        "state_dict['bn.weight']: got dtype int32; expected real floating-point numbers; look whether this is the "
        "array you mean.",
    ),
    (
        torch(bias=np.ones(2, np.complex64)),
        TypeError,
        "state_dict['bn.bias']: got dtype complex64; expected real floating-point numbers; look whether this is the "
        "array you mean.",
    ),
    (
        torch(running_var=np.array([1, -2], np.float32)),
        ValueError,
        "state_dict['bn.running_var']: got -2; expected variances of 0 or more; look for damage to the file, or for "
        "arrays that changed places.",
    ),
    (
        torch(running_mean=np.array([np.nan, np.inf], np.float32)),
        ValueError,
        "state_dict['bn.running_mean']: got 2 of 2 values that are NaN or infinite; expected finite numbers; take a "
        "checkpoint from before the training diverged, or look for damage to the file.",
    ),
    (
        torch(weight=[1.0, 2.0]),
        TypeError,
        "state_dict['bn.weight']: got builtins.list; expected an array; pass the values themselves.",
    ),
    (
        torch(weight=np.array(["a", "b"])),
        TypeError,
        "state_dict['bn.weight']: got dtype <U1; expected real floating-point numbers; look whether this is the array "
        "you mean.",
    ),
    (
        torch(weight=jax.ShapeDtypeStruct((2,), jnp.float32)),
        TypeError,
        "state_dict['bn.weight']: got jax.ShapeDtypeStruct; expected an array; pass the values themselves.",
    ),
    (
        torch(num_batches_tracked=np.int64(-1)),
        ValueError,
        "state_dict['bn.num_batches_tracked']: got -1; expected 0 or more; pass how many updates there were.",
    ),
    (
        torch(num_batches_tracked=np.float32(1)),
        TypeError,
        "state_dict['bn.num_batches_tracked']: got dtype float32; expected integers; pass how many updates there were.",
    ),
    (
        torch(num_batches_tracked=np.ones(2, np.int64)),
        ValueError,
        "state_dict['bn.num_batches_tracked']: got shape (2,); expected (), one number for a layer of shape (2,); pass "
        "the arrays of one layer.",
    ),
    (
        torch(prefix="norm"),
        ValueError,
        "prefix: got 'norm', where state_dict has no batch norm; expected one of 'bn'; name the layer in prefix, or "
        "convert the whole network with load_network.",
    ),
    (
        torch(prefix=""),
        ValueError,
        "prefix: got '', where state_dict has no batch norm; expected one of 'bn'; name the layer in prefix, or "
        "convert the whole network with load_network.",
    ),
    (
        torch(prefix=3),
        TypeError,
        "prefix: got int; expected a path, as text or as a tuple of names; pass 'block.bn'.",
    ),
    (
        lambda: convert.from_torch([ONES]),
        TypeError,
        "state_dict: got list; expected a mapping from names to arrays; pass a dict of arrays by name.",
    ),
    (
        lambda: convert.from_torch(TORCH, "bn", count=-1),
        ValueError,
        "count: got -1; expected 0 or more; pass how many updates there were.",
    ),
    (
        lambda: convert.from_torch(TORCH, "bn", count=[1, 2, 3]),
        ValueError,
        "count: got shape (3,); expected one number, or (2,); pass count=0.",
    ),
    (
        lambda: jax.jit(lambda w: convert.from_torch(TORCH | {"bn.weight": w}, "bn"))(ONES),
        TypeError,
        "state_dict['bn.weight']: got a traced value; expected an array with its values; convert before jax.jit and "
        "outside of it.",
    ),
    (
        flax("batch_stats", "mean", None),
        ValueError,
        "variables: got no bn/mean; expected the running statistics mean, var; convert a layer that keeps them.",
    ),
    (
        flax("params", "kernel", ONES),
        ValueError,
        "variables['params']['bn']['kernel']: got a key that is no part of a batch norm; expected bias, mean, scale, "
        "var; leave it out, or name the layer in prefix.",
    ),
    (
        flax("batch_stats", "var", np.ones((1, 2), np.float32)),
        ValueError,
        "variables['batch_stats']['bn']['var']: got shape (1, 2); expected (2,), that of "
        "variables['batch_stats']['bn']['mean']; pass the arrays of one layer.",
    ),
    (
        lambda: convert.from_flax(FLAX["params"], "bn"),
        ValueError,
        "variables: got neither 'params' nor 'batch_stats'; expected the collections that module.init returned; pass "
        "them whole, {'params': …, 'batch_stats': …}.",
    ),
    (
        lambda: convert.from_nnx(ONES),
        TypeError,
        "variables: got array of shape (2,); expected nested mappings of variables; pass nnx.state(model).",
    ),
    (
        lambda: convert.from_haiku(HAIKU[0], "bn"),
        TypeError,
        "variables: got dict; expected the pair (params, state) of two mappings; pass what init returned.",
    ),
    (
        haiku(counter=np.int32(3)),
        ValueError,
        "state['bn/~/var_ema']['counter']: got [3]; expected [0], that of the mean; pass the state of one layer.",
    ),
    (
        haiku(axis=1),
        ValueError,
        "state['bn/~/mean_ema']['average']: got shape (1, 1, 1, 2); expected rank 4 and size 1 everywhere but along "
        "axis 1; name the axis of the features in axis.",
    ),
    (
        haiku(axis=4),
        ValueError,
        "axis: got 4; expected different axes of an array of rank 4; name those of the features.",
    ),
    (
        lambda: convert.to_haiku(PARAMS, STATE, ""),
        ValueError,
        "prefix: got ''; expected the name of the module; pass 'batch_norm', Haiku's own.",
    ),
    (
        lambda: convert.from_equinox(EQUINOX["bn"]["weight"]),
        TypeError,
        "variables: got array of shape (2,); expected the pair (model, state) of equinox.nn.make_with_state, or nested "
        "mappings by field; pass the state beside the model.",
    ),
    (
        lambda: convert.to_equinox(PARAMS, STATE, mode="legacy"),
        ValueError,
        'mode: got \'legacy\'; expected "batch" or "ema"; pass that of the layer.',
    ),
    (
        lambda: convert.from_keras({**KERAS, "bn/moving_stddev": ONES}, "bn"),
        ValueError,
        "variables['bn/moving_stddev']: got a key that is no part of a batch norm; expected beta, gamma, moving_mean, "
        "moving_variance; leave it out, or name the layer in prefix.",
    ),
    (
        lambda: convert.from_keras(ONES),
        TypeError,
        "variables: got array of shape (2,); expected variables by path, or a list; pass {v.path: v for v in "
        "model.weights}.",
    ),
    (
        lambda: convert.from_nnx({"bn": {1: ONES, "1": ONES}}),
        ValueError,
        "variables['bn']['1']: got an array that has the name 'bn/1', as variables['bn'][1] has; expected one of a "
        "name; leave one of them out.",
    ),
    (
        lambda: convert.to_equinox(PARAMS, jbn.BNState(*STATE[:2], STATE.count + 1), momentum=1.0),
        ValueError,
        "momentum: got 1.0; expected less than 1; pass the share that the layer keeps.",
    ),
    (
        lambda: convert.to_torch(STATE, PARAMS),
        TypeError,
        "params: got BNState; expected BNParams; pass the first of the pair that bn_init returns: params, state = "
        "bn_init(...).",
    ),
]


@refusals(REFUSALS)
def test_what_is_wrong_is_named(call, error, text):
    assert_refused(call, error, text)


def test_float64_is_not_rounded_in_silence():
    with jax.enable_x64(False), pytest.raises(TypeError, match=r"^state_dict\['bn.running_var'\]: got dtype float64"):
        torch(running_var=np.ones(2))()
    with jax.enable_x64(True):
        assert torch(running_var=np.ones(2))()[1].mean.dtype == jnp.float64
