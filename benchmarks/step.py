"""Times a whole training step: batch norm's share of it, and its memory, for each batch norm and without any.

All contestants train the same network by the same step: `jbn.networks` and `jbn.training` with another norm
bound to ``bn=``, or with ``norm=None``, or the same network written in Flax with Flax's own norm or the door, or
torchvision's of the same weights. A norm's share is what its step takes longer than the step without.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import optax

import jbn
from jbn import networks
from jbn.cli.bench.contestants import EPS, versions
from jbn.cli.bench.engine import Spread, Turn, ratios, spread, timed
from jbn.training import TrainState, make_train_step


class Case(NamedTuple):
    """A network, and the shape of its batch."""

    title: str
    network: Any  # a partial of one of jbn.networks
    shape: tuple[int, ...]
    usual: bool = True  # whether it is run unless asked for; another is compiled once, not twice


RESNET_50 = partial(networks.resnet, 1000, **networks.imagenet(50))
CASES = {
    "resnet": Case("ResNet-20, batch 128 of 32×32×3", partial(networks.resnet, 10), (128, 32, 32, 3)),
    "mlp": Case(
        "MLP 784-1024-1024-1024-10, batch 1024", partial(networks.mlp, (784, 1024, 1024, 1024, 10)), (1024, 784)
    ),
    "resnet50": Case("ResNet-50, batch 4 of 224×224×3", RESNET_50, (4, 224, 224, 3), usual=False),
}
TINY = {
    "resnet": Case("ResNet-8, batch 16 of 16×16×3", partial(networks.resnet, 10, blocks=1), (16, 16, 16, 3), False),
    "mlp": Case("MLP 64-64-64-10, batch 64", partial(networks.mlp, (64, 64, 64, 10)), (64, 64), False),
    "resnet50": Case("ResNet-50, batch 2 of 64×64×3", RESNET_50, (2, 64, 64, 3), False),
}


def linen(params: Any, state: Any, x: Any, *, train: bool, axis_name: Any, mask: Any, fast: bool) -> tuple[Any, Any]:
    """flax.linen.BatchNorm as `jbn.bn_apply` is called by a network.

    With momentum 0 what it stores is what the batch showed, so that the running statistics are updated
    by `jbn.bn_update_stats` whatever the norm is.
    """
    import flax.linen as nn

    kept = {"use_running_average": not train, "momentum": 0.0, "use_fast_variance": fast}
    layer = nn.BatchNorm(**kept, epsilon=EPS, dtype=x.dtype, axis_name=axis_name)
    running = {"mean": state.mean, "var": state.var}
    variables = {"params": {"scale": params.gamma, "bias": params.beta}, "batch_stats": running}
    y, seen = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    moments = seen["batch_stats"]
    count = jnp.full_like(moments["mean"], x.size // x.shape[-1] if train else 0)
    return y, jbn.BNStats(moments["mean"], moments["var"], count)


class Norm(NamedTuple):
    title: str
    package: str  # which has to be installed
    options: Callable[[], dict[str, Any]]  # of the network
    flax: bool = False  # whether the whole network is one of Flax, of which there is ResNet-20
    torch: bool = False  # whether the whole step is one of PyTorch, of which there is ResNet-50

    def runs(self, network: str) -> bool:
        return network == "resnet" if self.flax else network == "resnet50" if self.torch else True


def _flax(module: str) -> dict[str, Any]:
    return {"norm": import_module(module).BatchNorm}


NORMS = {
    "jbn": Norm("jbn", "jbn", lambda: {"bn": partial(jbn.bn_apply, eps=EPS)}),
    "linen": Norm("flax.linen", "flax", lambda: {"bn": partial(linen, fast=True)}),
    "linen_two_pass": Norm("flax.linen, two-pass", "flax", lambda: {"bn": partial(linen, fast=False)}),
    "flax_door": Norm("a Flax network, jbn.linen", "flax", lambda: _flax("jbn.linen"), flax=True),
    "flax": Norm("a Flax network, flax.linen", "flax", lambda: _flax("flax.linen"), flax=True),
    "none": Norm("no norm", "jbn", lambda: {"norm": None}),
    "torch": Norm("torchvision", "torchvision", dict, torch=True),
}
COMPARED = ("temporaries", "compilation", "first_loss")  # what is known of a step beside its time


def batch_of(case: Case, dtype: str) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], case.shape, jnp.float32).astype(dtype)
    return x, jax.random.randint(keys[1], case.shape[:1], 0, 10)


def training(network: networks.Network, lr: float) -> tuple[Callable[[jax.Array], TrainState], Any]:
    """How training starts, from a key, and its step, under `jax.jit`."""
    optimizer = optax.sgd(lr, momentum=0.9)

    def start(key):
        params, state = network.init(key)
        return TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))

    def loss_fn(outputs, y):
        return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y).mean()

    return start, jax.jit(make_train_step(network.apply, loss_fn, optimizer), donate_argnums=0)


class Step:
    """A compiled training step that runs on from where it stopped, with what its compiler said and its first loss."""

    def __init__(self, name: str, case: Case, dtype: str):
        make = case.network
        if NORMS[name].flax:
            from flax_resnet import network as flax_network

            make = partial(flax_network, *make.args, **make.keywords)
        # So slow that it changes little: without a norm a deep network bears no more.
        start, step = training(make(**NORMS[name].options(), dtype=jnp.dtype(dtype)), 1e-5)
        self._train_state, self._batch = jax.jit(start)(jax.random.key(0)), batch_of(case, dtype)
        for _ in range(2 if case.usual else 1):  # the first loads what is compiled with
            jax.clear_caches()
            begun = time.process_time()
            self._compiled = step.lower(self._train_state, self._batch).compile()
            self.compilation = round(time.process_time() - begun, 3)
        self.temporaries = self._compiled.memory_analysis().temp_size_in_bytes
        self.last_metrics: dict[str, Any] = {}
        self.first_loss = float(self())

    def __call__(self) -> Any:
        """One step; waits for it and gives its loss."""
        self._train_state, self.last_metrics = self._compiled(self._train_state, self._batch)
        jax.block_until_ready(self._train_state)
        return self.last_metrics["loss"]


def share(row: dict[str, Any], name: str) -> Spread | None:
    """What the norm adds to the step, in percent of the step with it; the norms in JAX have one."""
    seconds = row["seconds"]
    if name not in seconds or "none" not in seconds or name == "none" or NORMS[name].torch:
        return None
    return spread(100 * (1 - ratio) for ratio in ratios(seconds["none"], seconds[name]))


def page(run: harness.Run) -> str:
    parts = run.heading("A whole training step")
    header = ["", "ms a step", "time / time with jbn", "share of the step, %", "temporaries, MB", "compilation, s"]
    for row in run.rows:
        lines = [_line(row, name) for name in NORMS if name in row["seconds"]]
        parts += ["## {title}, {dtype}".format(**row), harness.table(header, lines)]
    return "\n\n".join(parts)


def _line(row, name):
    seconds, temporaries = row["seconds"], row["temporaries"][name]
    return [
        NORMS[name].title,
        harness.cell(1e3 * spread(seconds[name]).median, 3),
        harness.cell(spread(ratios(seconds[name], seconds["jbn"])) if "jbn" in seconds else None),
        harness.cell(share(row, name), 1),
        harness.cell(temporaries and temporaries / 1e6, 1),
        harness.cell(row["compilation"][name]),
    ]


def picture(run: harness.Run) -> Any:
    """Bars of the shares on the left, of the memory on the right."""
    names = [n for n in NORMS if not NORMS[n].torch and any(n in row["seconds"] for row in run.rows)]
    figure, panels = harness.figure(12, 1.5 + 0.25 * len(names) * len(run.rows), ncols=2, sharey=True)
    shares = {n: [part.median if (part := share(row, n)) else 0 for row in run.rows] for n in names}
    memory = {n: [row["temporaries"].get(n, 0) / 1e6 for row in run.rows] for n in names}
    for panel, values in zip(panels, (shares, memory), strict=True):
        groups = [f"{row['title']}\n{row['dtype']}" for row in run.rows]
        harness.bars(panel, groups, {NORMS[name].title: values[name] for name in names})
    panels[0].set_xlabel("batch norm's share of the step, %")
    panels[1].set_xlabel("temporaries of the step, MB")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return figure


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    wanted = [name for name in NORMS if name in options.contestants and any(map(NORMS[name].runs, options.networks))]
    present = run.able(wanted, NORMS)
    run.versions |= versions(["optax", *(["torch"] if "torch" in present else [])])
    for dtype, network in itertools.product(options.dtypes, options.networks):
        case, steps = (TINY if options.quick else CASES)[network], dict[str, Any]()
        able = [name for name in present if NORMS[name].runs(network)]
        timings = harness.timings(options, {name: partial(_turn, steps, name, case, dtype) for name in able})
        jax.clear_caches()
        _check(steps, dtype)
        known = {what: {name: getattr(step, what) for name, step in steps.items()} for what in COMPARED}
        yield {"title": case.title, "dtype": dtype, "shape": case.shape, **timings, **known}


def _turn(steps: dict[str, Any], name: str, case: Case, dtype: str) -> Turn:
    """A turn of a step, which is added to those that there are."""
    if NORMS[name].torch:
        steps[name] = import_module("torch_step").Step(case, dtype)
    else:
        steps[name] = Step(name, case, dtype)
    return timed(steps[name])


def _check(steps, dtype):
    """The norms have to be the same function, and no step may have been one that changes nothing."""
    losses = [step.first_loss for name, step in steps.items() if name != "none"]
    if losses and max(losses) - min(losses) > (1e-3 if dtype == "float32" else 5e-2) * min(losses):
        raise RuntimeError(f"The norms differ in the loss they start with: {losses}.")
    for name, step in steps.items():
        if step.last_metrics["skipped"]:
            raise RuntimeError(f"{name}: the loss is not finite.")


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        picture,
        name=lambda options: "step-resnet50" if "resnet50" in options.networks else "step",
        rounds=15,
        turn=0.5,
        options={
            "contestants": harness.some(NORMS, NORMS),
            "networks": harness.some(CASES, [name for name in CASES if CASES[name].usual]),
            "dtypes": harness.some(harness.DTYPES[:2], harness.DTYPES[:2]),
        },
        quick={"dtypes": 1, "rounds": 3, "turn": 0.02},
    )
