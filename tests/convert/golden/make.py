"""Writes one small file per format: a batch norm as its framework stored it, and what it computed with it.

Run from the root of the checkout, with the extra ``parity`` installed: ``python tests/convert/golden/make.py``. Only
the frameworks' own layers are used, none of jbn's, so that the files hold jbn to the frameworks also where those are
not installed.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import keras
import numpy as np
import torch
from flax import nnx, traverse_util

HERE = Path(__file__).parent
MOMENTUM, FEATURES = 0.9, 3
RNG = np.random.default_rng(0)
BATCHES = (RNG.normal(size=(4, 8, FEATURES)) * [0.5, 1, 3] + [-1, 0, 4]).astype(np.float32)
GAMMA, BETA = RNG.uniform(0.5, 2, (2, FEATURES)).astype(np.float32)
BEFORE, LAST, X = BATCHES[:2], BATCHES[2], BATCHES[3]  # two batches, the third, and one to evaluate


def save(name, variables, y, after):
    """``before:`` the third batch, y of an evaluation then, and ``after:`` that batch."""
    arrays = {f"before:{k}": np.asarray(v) for k, v in variables.items()}
    arrays |= {f"after:{k}": np.asarray(v) for k, v in after.items()}
    np.savez(HERE / f"{name}.npz", last=LAST, x=X, y=np.asarray(y), **arrays)


def from_torch():
    layer = torch.nn.BatchNorm1d(FEATURES, momentum=1 - MOMENTUM)
    layer.load_state_dict({**layer.state_dict(), "weight": torch.tensor(GAMMA), "bias": torch.tensor(BETA)})
    for batch in BEFORE:
        layer(torch.tensor(batch))
    before = {k: v.numpy().copy() for k, v in layer.state_dict().items()}
    y = layer.eval()(torch.tensor(X)).detach().numpy()
    layer.train()(torch.tensor(LAST))
    save("torch", before, y, {k: v.numpy() for k, v in layer.state_dict().items()})


def from_flax():
    layer = nn.BatchNorm(momentum=MOMENTUM, use_fast_variance=False)
    variables = {
        "params": {"scale": GAMMA, "bias": BETA},
        "batch_stats": {"mean": np.zeros(FEATURES, np.float32), "var": np.ones(FEATURES, np.float32)},
    }

    def train(variables, batch):
        return {**variables, **layer.apply(variables, batch, False, mutable=["batch_stats"])[1]}

    for batch in BEFORE:
        variables = train(variables, batch)
    flat = [traverse_util.flatten_dict(v, sep="/") for v in (variables, train(variables, LAST))]
    save("flax", flat[0], layer.apply(variables, X, True), flat[1])


def from_nnx():
    layer = nnx.BatchNorm(FEATURES, momentum=MOMENTUM, use_fast_variance=False, rngs=nnx.Rngs(0))
    nnx.update(layer, {"scale": GAMMA, "bias": BETA})
    for batch in BEFORE:
        layer(batch, use_running_average=False)
    before, y = nnx.to_pure_dict(nnx.state(layer)), layer(X, use_running_average=True)
    layer(LAST, use_running_average=False)
    save("nnx", before, y, nnx.to_pure_dict(nnx.state(layer)))


def from_haiku():
    layer = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, MOMENTUM)(x, train))
    _, state = layer.init(None, X, True)
    params = {"batch_norm": {"scale": GAMMA[None], "offset": BETA[None]}}
    for batch in BEFORE:
        _, state = layer.apply(params, state, None, batch, True)
    y, _ = layer.apply(params, state, None, X, False)
    _, after = layer.apply(params, state, None, LAST, True)
    # A module and what it holds, apart from each other: both have slashes, and none of them a colon.
    flat = [{f"{m}:{k}": a for m, held in {**params, **s}.items() for k, a in held.items()} for s in (state, after)]
    save("haiku", flat[0], y, flat[1])


def from_equinox(mode):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(FEATURES, "batch", momentum=MOMENTUM, mode=mode)
    layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jax.numpy.asarray(GAMMA), jax.numpy.asarray(BETA)))
    fields = ("batch_counter", "batch_state_index") if mode == "batch" else ("ema_first_time_index", "ema_state_index")

    def call(layer, x, state):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    def named(state):
        first, (mean, var) = (state.get(getattr(layer, field)) for field in fields)
        return {"weight": GAMMA, "bias": BETA, fields[0]: first, f"{fields[1]}/0": mean, f"{fields[1]}/1": var}

    for batch in BEFORE:
        _, state = call(layer, batch, state)
    y, _ = call(eqx.nn.inference_mode(layer), X, state)
    before = {k: np.asarray(v) for k, v in named(state).items()}
    save(f"equinox_{mode}", before, y, named(call(layer, LAST, state)[1]))


def from_keras():
    layer = keras.layers.BatchNormalization(momentum=MOMENTUM, name="bn")
    layer.build((None, FEATURES))
    layer.set_weights([GAMMA, BETA, np.zeros(FEATURES), np.ones(FEATURES)])
    for batch in BEFORE:
        layer(batch, training=True)
    before, y = {v.path: np.array(v) for v in layer.weights}, layer(X, training=False)
    layer(LAST, training=True)
    save("keras", before, y, {v.path: np.array(v) for v in layer.weights})


if __name__ == "__main__":
    for write in (from_torch, from_flax, from_nnx, from_haiku, from_keras):
        write()
    for each in ("batch", "ema"):
        from_equinox(each)
    sys.stdout.write(f"{sorted(path.name for path in HERE.glob('*.npz'))}\n")
