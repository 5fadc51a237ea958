"""What ``jbn bench`` times in JAX: loops of dependent calls in one jit, so that dispatch does not count.

y is the next x and dx the next g, so no call can be dropped or moved. It is a loop, since XLA:CPU fuses
calls in a row with each other; and its results are the next turn's arguments, donated, so that nothing is
copied around it.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jbn
from jbn.cli.bench.options import BenchOptions

__all__ = ["LAYERS", "Layer", "jax_turn"]

_EPS, _MOMENTUM = 1e-5, 0.9


class Layer(NamedTuple):
    """One contestant's layer, with its running statistics in training."""

    params: Any
    state: Any
    apply: Callable[[Any, Any, Any], tuple[Any, Any]]  # (params, state, x) -> (y, state)


def jax_turn(name: str, mode: str, steps: int, options: BenchOptions) -> Callable[[int], None]:
    """``turn(repeats)`` of one contestant ("jbn", "linen" or "copy"): ``repeats`` times ``steps`` calls."""
    keys = jax.random.split(jax.random.key(0))
    x, g = (jax.random.normal(key, options.shape).astype(options.dtype) for key in keys)
    if name == "copy":
        return _copies(steps, x, g)
    layer = LAYERS[name](options, mode != "evaluation")
    step = _training(layer.apply) if mode == "forward+backward" else _forward(layer.apply)
    # What is donated must be nobody else's.
    start = (x, g, *jax.tree.map(jnp.copy, (layer.params, layer.state)))
    carry = [jax.block_until_ready(start if mode == "forward+backward" else (x, None, *start[2:]))]
    del x, g, start

    @partial(jax.jit, donate_argnums=0)
    def loop(carry):
        return jax.lax.fori_loop(0, steps, lambda _, carry: step(*carry), carry)

    def turn(repeats):
        for _ in range(repeats):
            carry[0] = loop(carry[0])
        jax.block_until_ready(carry[0])

    return turn


def _forward(apply):
    def step(x, g, params, state):
        y, state = apply(params, state, x)
        return y, g, params, state

    return step


def _training(apply):
    def step(x, g, params, state):
        y, pullback, state = jax.vjp(lambda x, params: apply(params, state, x), x, params, has_aux=True)
        dx, dparams = pullback(g)
        # dγ and dβ enter the next call, so that none is dropped; the factor keeps the data as it was.
        params = jax.tree.map(lambda p, d: p + 1e-8 * d, params, dparams)
        return y, dx, params, state

    return step


def _copies(steps, source, target):
    """An elementwise jit into a buffer that is already there: no page faults."""

    @partial(jax.jit, donate_argnums=1, keep_unused=True)
    def copy(source, target):
        return source + 1

    buffers = [source, target]

    def turn(repeats):
        source, target = buffers
        for _ in range(repeats * steps):
            source, target = copy(source, target), source
        buffers[:] = jax.block_until_ready((source, target))

    return turn


def _jbn(options, train):
    params, state = jbn.bn_init(options.channels)

    def apply(params, state, x):
        y, stats = jbn.bn_apply(params, state, x, train=train, axis=options.axis, eps=_EPS)
        return y, jbn.bn_update_stats(state, stats, momentum=_MOMENTUM) if train else state

    return Layer(params, state, apply)


def _linen(options, train):
    # By name, for Flax need not be installed, and nothing here depends on it.
    layer = import_module("flax.linen").BatchNorm(
        use_running_average=not train,
        axis=options.axis,
        momentum=_MOMENTUM,
        epsilon=_EPS,
        dtype=jnp.dtype(options.dtype),
    )
    axis = options.axis % len(options.shape)
    small = [size if a == axis else 2 for a, size in enumerate(options.shape)]
    variables = layer.init(jax.random.key(0), jnp.zeros(small, options.dtype))

    def apply(params, state, x):
        y, updated = layer.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return Layer(variables["params"], variables["batch_stats"], apply)


LAYERS: dict[str, Callable[[BenchOptions, bool], Layer]] = {"jbn": _jbn, "linen": _linen}
