"""An Equinox residual network as people publish them, written for Equinox's own layers, and a step that trains it."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Block(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.BatchNorm
    shortcut: eqx.nn.Sequential | None
    activation: Callable

    def __init__(self, before, channels, stride, mode, *, key):
        keys = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(before, channels, 3, stride, 1, use_bias=False, key=keys[0])
        self.norm1 = eqx.nn.BatchNorm(channels, "batch", mode=mode)
        self.conv2 = eqx.nn.Conv2d(channels, channels, 3, 1, 1, use_bias=False, key=keys[1])
        self.norm2 = eqx.nn.BatchNorm(channels, "batch", mode=mode)
        self.activation = jax.nn.relu
        self.shortcut = None
        if stride > 1:
            conv = eqx.nn.Conv2d(before, channels, 1, stride, use_bias=False, key=keys[2])
            self.shortcut = eqx.nn.Sequential([conv, eqx.nn.BatchNorm(channels, "batch", mode=mode)])

    def __call__(self, x, state):
        y, state = self.norm1(self.conv1(x), state)
        y, state = self.norm2(self.conv2(self.activation(y)), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return self.activation(x + y), state


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, mode, *, key):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(3, 4, 3, padding=1, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", mode=mode)
        self.blocks = [Block(4, 4, 1, mode, key=keys[1]), Block(4, 8, 2, mode, key=keys[2])]
        self.head = eqx.nn.Linear(8, 3, key=keys[3])

    def __call__(self, x, state):
        x, state = self.norm(self.stem(x), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, (1, 2))), state


def images(count=12, offset=0.0):
    """(x, labels): the label of an image is the colour that there is most of."""
    x = np.random.default_rng(0).normal(size=(count, 3, 8, 8)) + np.random.default_rng(1).normal(size=(count, 3, 1, 1))
    return jnp.asarray(x + offset, jnp.float32), jnp.asarray(x.mean((2, 3)).argmax(1))


def loss_of(model, state, x, labels):
    logits, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]), state


def train(model, state, opt_state, optimizer, x, labels, *, steps=20):
    """(losses, model, state, opt_state)."""

    @eqx.filter_jit
    def step(model, state, opt_state):
        (loss, state), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(model, state, x, labels)
        updates, opt_state = optimizer.update(gradients, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return loss, eqx.apply_updates(model, updates), state, opt_state

    losses = []
    for _ in range(steps):
        loss, model, state, opt_state = step(model, state, opt_state)
        losses.append(float(loss))
    return losses, model, state, opt_state
