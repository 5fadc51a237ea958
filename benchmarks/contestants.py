"""Every batch norm that is compared, in one form.

A JAX contestant is a function ``build(case, momentum)`` that returns a `Layer`: params, state and
``apply(params, state, x) -> (y, state)``, a training or an evaluation step of that library's own layer
with its running statistics. Libraries are imported when they are built, so that one that is not
installed is skipped and the others go on. All use ε = 1e-5 and give y in x's dtype.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

EPS = 1e-5
FAR = 1e3  # mean/std of the data on which jbn makes its second pass, on a CPU
MODES = ("forward", "forward+backward", "evaluation")


class Case(NamedTuple):
    """One thing to be measured."""

    shape: tuple[int, ...]
    axis: int  # the feature axis
    dtype: str
    mode: str  # one of MODES
    steps: int  # calls in a chain

    @property
    def train(self) -> bool:
        return self.mode != "evaluation"

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def reduce_axes(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a != self.axis % len(self.shape))

    @property
    def label(self) -> str:
        return "×".join(map(str, self.shape)) + ("" if self.axis % len(self.shape) == len(self.shape) - 1 else " NC…")


class Layer(NamedTuple):
    params: Any
    state: Any
    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    var: Callable[[Any], Any]  # the batch's biased variance, from the state after a step with momentum 0
    params_of: Callable[[Any], tuple[Any, Any]] = lambda params: params  # (γ, β)


class Contestant(NamedTuple):
    title: str
    package: str  # which has to be installed
    build: Callable[[Case, float], Layer] | None  # None for torch
    engine: str = "jax"
    offset: float = 0.0  # mean of the data, in units of its standard deviation


def installed(name: str) -> bool:
    return importlib.util.find_spec(CONTESTANTS[name].package) is not None


def _plain(case, momentum):
    """The formula as written, under autodiff."""
    import jax.numpy as jnp

    params = (jnp.ones(case.channels), jnp.zeros(case.channels))
    state = (jnp.zeros(case.channels), jnp.ones(case.channels))
    layout = [1] * len(case.shape)
    layout[case.axis] = -1

    def apply(params, state, x):
        gamma, beta = params
        if case.train:
            values = x.astype(jnp.float32)
            mean, var = jnp.mean(values, case.reduce_axes), jnp.var(values, case.reduce_axes)
            new = (mean, var)
            state = tuple(momentum * old + (1 - momentum) * v for old, v in zip(state, new, strict=True))
        else:
            mean, var = state
        mean, var, gamma, beta = (v.reshape(layout) for v in (mean, var, gamma, beta))
        return ((x - mean) / jnp.sqrt(var + EPS) * gamma + beta).astype(x.dtype), state

    return Layer(params, state, apply, lambda state: state[1])


def _jbn(case, momentum, *, offset=0.0, masked=False):
    import jax.numpy as jnp

    import jbn

    params, state = jbn.bn_init(case.channels)
    params = params._replace(beta=params.beta + offset)  # so that y, the next x of the chain, is offset too
    mask = _mask(case) if masked else None

    def apply(params, state, x):
        y, stats = jbn.bn_apply(params, state, x, train=case.train, axis=case.axis, eps=EPS, mask=mask)
        return y, jbn.bn_update_stats(state, stats, momentum=momentum, unbiased=False) if case.train else state

    if not case.train:
        state = state._replace(mean=jnp.full_like(state.mean, offset))
    return Layer(params, state, apply, lambda state: state.var)


def _mask(case):
    """(…, 1): the last eighth of the examples is padding."""
    import jax.numpy as jnp

    shape = tuple(1 if a == case.axis % len(case.shape) else n for a, n in enumerate(case.shape))
    rows = jnp.arange(shape[0]) < math.ceil(7 / 8 * shape[0])
    return jnp.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _linen(case, momentum, *, fast=True, masked=False):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    layer = nn.BatchNorm(
        use_running_average=not case.train,
        axis=case.axis,
        momentum=momentum,
        epsilon=EPS,
        dtype=jnp.dtype(case.dtype),
        use_fast_variance=fast,
    )
    variables = layer.init(jax.random.key(0), jnp.zeros(_small(case), case.dtype))
    mask = _mask(case) if masked else None

    def apply(params, state, x):
        variables = {"params": params, "batch_stats": state}
        y, updated = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return Layer(
        variables["params"],
        variables["batch_stats"],
        apply,
        lambda state: state["var"],
        lambda params: (params["scale"], params["bias"]),
    )


def _small(case):
    """A batch of one small example, for layers that find their sizes at the first call."""
    return tuple(n if a == case.axis % len(case.shape) else 2 for a, n in enumerate(case.shape))


def _nnx(case, momentum):
    import jax.numpy as jnp
    from flax import nnx

    layer = nnx.BatchNorm(
        case.channels,
        use_running_average=not case.train,
        axis=case.axis,
        momentum=momentum,
        epsilon=EPS,
        dtype=jnp.dtype(case.dtype),
        rngs=nnx.Rngs(0),
    )
    graph, params, state = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def apply(params, state, x):
        layer = nnx.merge(graph, params, state, copy=True)
        y = layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    return Layer(
        params,
        state,
        apply,
        lambda state: state["var"][...],
        lambda params: (params["scale"][...], params["bias"][...]),
    )


def _haiku(case, momentum):
    """Haiku keeps its parameters and its moments in x's dtype: bfloat16 statistics for bfloat16 x."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    last = case.axis % len(case.shape) == len(case.shape) - 1

    def forward(x, train):
        layer = hk.BatchNorm(True, True, momentum, EPS, data_format="N...C" if last else "NC...")
        return layer(x, is_training=train)

    layer = hk.transform_with_state(forward)
    params, state = layer.init(jax.random.key(0), jnp.zeros(_small(case), case.dtype), True)

    def apply(params, state, x):
        return layer.apply(params, state, None, x, case.train)

    def params_of(params):
        (leaves,) = params.values()
        return leaves["scale"], leaves["offset"]

    def var(state):
        return next(v["average"] for k, v in state.items() if k.endswith("var_ema"))

    if not case.train:  # its averages start at 0, which divides by √ε
        state = jax.tree_util.tree_map_with_path(
            lambda path, v: jnp.ones_like(v) if "var_ema" in str(path) and v.ndim else v, state
        )
    return Layer(params, state, apply, var, params_of)


def _equinox(case, momentum):
    """Equinox normalizes under `vmap`; channels-last data is mapped over all its positions, its best case."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        case.channels, axis_name="batch", eps=EPS, momentum=momentum, mode="batch", inference=not case.train
    )
    params, rest = eqx.partition(layer, eqx.is_inexact_array)
    first = case.axis % len(case.shape) == 1
    if not case.train:  # its state starts empty
        mean, var = jnp.zeros(case.channels), jnp.ones(case.channels)
        state = state.set(layer.batch_state_index, (mean, var))

    def apply(params, state, x):
        flat = x if first else x.reshape(-1, case.channels)
        layer = eqx.combine(params, rest)
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(flat, state)
        return y.reshape(x.shape).astype(x.dtype), state

    return Layer(
        params,
        state,
        apply,
        lambda state: state.get(layer.batch_state_index)[1],
        lambda params: (params.weight, params.bias),
    )


def _keras(case, momentum):
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import jax.numpy as jnp
    import keras

    policy = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
    layer = keras.layers.BatchNormalization(axis=case.axis, momentum=momentum, epsilon=EPS, dtype=policy)
    layer.build((None, *case.shape[1:]))
    params = [jnp.asarray(v.value) for v in layer.trainable_variables]
    state = [jnp.asarray(v.value) for v in layer.non_trainable_variables]

    def apply(params, state, x):
        return layer.stateless_call(params, state, x, training=case.train)

    return Layer(params, state, apply, lambda state: state[1])


def _far(case, momentum):
    return _jbn(case, momentum, offset=FAR)


def _jbn_masked(case, momentum):
    return _jbn(case, momentum, masked=True)


def _linen_masked(case, momentum):
    return _linen(case, momentum, masked=True)


def _linen_two_pass(case, momentum):
    return _linen(case, momentum, fast=False)


CONTESTANTS = {
    "jbn": Contestant("jbn", "jbn", _jbn),
    "jbn_far": Contestant(f"jbn, mean/std {FAR:.0e}", "jbn", _far, offset=FAR),
    "linen": Contestant("flax.linen", "flax", _linen),
    "linen_two_pass": Contestant("flax.linen, two-pass", "flax", _linen_two_pass),
    "nnx": Contestant("flax.nnx", "flax", _nnx),
    "haiku": Contestant("haiku", "haiku", _haiku),
    "equinox": Contestant("equinox", "equinox", _equinox),
    "keras": Contestant("keras on JAX", "keras", _keras),
    "plain": Contestant("plain formula", "jax", _plain),
    "torch": Contestant("torch", "torch", None, "torch"),
    "torch_tuned": Contestant("torch, tuned malloc", "torch", None, "torch_tuned"),
    "torch_compile": Contestant("torch.compile", "torch", None, "torch"),
    "jbn_masked": Contestant("jbn, masked", "jbn", _jbn_masked),
    "linen_masked": Contestant("flax.linen, masked", "flax", _linen_masked),
}
