"""Every batch norm that is compared, in one form, for `jbn bench` and for `benchmarks/`.

A JAX contestant is a function ``build(case, momentum)`` that returns a `Layer`: params, state and
``apply(params, state, x) -> (y, state)``, a training or an evaluation step of that library's own layer
with its running statistics. Libraries are imported by name when they are built, for none has to be installed and
nothing here depends on them. All use ε = 1e-5 and give y in x's dtype.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jbn

__all__ = ["CONTESTANTS", "EPS", "FAR", "IN_JAX", "PASSES", "Case", "Contestant", "Layer", "missing", "versions"]

EPS = 1e-5
FAR = 1e3  # mean/std of the data on which jbn makes its second pass, on a CPU
# Mode → reads and writes of x that nothing can avoid; for forward+backward those of g, y and dx as well.
PASSES = {"forward": 3, "forward+backward": 8, "evaluation": 2}


class Case(NamedTuple):
    """One thing to be measured."""

    shape: tuple[int, ...]
    axis: int  # the feature axis
    dtype: str
    mode: str  # one of PASSES
    steps: int = 1  # calls in a chain

    @property
    def train(self) -> bool:
        """Whether it is a training step."""
        return self.mode != "evaluation"

    @property
    def channels(self) -> int:
        """C, the size of the feature axis."""
        return self.shape[self.axis]

    @property
    def place(self) -> int:
        """The feature axis, counted from the first."""
        return self.axis % len(self.shape)

    @property
    def last(self) -> bool:
        """Whether channels are last."""
        return self.place == len(self.shape) - 1

    @property
    def label(self) -> str:
        """The shape, as a table has it."""
        return "×".join(map(str, self.shape)) + ("" if self.last else " NC…")


class Layer(NamedTuple):
    """One contestant's layer."""

    params: Any
    state: Any
    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    var: Callable[[Any], Any]  # the batch's biased variance, from the state after a step with momentum 0
    params_of: Callable[[Any], tuple[Any, Any]] = lambda params: params  # (γ, β)


class Contestant(NamedTuple):
    """Who takes part."""

    title: str
    package: str  # which has to be installed
    build: Callable[[Case, float], Layer] | None = None  # None for torch
    offset: float = 0.0  # mean of the data, in units of its standard deviation


def missing(names: Iterable[str], among: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Those of the contestants that cannot take part here, each with the reason."""
    packages = {name: (among or CONTESTANTS)[name].package for name in names}
    return {name: f"{package} is not installed" for name, package in packages.items() if not find_spec(package)}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of jbn, JAX and those of the packages that are installed."""
    found = {"jbn": jbn.__version__}
    for package in ("jax", "jaxlib", *packages):
        with suppress(metadata.PackageNotFoundError):
            found.setdefault(package, metadata.version("dm-haiku" if package == "haiku" else package))
    return found


def _plain(case, momentum):
    """The formula as written, under autodiff."""
    params = (jnp.ones(case.channels), jnp.zeros(case.channels))
    state = (jnp.zeros(case.channels), jnp.ones(case.channels))
    reduce_axes = tuple(a for a in range(len(case.shape)) if a != case.place)
    layout = [-1 if a == case.place else 1 for a in range(len(case.shape))]

    def apply(params, state, x):
        gamma, beta = params
        if case.train:
            values = x.astype(jnp.float32)
            mean, var = new = jnp.mean(values, reduce_axes), jnp.var(values, reduce_axes)
            state = tuple(momentum * old + (1 - momentum) * v for old, v in zip(state, new, strict=True))
        else:
            mean, var = state
        mean, var, gamma, beta = (v.reshape(layout) for v in (mean, var, gamma, beta))
        return ((x - mean) / jnp.sqrt(var + EPS) * gamma + beta).astype(x.dtype), state

    return Layer(params, state, apply, lambda state: state[1])


def _jbn(case, momentum, *, offset=0.0, masked=False):
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
    shape = [1 if a == case.place else n for a, n in enumerate(case.shape)]
    return jax.lax.broadcasted_iota("int32", shape, 0) < math.ceil(7 / 8 * case.shape[0])


def _small(case):
    """Examples for layers that find their sizes at the first call."""
    return jnp.zeros([n if a == case.place else 2 for a, n in enumerate(case.shape)], case.dtype)


def _in_flax(case, momentum):
    """The arguments that flax.linen and flax.nnx share."""
    moments = {"use_running_average": not case.train, "momentum": momentum}
    return {"axis": case.axis, "epsilon": EPS, "dtype": jnp.dtype(case.dtype), **moments}


def _linen(case, momentum, *, fast=True, masked=False):
    layer = import_module("flax.linen").BatchNorm(**_in_flax(case, momentum), use_fast_variance=fast)
    variables = layer.init(jax.random.key(0), _small(case))
    mask = _mask(case) if masked else None

    def apply(params, state, x):
        variables = {"params": params, "batch_stats": state}
        y, updated = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    params, state = variables["params"], variables["batch_stats"]
    return Layer(params, state, apply, lambda state: state["var"], lambda params: (params["scale"], params["bias"]))


def _nnx(case, momentum):
    nnx = import_module("flax.nnx")
    layer = nnx.BatchNorm(case.channels, **_in_flax(case, momentum), rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def apply(params, state, x):
        layer = nnx.merge(graph, params, state, copy=True)
        y = layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    def params_of(params):
        return params["scale"][...], params["bias"][...]

    return Layer(params, state, apply, lambda state: state["var"][...], params_of)


def _haiku(case, momentum):
    """Haiku keeps its parameters and its moments in x's dtype: bfloat16 statistics for bfloat16 x."""
    hk = import_module("haiku")

    def forward(x, train):
        layer = hk.BatchNorm(True, True, momentum, EPS, data_format="N...C" if case.last else "NC...")
        return layer(x, is_training=train)

    layer = hk.transform_with_state(forward)
    params, state = layer.init(jax.random.key(0), _small(case), True)

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
    eqx = import_module("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        case.channels, axis_name="batch", eps=EPS, momentum=momentum, mode="batch", inference=not case.train
    )
    params, rest = eqx.partition(layer, eqx.is_inexact_array)
    if not case.train:  # its state starts empty
        state = state.set(layer.batch_state_index, (jnp.zeros(case.channels), jnp.ones(case.channels)))

    def apply(params, state, x):
        flat = x if case.place == 1 else x.reshape(-1, case.channels)
        layer = eqx.combine(params, rest)
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(flat, state)
        return y.reshape(x.shape).astype(x.dtype), state

    def var(state):
        return state.get(layer.batch_state_index)[1]

    return Layer(params, state, apply, var, lambda params: (params.weight, params.bias))


def _keras(case, momentum):
    os.environ["KERAS_BACKEND"] = "jax"
    policy = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
    make = import_module("keras").layers.BatchNormalization
    layer = make(axis=case.axis, momentum=momentum, epsilon=EPS, dtype=policy)
    layer.build((None, *case.shape[1:]))
    params = [jnp.asarray(v.value) for v in layer.trainable_variables]
    state = [jnp.asarray(v.value) for v in layer.non_trainable_variables]

    def apply(params, state, x):
        return layer.stateless_call(params, state, x, training=case.train)

    return Layer(params, state, apply, lambda state: state[1])


CONTESTANTS = {
    "jbn": Contestant("jbn", "jbn", _jbn),
    "jbn_far": Contestant(f"jbn, mean/std {FAR:.0e}", "jbn", partial(_jbn, offset=FAR), offset=FAR),
    "linen": Contestant("flax.linen", "flax", _linen),
    "linen_two_pass": Contestant("flax.linen, two-pass", "flax", partial(_linen, fast=False)),
    "nnx": Contestant("flax.nnx", "flax", _nnx),
    "haiku": Contestant("haiku", "haiku", _haiku),
    "equinox": Contestant("equinox", "equinox", _equinox),
    "keras": Contestant("keras on JAX", "keras", _keras),
    "plain": Contestant("plain formula", "jax", _plain),
    "torch": Contestant("torch", "torch"),
    "torch_tuned": Contestant("torch, tuned malloc", "torch"),
    "torch_compile": Contestant("torch.compile", "torch"),
    "jbn_masked": Contestant("jbn, masked", "jbn", partial(_jbn, masked=True)),
    "linen_masked": Contestant("flax.linen, masked", "flax", partial(_linen, masked=True)),
    "copy": Contestant("copy of x", "jax"),
}
IN_JAX = [name for name, contestant in CONTESTANTS.items() if contestant.build is not None]
