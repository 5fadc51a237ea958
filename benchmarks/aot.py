"""Compiles one batch norm ahead of time for a TPU (v5e) and a GPU (H100), neither of which has to be there.

A memory-bound layer costs what it moves: the table counts passes over x, the bytes that all kernels
read and write over the bytes of x. These are facts of the compiler and come out the same on every run;
they are not timings.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import targets  # isort: skip  (before jax)
import harness
import jax
from hlo import facts

from jbn.cli.bench.contestants import CONTESTANTS, IN_JAX, Case

TARGETS = {"tpu": ("TPU v5e", "v5e:2x2"), "gpu": ("GPU H100", "gpu")}
# In the second, g is an input beside x, and the compiler may make y in the kernel that makes dx. In a network
# g comes after y: the third has a barrier between forward and backward, and updates the running statistics.
PROGRAMS = ("forward", "forward+backward", "training step", "conv+BN+relu+conv")
USUAL = ("jbn", "linen", "linen_two_pass", "plain", "jbn_masked", "linen_masked")


def program(name: str, layer: Any) -> Any:
    """A function of (params, state, x, g, *kernels)."""

    def forward(params, state, x, g):
        return layer.apply(params, state, x)[0]

    def forward_and_backward(params, state, x, g):
        y, pullback = jax.vjp(lambda params, x: layer.apply(params, state, x)[0], params, x)
        return y, *pullback(g)

    def training_step(params, state, x, g):
        y, pullback, state = jax.vjp(lambda params, x: layer.apply(params, state, x), params, x, has_aux=True)
        y, g = jax.lax.optimization_barrier((y, g))
        return y, *pullback(g), state

    def block(params, state, x, g, first, second):
        """Gradients of a loss whose derivative with respect to the output is g."""

        def output(params, x, first, second):
            y, _ = layer.apply(params, state, _convolve(x, first))
            return _convolve(jax.nn.relu(y), second)

        return jax.vjp(output, params, x, first, second)[1](g)

    return dict(zip(PROGRAMS, (forward, forward_and_backward, training_step, block), strict=True))[name]


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def compiled(row: dict[str, Any], case: Case, sharding: Any, dump: Path | None) -> dict[str, Any]:
    with jax.default_device(jax.devices("cpu")[0]):
        layer = CONTESTANTS[row["contestant"]].build(case, 0.9)
    kernels = [(3, 3, case.channels, case.channels)] * (2 if row["program"] == PROGRAMS[-1] else 0)

    def described(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params, state = jax.tree.map(lambda v: described(v.shape, v.dtype), (layer.params, layer.state))
    x = described(case.shape, case.dtype)
    weights = [described(shape, case.dtype) for shape in kernels]
    step = jax.jit(program(row["program"], layer)).lower(params, state, x, x, *weights).compile()
    known, _ = facts(step, dump, "-".join(map(str, row.values())))
    size = math.prod(case.shape) * jax.numpy.dtype(case.dtype).itemsize
    over_x = {key: None if known[key] is None else round(known[key] / size, 3) for key in ("reported", "temporaries")}
    return {"passes": round(known["bytes"] / size, 3), "kernels": known["kernels"], **over_x}


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    contestants, shape = run.able(options.contestants), tuple(map(int, options.shape.split(",")))
    for target in options.targets:
        for device in targets.compiler(run, *TARGETS[target])[:1]:
            sharding = jax.sharding.SingleDeviceSharding(device)
            for dtype, name, contestant in itertools.product(options.dtypes, options.programs, contestants):
                row = {"target": target, "dtype": dtype, "program": name, "contestant": contestant}
                case = Case(shape, -1, dtype, "forward+backward")
                yield harness.tried(row, partial(compiled, row, case, sharding, options.dump))


def page(run: harness.Run) -> str:
    shape = run.settings["shape"].replace(",", "×")
    parts = [*run.heading("Ahead of time: what the compiler makes of one batch norm"), f"x is {shape}, channels last."]
    dtypes, cells = list(run.by("dtype")), run.by("target", "program", "contestant", "dtype")
    for target, name in run.by("target", "program"):
        header = ["", *(f"{d} {what}" for d in dtypes for what in ("passes", "kernels", "temporaries"))]
        lines = [
            [CONTESTANTS[n].title, *(cell for d in dtypes for cell in _cells(cells[target, name, n, d][0]))]
            for n in run.by("contestant")
        ]
        parts += [f"## {TARGETS[target][0]}: {name}", harness.table(header, lines)]
    return "\n\n".join(parts)


def _cells(row):
    if row["error"]:
        return "–", "–", "–"
    reported = "" if row["reported"] is None else f" ({row['reported']:.2f})"
    return f"{row['passes']:.2f}{reported}", row["kernels"], f"{row['temporaries']:.2f}"


def picture(run: harness.Run) -> Any:
    """Passes over x, a panel for each target and program."""
    targets, names, contestants = run.by("target"), run.by("program"), list(run.by("contestant"))
    size = (4.5 * len(names), 2.8 * len(targets))
    figure, axes = harness.figure(*size, nrows=len(targets), ncols=len(names), squeeze=False, sharey=True)
    for panel, ((target, name), rows) in zip(axes.flat, run.by("target", "program").items(), strict=True):
        series: dict[str, list[float]] = {}
        for row in rows:
            series.setdefault(row["dtype"], []).append(row.get("passes", 0))
        harness.bars(panel, [CONTESTANTS[n].title for n in contestants], series, label_format="%.1f")
        panel.set(title=f"{TARGETS[target][0]}: {name}")
        panel.margins(x=0.13)  # for the figures at the ends of the bars
    figure.supxlabel("passes over x")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=len(series), fontsize=9)
    return figure


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        picture,
        options={
            "targets": harness.some(TARGETS, TARGETS),
            "dtypes": harness.some(harness.DTYPES[:2], harness.DTYPES[:2]),
            "programs": harness.some(PROGRAMS, PROGRAMS),
            "contestants": harness.some(IN_JAX, USUAL),
            "shape": {"default": "512,56,56,64", "help": "of x, channels last"},
            "dump": {"type": Path, "metavar": "DIR", "help": "write the optimized HLO there"},
        },
        quick={"dtypes": 1, "programs": 3, "contestants": 2},
        on_device=False,
    )
