"""Times a whole training step: batch norm's share of it, and its memory, for each batch norm and without any.

All contestants train the same network by the same step: `jbn.networks` and `jbn.training` with another norm
bound to ``bn=``, or with ``norm=None``, or the same network written in Flax with Flax's own norm or the door, or
torchvision's of the same weights. A norm's share is what its step takes longer than the step without.
"""

import dataclasses
import importlib.metadata
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness

EPS = 1e-5


class Case(NamedTuple):
    """A network, and the shape of its batch."""

    title: str
    network: str  # a name in jbn.networks
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    shape: tuple[int, ...]
    usual: bool = True  # whether it is run unless asked for; another is compiled once, not twice


RESNET_50 = {"stem": "imagenet", "block": "bottleneck", "widths": (64, 128, 256, 512), "blocks": (3, 4, 6, 3)}

CASES = {
    "resnet": Case("ResNet-20, batch 128 of 32×32×3", "resnet", (10,), {}, (128, 32, 32, 3)),
    "mlp": Case("MLP 784-1024-1024-1024-10, batch 1024", "mlp", ((784, 1024, 1024, 1024, 10),), {}, (1024, 784)),
    "resnet50": Case("ResNet-50, batch 4 of 224×224×3", "resnet", (1000,), RESNET_50, (4, 224, 224, 3), usual=False),
}
TINY = {
    "resnet": Case("ResNet-8, batch 16 of 16×16×3", "resnet", (10,), {"blocks": 1}, (16, 16, 16, 3)),
    "mlp": Case("MLP 64-64-64-10, batch 64", "mlp", ((64, 64, 64, 10),), {}, (64, 64)),
    "resnet50": Case("ResNet-50, batch 2 of 64×64×3", "resnet", (1000,), RESNET_50, (2, 64, 64, 3), usual=False),
}


def linen(params: Any, state: Any, x: Any, *, train: bool, axis_name: Any, mask: Any, fast: bool) -> tuple[Any, Any]:
    """flax.linen.BatchNorm as `jbn.bn_apply` is called by a network.

    With momentum 0 what it stores is what the batch showed, so that the running statistics are updated
    by `jbn.bn_update_stats` whatever the norm is.
    """
    import flax.linen as nn
    import jax.numpy as jnp

    import jbn

    layer = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.0,
        epsilon=EPS,
        dtype=x.dtype,
        axis_name=axis_name,
        use_fast_variance=fast,
    )
    variables = {
        "params": {"scale": params.gamma, "bias": params.beta},
        "batch_stats": {"mean": state.mean, "var": state.var},
    }
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


def _door() -> dict[str, Any]:
    from jbn.linen import BatchNorm

    return {"norm": BatchNorm}


def _stock() -> dict[str, Any]:
    from flax.linen import BatchNorm

    return {"norm": BatchNorm}


def _jbn() -> dict[str, Any]:
    import jbn

    return {"bn": partial(jbn.bn_apply, eps=EPS)}


NORMS = {
    "jbn": Norm("jbn", "jbn", _jbn),
    "linen": Norm("flax.linen", "flax", lambda: {"bn": partial(linen, fast=True)}),
    "linen_two_pass": Norm("flax.linen, two-pass", "flax", lambda: {"bn": partial(linen, fast=False)}),
    "flax_door": Norm("a Flax network, jbn.linen", "flax", _door, flax=True),
    "flax": Norm("a Flax network, flax.linen", "flax", _stock, flax=True),
    "none": Norm("no norm", "jbn", lambda: {"norm": None}),
    "torch": Norm("torchvision", "torchvision", dict, torch=True),
}


def batch_of(case: Case, dtype: str) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], case.shape, jnp.float32).astype(dtype)
    return x, jax.random.randint(keys[1], case.shape[:1], 0, 10)


class Step:
    """A compiled training step that runs on from where it stopped, with what its compiler said and its first loss."""

    def __init__(self, name: str, case: Case, dtype: str):
        import jax
        import jax.numpy as jnp
        import optax

        from jbn import networks
        from jbn.training import TrainState, make_train_step

        if NORMS[name].flax:
            import flax_resnet

            make = flax_resnet.network
        else:
            make = getattr(networks, case.network)
        network = make(*case.arguments, **case.options, **NORMS[name].options(), dtype=jnp.dtype(dtype))
        # So slow that it changes little: without a norm a deep network bears no more.
        optimizer = optax.sgd(1e-5, momentum=0.9)
        params, state = jax.jit(network.init)(jax.random.key(0))
        self._train_state = TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
        self._batch = batch_of(case, dtype)

        def loss_fn(outputs, y):
            outputs = outputs.astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

        step = jax.jit(make_train_step(network.apply, loss_fn, optimizer), donate_argnums=0)
        for _ in range(2 if case.usual else 1):  # the first loads what is compiled with
            jax.clear_caches()
            start = time.process_time()
            self._compiled = step.lower(self._train_state, self._batch).compile()
            self.compilation = time.process_time() - start
        self.temporaries = self._compiled.memory_analysis().temp_size_in_bytes
        self.last_metrics: dict[str, Any] = {}
        self.first_loss = float(self())

    def __call__(self) -> Any:
        """One step; waits for it and gives its loss."""
        import jax

        self._train_state, self.last_metrics = self._compiled(self._train_state, self._batch)
        jax.block_until_ready(self._train_state)
        return self.last_metrics["loss"]


def share(row: dict[str, Any], name: str) -> list[float] | None:
    """What the norm adds to the step, in percent of the step with it, round by round."""
    seconds = row["seconds"]
    if name not in seconds or "none" not in seconds:
        return None
    return [100 * (1 - ratio) for ratio in harness.ratios(seconds["none"], seconds[name])]


def page(run: harness.Run) -> str:
    parts = [
        "# A whole training step",
        harness.machine_line(run.about, run.versions, run.device),
        f"{run.settings['rounds']} rounds in random order; medians, with quartiles in brackets. Forward, backward, SGD "
        "with momentum and the update of the running statistics, in one jit. A norm's share is what its step "
        "takes longer than the step without norms, in percent of its step. Temporaries: memory that the compiled "
        "step needs beside its arguments and results. Compilation: processor seconds of all threads, from Python to "
        "machine code, once.",
        *(f"Skipped: {NORMS[name].title}, {why}." for name, why in run.skipped.items()),
    ]
    for row in run.rows:
        names = [name for name in NORMS if name in row["seconds"]]
        parts.append("## {}, {}".format(row["title"], row["dtype"]))
        parts.append(
            harness.markdown_table(
                ["", "ms a step", "time / time with jbn", "share of the step, %", "temporaries, MB", "compilation, s"],
                [_line(row, name) for name in names],
            )
        )
        parts += [f"{NORMS[name].title} could not run it: {error}." for name, error in row["errors"].items()]
    return "\n\n".join(parts)


def _line(row, name):
    seconds = row["seconds"]
    part = share(row, name)
    return [
        NORMS[name].title,
        f"{1e3 * harness.spread(seconds[name]).median:.3f}",
        harness.spread(harness.ratios(seconds[name], seconds["jbn"])).text() if "jbn" in seconds else "–",
        "–" if part is None or name == "none" or NORMS[name].torch else harness.spread(part).text(1),
        "–" if name not in row["temporaries"] else f"{row['temporaries'][name] / 1e6:.1f}",
        "–" if name not in row["compilation"] else f"{row['compilation'][name]:.2f}",
    ]


def picture(run: harness.Run) -> Any:
    """Bars of the shares on the left, of the memory on the right."""
    names = [name for name in NORMS if any(name in row["seconds"] for row in run.rows)]
    size = (12, 1.5 + 0.25 * len(names) * len(run.rows))
    figure, panels = harness.figure(ncols=2, figsize=size, sharey=True, layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        for line, row in enumerate(run.rows):
            place, style = line + (i - (len(names) - 1) / 2) * height, {"height": 0.9 * height, "color": f"C{i}"}
            label = NORMS[name].title if line == 0 else None
            part = share(row, name)
            if part is not None and name != "none" and not NORMS[name].torch:
                low, median, high = sorted(harness.spread(part))
                panels[0].barh(place, median, xerr=[[median - low], [high - median]], **style)
            if name in row["temporaries"]:
                panels[1].barh(place, row["temporaries"][name] / 1e6, label=label, **style)
    panels[0].set_yticks(range(len(run.rows)), [f"{row['title']}\n{row['dtype']}" for row in run.rows])
    panels[0].invert_yaxis()
    panels[0].set_xlabel("batch norm's share of the step, %")
    panels[1].set_xlabel("temporaries of the step, MB")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    for panel in panels:
        panel.grid(axis="x", alpha=0.3)
    return figure


def save(run: harness.Run, out: Any) -> None:
    name = "step-resnet50" if "resnet50" in run.settings["networks"] else "step"
    stem = harness.stem(name, run.device, run.about["date"], quick=run.settings["quick"])
    paths = harness.write(out, stem, dataclasses.asdict(run), page(run), picture(run))
    print("\nwritten:", *paths, flush=True)


def measure(options: Any) -> harness.Run:
    import jax

    skipped = {
        name: f"{NORMS[name].package} is not installed"
        for name in options.contestants
        if importlib.util.find_spec(NORMS[name].package) is None
    }
    present = [name for name in NORMS if name in options.contestants and name not in skipped]
    packages = {NORMS[name].package for name in present if any(map(NORMS[name].runs, options.networks))} | {"jbn"}
    packages = ["jax", "jaxlib", *sorted(packages | ({"torch"} if "torchvision" in packages else set())), "optax"]
    versions = {package: importlib.metadata.version(package) for package in packages}
    settings = {"rounds": options.rounds, "seed": options.seed, "quick": options.quick, "networks": options.networks}
    device = jax.devices()[0]
    run = harness.Run(harness.machine(), versions, f"{device.platform}: {device.device_kind}", settings, skipped)
    order = random.Random(options.seed)
    cases = TINY if options.quick else CASES
    for dtype in options.dtypes:
        for network in options.networks:
            able = [name for name in present if NORMS[name].runs(network)]
            run.rows.append(_measured(cases[network], dtype, able, order, options))
            print(run.rows[-1]["title"], dtype, flush=True)
            for name in run.rows[-1]["seconds"]:
                print("  ", *_line(run.rows[-1], name), sep="  ", flush=True)
            for name, error in run.rows[-1]["errors"].items():
                print(f"  {name}: {error}", file=sys.stderr)
    return run


def _measured(case, dtype, names, order, options):
    steps: dict[str, Any] = {}

    def build(name, _):
        if NORMS[name].torch:
            import torch_step

            steps[name] = torch_step.Step(case, dtype)
        else:
            steps[name] = Step(name, case, dtype)
        return steps[name]

    seconds, errors = harness.interleave(
        {"here": harness.Here(build)},
        dict.fromkeys(names, "here"),
        case._asdict(),
        rounds=options.rounds,
        turn_seconds=options.turn,
        order=order,
    )
    _check(steps, dtype)
    return {
        "title": case.title,
        "dtype": dtype,
        "case": case._asdict(),
        "seconds": {name: [float(f"{t:.5g}") for t in seconds[name]] for name in names if name in seconds},
        "temporaries": {name: step.temporaries for name, step in steps.items() if not NORMS[name].torch},
        "compilation": {
            name: float(f"{step.compilation:.4g}") for name, step in steps.items() if not NORMS[name].torch
        },
        "first_loss": {name: step.first_loss for name, step in steps.items()},
        "errors": errors,
    }


def _check(steps, dtype):
    """The norms have to be the same function, and no step may have been one that changes nothing."""
    losses = [step.first_loss for name, step in steps.items() if name != "none"]
    if losses and max(losses) - min(losses) > (1e-3 if dtype == "float32" else 5e-2) * min(losses):
        raise RuntimeError(f"The norms differ in the loss they start with: {losses}.")
    for name, step in steps.items():
        if step.last_metrics["skipped"]:
            raise RuntimeError(f"{name}: the loss is not finite.")


def arguments() -> Any:
    options = harness.parser(__doc__, rounds=15, turn=0.5)
    listed = harness.comma_separated
    options.add_argument("--contestants", type=listed(NORMS), default=list(NORMS), help=", ".join(NORMS))
    options.add_argument(
        "--networks", type=listed(CASES), default=[n for n in CASES if CASES[n].usual], help=", ".join(CASES)
    )
    options.add_argument("--dtypes", type=listed(("float32", "bfloat16")), default=["float32", "bfloat16"])
    options = options.parse_args()
    if options.quick:
        options.dtypes, options.rounds, options.turn = options.dtypes[:1], 3, 0.02
    return options


def main() -> None:
    options = arguments()
    run = measure(options)
    print("\n" + page(run))
    save(run, options.out)


if __name__ == "__main__":
    main()
