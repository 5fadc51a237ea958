"""What is timed in JAX: loops of dependent calls in one jit, so that dispatch does not count.

y is the next x and dx the next g, so no call can be dropped, moved or fused with the next one. It is a loop, since
XLA:CPU drops barriers before it fuses, and makes every y of an unrolled chain again from the first x: the tenth call
would normalize ten times. Its results are the next loop's arguments, donated, so that nothing is copied around it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jbn.cli.bench.contestants import CONTESTANTS, Case
from jbn.cli.bench.engine import Turn, timed

__all__ = ["jax_turn"]


def jax_turn(name: str, case: Case) -> Turn:
    """A turn of one contestant, or of "copy": as often as is asked, ``case.steps`` dependent calls."""
    contestant = CONTESTANTS[name]
    keys = jax.random.split(jax.random.key(0))
    x, g = (jax.random.normal(key, case.shape) for key in keys)
    x, g = (x + contestant.offset).astype(case.dtype), g.astype(case.dtype)
    if contestant.build is None:
        return _copies(case.steps, x, g)
    layer = contestant.build(case, 0.9)
    backward = case.mode == "forward+backward"
    # What is donated must be nobody else's.
    carry = (x, g if backward else None, *jax.tree.map(jnp.copy, (layer.params, layer.state)))
    step = _training(layer.apply) if backward else _forward(layer.apply)

    @partial(jax.jit, donate_argnums=0)
    def loop(carry):
        return jax.lax.fori_loop(0, case.steps, lambda _, carry: step(*carry), carry)

    def once():
        nonlocal carry
        carry = loop(carry)

    return timed(once, lambda: jax.block_until_ready(carry))


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
        params = jax.tree.map(lambda p, d: p + (1e-8 * d.astype(jnp.float32)).astype(p.dtype), params, dparams)
        return y, dx, params, state

    return step


def _copies(steps, source, target):
    """As many copies, each an elementwise jit into a buffer that is already there: no page faults."""

    @partial(jax.jit, donate_argnums=1, keep_unused=True)
    def copy(source, target):
        return source + 1

    def once():
        nonlocal source, target
        for _ in range(steps):
            source, target = copy(source, target), source

    return timed(once, lambda: jax.block_until_ready((source, target)))
