"""Keras's batch normalization and the door to it with the same variables, and what a call of either computes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

import jbn.keras

Stock = keras.layers.BatchNormalization
Door = jbn.keras.BatchNormalization


class Call(NamedTuple):
    """The output of a call in the function f(y) = Σ w·sin(y), the gradients of f, and the variables afterwards."""

    y: Any
    x_gradient: Any
    gradients: list[Any]
    variables: list[Any]


def twins(shape, seed=0, trainable=True, **options):
    """A stock layer and a door, built for ``shape``, with the same random variables."""
    layers = [make(**options) for make in (Stock, Door)]
    rng = np.random.default_rng(seed)
    for layer in layers:
        layer.build(shape)
        layer.trainable = trainable
    values = [rng.uniform(0.5, 1.5, v.shape) for v in layers[0].weights]
    for layer in layers:
        layer.set_weights(values)
    return layers


def call(layer, x, mask=None, training=True, weights=None):
    """What a call of ``layer`` computes, without a trace in the layer; ``weights`` (1 by default) are those of f."""

    def f(trainable, x):
        y, others = layer.stateless_call(trainable, others_before, x, training=training, mask=mask)
        wide = jnp.sin(y.astype(jnp.promote_types(y.dtype, jnp.float32)))
        if weights is not None:  # a selection, so that what is left out may be anything
            wide = jnp.where(weights != 0, wide * weights, 0)
        return wide.sum(), (y, others)

    trainable_before = [v.value for v in layer.trainable_variables]
    others_before = [v.value for v in layer.non_trainable_variables]
    (gradients, x_gradient), (y, others) = jax.grad(f, (0, 1), has_aux=True)(trainable_before, jnp.asarray(x))
    return Call(y, x_gradient, gradients, others)
