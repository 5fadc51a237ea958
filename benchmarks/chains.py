"""Chains of dependent calls, long enough that dispatch does not count: in one jit, or eagerly in torch.

y is the next x and dx the next g, so that no call can be dropped, moved or fused with the next one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from contestants import CONTESTANTS, EPS, Case, Layer


def jax_step(layer: Layer, mode: str) -> Callable[..., Any]:
    """One call: ``step(x, g, params, state) -> (y, dx, params, state)``, fit to be the next call's arguments.

    Without a backward g and dx are None.
    """
    import jax
    import jax.numpy as jnp

    def forward(x, g, params, state):
        y, state = layer.apply(params, state, x)
        return y, None, params, state

    def forward_and_backward(x, g, params, state):
        y, pullback, state = jax.vjp(lambda x, params: layer.apply(params, state, x), x, params, has_aux=True)
        dx, dparams = pullback(g)
        # dγ and dβ enter the next call, so that none is dropped; the factor keeps the data as it was.
        params = jax.tree.map(lambda p, d: p + (1e-8 * d.astype(jnp.float32)).astype(p.dtype), params, dparams)
        return y, dx, params, state

    return forward_and_backward if mode == "forward+backward" else forward


def jax_chain(name: str, case: Case) -> Callable[[], None]:
    """A function of no arguments: ``case.steps`` dependent calls in one jit, and waiting for the last."""
    import jax

    contestant = CONTESTANTS[name]
    layer = contestant.build(case, 0.9)
    step = jax_step(layer, case.mode)

    @jax.jit
    def chain(x, g, params, state):
        if case.mode == "evaluation":  # the parameters stay as they are
            return jax.lax.fori_loop(0, case.steps, lambda _, y: layer.apply(params, state, y)[0], x)
        # A loop, since XLA:CPU drops barriers before it fuses, and makes every y of an unrolled chain again
        # from the first x: the tenth call would normalize ten times.
        carry = (x, g if case.mode == "forward+backward" else None, params, state)
        return jax.lax.fori_loop(0, case.steps, lambda _, carry: step(*carry), carry)

    x, g = jax_data(case, contestant.offset)
    return lambda: jax.block_until_ready(chain(x, g, layer.params, layer.state))


def jax_data(case: Case, offset: float) -> tuple[Any, Any]:
    """x of mean ``offset`` and standard deviation 1, and a cotangent."""
    import jax

    keys = jax.random.split(jax.random.key(0))
    x, g = (jax.random.normal(key, case.shape, "float32") for key in keys)
    return (x + offset).astype(case.dtype), g.astype(case.dtype)


def copy_chain(case: Case) -> Callable[[], None]:
    """As many copies of x, each an elementwise jit into a buffer that is already there: no page faults."""
    import jax

    @partial(jax.jit, donate_argnums=1, keep_unused=True)
    def copy(source, target):
        return source + 1

    buffers = list(jax_data(case, 0.0))

    def run():
        source, target = buffers
        for _ in range(case.steps):
            source, target = copy(source, target), source
        buffers[:] = jax.block_until_ready([source, target])

    return run


def torch_chain(name: str, case: Case) -> Callable[[], None]:
    """The same chain, eagerly: channels_last where channels are last, γ and β float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def data():
        values = torch.randn(case.shape, generator=generator).to(device, dtype)
        return values.movedim(case.axis, 1)

    x, g = data(), data()
    layer = {
        2: torch.nn.BatchNorm1d,
        3: torch.nn.BatchNorm1d,
        4: torch.nn.BatchNorm2d,
        5: torch.nn.BatchNorm3d,
    }[len(case.shape)](case.channels, eps=EPS, device=device)
    layer.train(case.train)
    call = torch.compile(layer) if name == "torch_compile" else layer
    weights = (layer.weight, layer.bias)

    def forward():
        value = x
        with torch.no_grad():
            for _ in range(case.steps):
                value = call(value)
        return value

    def forward_and_backward():
        value, cotangent = x, g
        for _ in range(case.steps):
            value = value.detach().requires_grad_()
            y = call(value)
            cotangent, *_ = torch.autograd.grad(y, (value, *weights), cotangent)
            value = y
        return cotangent

    body = forward_and_backward if case.mode == "forward+backward" else forward

    def run():
        body()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
