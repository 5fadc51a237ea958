"""The batch norm of each framework behind one face: its variables, a training batch, an evaluation."""

from typing import Any, ClassVar

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
from flax import nnx

import jbn.equinox
import jbn.haiku
import jbn.keras
import jbn.linen
import jbn.nnx
from jbn import convert

FEATURES, MOMENTUM = 3, 0.9


class Layer:
    """A layer with γ, β of its own for x of shape (N, 3).

    Subclasses know how to make one, and say in ``update`` what `jbn.bn_update_stats` needs to do as they do.
    """

    prefix = ""
    eps = 1e-5
    counts = False  # whether the format holds how many updates there were
    update: ClassVar[dict[str, Any]] = {"momentum": MOMENTUM, "debias": False, "unbiased": False}

    def loaded(self):
        return self.read(self.variables)


class Linen(Layer):
    read, write = staticmethod(convert.from_flax), staticmethod(convert.to_flax)

    def __init__(self, door, affine=True):
        kind = jbn.linen.BatchNorm if door else nn.BatchNorm
        self.layer = kind(momentum=MOMENTUM, use_scale=affine, use_bias=affine, use_fast_variance=False)
        self.variables = self.layer.init(jax.random.key(0), jnp.ones((2, FEATURES)), use_running_average=True)

    def train(self, x):
        y, updates = self.layer.apply(self.variables, x, use_running_average=False, mutable=["batch_stats"])
        self.variables = {**self.variables, **updates}
        return y

    def evaluate(self, x):
        return self.layer.apply(self.variables, x, use_running_average=True)


class Nnx(Layer):
    read, write = staticmethod(convert.from_nnx), staticmethod(convert.to_nnx)

    def __init__(self, door, affine=True):
        kind = jbn.nnx.BatchNorm if door else nnx.BatchNorm
        options = {"use_scale": affine, "use_bias": affine, "use_fast_variance": False}
        self.layer = kind(FEATURES, momentum=MOMENTUM, rngs=nnx.Rngs(0), **options)

    @property
    def variables(self):
        return nnx.state(self.layer)

    @variables.setter
    def variables(self, new):
        nnx.update(self.layer, new)

    def train(self, x):
        return self.layer(x, use_running_average=False)

    def evaluate(self, x):
        return self.layer(x, use_running_average=True)


class Haiku(Layer):
    counts = True
    update: ClassVar[dict[str, Any]] = {"momentum": MOMENTUM, "unbiased": False}

    def __init__(self, door, affine=True):
        kind = jbn.haiku.BatchNorm if door else hk.BatchNorm
        self.layer = hk.transform_with_state(lambda x, train: kind(affine, affine, MOMENTUM)(x, train))
        self.variables = self.layer.init(None, jnp.ones((2, FEATURES)), True)

    @staticmethod
    def read(variables, **options):
        return convert.from_haiku(variables, "batch_norm", **options)

    @staticmethod
    def write(params, state, **options):
        return convert.to_haiku(params, state, momentum=MOMENTUM, **options)

    def train(self, x):
        params, state = self.variables
        y, state = self.layer.apply(params, state, None, x, True)
        self.variables = params, state
        return y

    def evaluate(self, x):
        return self.layer.apply(*self.variables, None, x, False)[0]


class Equinox(Layer):
    mode = "batch"
    counts = True
    update: ClassVar[dict[str, Any]] = {"momentum": MOMENTUM, "unbiased": False}
    read = staticmethod(convert.from_equinox)

    def __init__(self, door, affine=True):
        kind = jbn.equinox.BatchNorm if door else eqx.nn.BatchNorm
        options = {"momentum": MOMENTUM, "mode": self.mode, "channelwise_affine": affine}
        self.variables = eqx.nn.make_with_state(kind)(FEATURES, "batch", **options)

    def write(self, params, state):
        return convert.to_equinox(params, state, like=self.variables)

    def _call(self, x, layer, axes):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, self.variables[1])

    def train(self, x):
        layer, _ = self.variables
        y, state = self._call(x, layer, None)
        self.variables = layer, state
        return y

    def evaluate(self, x):
        return self._call(x, eqx.nn.inference_mode(self.variables[0]), None)[0]


class EquinoxEma(Equinox):
    mode = "ema"
    counts = False


class Keras(Layer):
    eps = 1e-3
    read = staticmethod(convert.from_keras)

    def __init__(self, door, affine=True):
        kind = jbn.keras.BatchNormalization if door else keras.layers.BatchNormalization
        self.layer = kind(momentum=MOMENTUM, center=affine, scale=affine)
        self.layer.build((None, FEATURES))

    @staticmethod
    def write(params, state):
        return [*convert.to_keras(params, state).values()]

    @property
    def variables(self):
        return self.layer.weights

    @variables.setter
    def variables(self, new):
        self.layer.set_weights([np.asarray(v) for v in new])

    def train(self, x):
        return self.layer(x, training=True)

    def evaluate(self, x):
        return self.layer(x, training=False)


LAYERS = (Linen, Nnx, Haiku, Equinox, EquinoxEma, Keras)


def batch(seed, count=16):
    """Channels with means and spreads of their own."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, FEATURES)) * [0.5, 1, 3] + [-1, 0, 4]).astype(np.float32)


def trained(kind, steps=4, **options):
    """A layer that has seen some batches, with a γ and β of its own."""
    layer = kind(**options)
    for seed in range(steps):
        layer.train(batch(seed))
    params, state = layer.loaded()
    rng = np.random.default_rng(99)
    values = [None if v is None else jnp.asarray(rng.uniform(0.5, 2, FEATURES), v.dtype) for v in params]
    layer.variables = layer.write(type(params)(*values), state)
    return layer
