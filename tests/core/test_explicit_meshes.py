"""Arrays split over an explicit mesh in every way in which x·γ is legal: the values and gradients of one device.

The grid is the product of its parts. A run takes a share of it that touches each part; all of it runs with
``-m "nightly or not nightly"``.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jbn import BNParams, BNState, bn_apply, bn_update_stats

MESHES = {"8": ((8,), ("data",)), "4x2": ((4, 2), ("data", "model"))}

# (shape, feature axes); those of 8192 values are large enough for one read.
SHAPES = {
    "rows": ((16, 8), (1,)),
    "many rows": ((1024, 8), (1,)),
    "NHWC": ((8, 16, 8, 8), (3,)),
    "NCHW": ((8, 8, 16, 8), (1,)),
    "two feature axes": ((64, 16, 8), (1, 2)),
    "features apart": ((8, 16, 64), (0, 2)),
    "features first": ((8, 1024), (0,)),
}

# For each axis of x the mesh axis that it is split over.
LAYOUTS = {
    "whole": lambda ndim, axes: [None] * ndim,
    "batch": lambda ndim, axes: _split(ndim, _batch(ndim, axes), "data"),
    "batch over both": lambda ndim, axes: _split(ndim, _batch(ndim, axes), ("data", "model")),
    "last summed axis": lambda ndim, axes: _split(ndim, max(set(range(ndim)) - set(axes)), "data"),
    "channels": lambda ndim, axes: _split(ndim, axes[-1], "model"),
    "batch and channels": lambda ndim, axes: [
        "data" if a == _batch(ndim, axes) else "model" if a == axes[-1] else None for a in range(ndim)
    ],
}
# How γ, β and the state are split: not on the mesh, all of them everywhere, as the last feature axis allows.
VECTORS = ("off the mesh", "everywhere", "split", "params split", "state split")
OPTIONS = {
    "plain": {},
    "ghost": {"ghost_size": 4},
    "ghost across shards": {"ghost_size": 8},
    "renorm": {"renorm": (1.5, 0.5)},
    "mask of examples": {"mask": "examples"},
    "full mask": {"mask": "full"},
    "evaluation": {"train": False},
}


def _batch(ndim, axes):
    return min(set(range(ndim)) - set(axes))


def _split(ndim, axis, entry):
    return [entry if a == axis else None for a in range(ndim)]


def _names(entry):
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _legal(case):
    mesh, shape, layout, vectors, option = case
    dims, axes = SHAPES[shape]
    parts = dict(zip(*reversed(MESHES[mesh]), strict=True))
    spec = LAYOUTS[layout](len(dims), axes)
    used = {name for entry in spec for name in _names(entry)}
    if "split" in vectors and (layout == "batch over both" or "model" not in parts):
        return False  # "model" would stand for two axes of x·γ
    if not used <= set(parts) or any(
        n % np.prod([parts[m] for m in _names(e)]) for n, e in zip(dims, spec, strict=True)
    ):
        return False
    return not ("ghost" in option and (0 in axes or dims[0] % OPTIONS[option]["ghost_size"]))


GRID = [case for case in itertools.product(MESHES, SHAPES, LAYOUTS, VECTORS, OPTIONS) if _legal(case)]


@cache
def problem(shape, masked, size):
    dims, axes = SHAPES[shape]
    rng = np.random.default_rng(0)
    features = tuple(dims[a] for a in axes)
    x, w = rng.normal(size=(2, *dims)).astype(np.float32)
    gamma, beta, mean, var = rng.normal(size=(4, *features)).astype(np.float32)
    params = BNParams(gamma + 1, beta)
    state = BNState(mean / 4, var**2 + 0.5, rng.integers(0, 4, features).astype(np.int32))
    mask = None
    if masked:
        kept = dims if masked == "full" else [n if a == _batch(len(dims), axes) else 1 for a, n in enumerate(dims)]
        mask = rng.random(kept) < 0.7
    return params, state, x, mask, w


def run(axis, options, params, state, x, mask, w):
    def loss(params, x):
        y, stats = bn_apply(params, state, x, axis=axis, mask=mask, **options)
        shown = y if mask is None else jnp.where(mask, y, 0)
        return jnp.sum(jnp.sin(shown) * w), (y, stats, bn_update_stats(state, stats))

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return out, gradients


@cache
def compiled(axis, options):
    return jax.jit(partial(run, axis, dict(options)))


def arguments(shape, option):
    options = {"train": True, **OPTIONS[option]}
    masked = options.pop("mask", None)
    return SHAPES[shape][1], tuple(options.items()), problem(shape, masked, None)


@cache
def whole(shape, option):
    axis, options, given = arguments(shape, option)
    return compiled(axis, options)(*given)


def placed(case):
    mesh, shape, layout, vectors, option = case
    sizes, names = MESHES[mesh]
    mesh = jax.make_mesh(sizes, names)
    axis, options, (params, state, x, mask, w) = arguments(shape, option)
    spec = LAYOUTS[layout](x.ndim, axis)

    def put(a, entries):
        return jax.device_put(a, NamedSharding(mesh, P(*entries)))

    split = [None] * (len(axis) - 1) + ["model"]
    if vectors != "off the mesh":
        params = jax.tree.map(lambda v: put(v, split if vectors in ("split", "params split") else []), params)
        state = jax.tree.map(lambda v: put(v, split if vectors in ("split", "state split") else []), state)
    mask_spec = None if mask is None else [e if mask.shape[a] > 1 else None for a, e in enumerate(spec)]
    mask = None if mask is None else put(mask, mask_spec)
    return axis, options, (params, state, put(x, spec), mask, put(w, spec))


def spec_of(a):
    return tuple(jax.typeof(a).sharding.spec)


def name_of(case):
    return "-".join(case).replace(" ", "_")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if i % 41 == 0 else pytest.mark.nightly, id=name_of(c)) for i, c in enumerate(GRID)],
)
def test_values_gradients_and_layouts_are_those_of_one_device(case):
    axis, options, given = placed(case)
    params, state, x, _, _ = given
    (y, _, new), (dparams, dx) = got = compiled(axis, options)(*given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole(case[1], case[4])), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max()))
    over = [a for a in range(x.ndim) if a not in axis]
    product = jax.eval_shape(lambda x, g: x * lax.expand_dims(g, over), x, params.gamma)
    assert spec_of(y) == tuple(product.sharding.spec)
    for a, b in zip(jax.tree.leaves((dx, dparams, new)), jax.tree.leaves((x, params, state)), strict=True):
        assert (a.shape, a.dtype, spec_of(a)) == (b.shape, b.dtype, spec_of(b))
