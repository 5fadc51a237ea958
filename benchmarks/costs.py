"""What there is around a layer: importing, compiling and calling it eagerly, and what it keeps for backward.

Compilation is that of 20 batch norms with relu, their gradient and the update of their running statistics,
from Python to machine code. Its time is the processor time of all threads, which other programs disturb less than
the clock; every turn compiles anew. Eager calls are training and evaluation steps without jit. Kept are the arrays
of a `jax.vjp`, in bytes over those of x.
"""

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import harness
import jax
import jax.numpy as jnp

from jbn.cli.bench.contestants import CONTESTANTS, IN_JAX, PASSES, Case, Layer, missing
from jbn.cli.bench.engine import Turn, ratios, spread, timed

LAYERS = 20
SHAPE = (32, 28, 28, 64)  # of the data that compilation is for
EAGER = (32, 64)  # small, so that the call is all that costs
LIMIT_MS = 50  # for the import
STAGES = ("trace", "lower", "compile")
IMPORTS = {"jax": ("time", "jax"), "jbn": ("jax", "jbn"), "linen": ("jax", "flax.linen")}


def importing(first: str, second: str) -> Turn:
    """The import of ``second``, in a process that has imported ``first``."""
    code = f"import time, {first}; start = time.perf_counter(); import {second}; print(time.perf_counter() - start)"
    return lambda repeats: float(subprocess.check_output([sys.executable, "-c", code]))


def layer_of(name: str, dtype: str) -> Layer:
    return CONTESTANTS[name].build(Case(SHAPE, -1, dtype, "forward+backward"), 0.9)


def compiling(name: str, dtype: str, stages: list[list[float]]) -> Turn:
    """Compiles the gradient of 20 layers with relu; appends the processor seconds of each stage."""
    layer = layer_of(name, dtype)

    def loss(params, states, x):
        news = []
        for own, state in zip(params, states, strict=True):
            x, new = layer.apply(own, state, x)
            x = jax.nn.relu(x)
            news.append(new)
        return jnp.mean(jnp.square(x.astype(jnp.float32))), news

    arguments = [layer.params] * LAYERS, [layer.state] * LAYERS, jnp.ones(SHAPE, dtype)

    def turn(repeats):
        jax.clear_caches()
        times = [time.process_time()]
        traced = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True)).trace(*arguments)
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        lowered.compile()
        times.append(time.process_time())
        stages.append([b - a for a, b in itertools.pairwise(times)])
        return times[-1] - times[0]

    return turn


def kept(name: str, dtype: str) -> float:
    """Bytes of all that one training-mode layer keeps for backward, over those of x."""
    layer = layer_of(name, dtype)
    x = jax.random.normal(jax.random.key(0), SHAPE, dtype)
    _, pullback, _ = jax.vjp(lambda p, x: layer.apply(p, layer.state, x), layer.params, x, has_aux=True)
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}
    return sum(leaf.nbytes for leaf in arrays.values()) / x.nbytes


def eager(name: str, mode: str) -> Turn:
    """A step without jit, and waiting for it."""
    layer = CONTESTANTS[name].build(Case(EAGER, -1, "float32", mode), 0.9)
    x = jax.random.normal(jax.random.key(0), EAGER)

    def forward():
        return jax.block_until_ready(layer.apply(layer.params, layer.state, x))

    def forward_and_backward():
        y, pullback, state = jax.vjp(lambda p, x: layer.apply(p, layer.state, x), layer.params, x, has_aux=True)
        return jax.block_until_ready((pullback(y), state))

    return timed(forward_and_backward if mode == "forward+backward" else forward)


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    names = run.able(("jbn", *options.contestants))
    able = [name for name in IMPORTS if name == "jax" or not missing([name])]
    imports = {f"import {name}": partial(importing, *IMPORTS[name]) for name in able}
    once = argparse.Namespace(rounds=options.rounds, turn=0, order=options.order)  # no turn is repeated
    yield {"part": "import", "of": "", **harness.timings(once, imports)}
    for dtype in options.dtypes:
        stages: dict[str, list[list[float]]] = {name: [] for name in names}
        timings = harness.timings(once, {name: partial(compiling, name, dtype, stages[name]) for name in names})
        medians = {
            # Without those of the turn that warms up.
            name: dict(zip(STAGES, (spread(each).median for each in zip(*taken[1:], strict=True)), strict=True))
            for name, taken in stages.items()
        }
        yield {"part": "compilation", "of": dtype, **timings, "stages": medians}
        yield {"part": "kept", "of": dtype, "over_x": {name: float(f"{kept(name, dtype):.4g}") for name in names}}
    for mode in PASSES:
        yield {"part": "eager", "of": mode} | harness.timings(options, {n: partial(eager, n, mode) for n in names})


def page(run: harness.Run) -> str:
    (imports,), compilation, kept, eager = run.by("part").values()
    names = [name for name in kept[0]["over_x"] if all(name in row["seconds"] for row in (*compilation, *eager))]

    def table(rows: list[dict[str, Any]], columns: Sequence[str], cells: Callable[[dict[str, Any], str], Any]) -> str:
        """The same columns of each row side by side, a line for each contestant."""
        header = ["", *(f"{row['of']} {column}".strip() for row in rows for column in columns)]
        return harness.table(
            header, [[CONTESTANTS[name].title, *(c for row in rows for c in cells(row, name))] for name in names]
        )

    def compiled(row, name):
        seconds = [*(row["stages"][name][stage] for stage in STAGES), spread(row["seconds"][name]).median]
        return *map(harness.cell, seconds), ratio(row, name)

    def called(row, name):
        return f"{1e6 * spread(row['seconds'][name]).median:.0f}", ratio(row, name)

    def ratio(row, name):
        return harness.cell(spread(ratios(row["seconds"][name], row["seconds"]["jbn"])))

    of_imports = {name: spread(1e3 * each for each in seconds) for name, seconds in imports["seconds"].items()}
    return "\n\n".join(
        [
            *run.heading("Around the layer"),
            "## Import",
            f"In a fresh process, after jax; the goal is less than {LIMIT_MS} ms.",
            harness.table(["", "ms"], [[name, harness.cell(each, 1)] for name, each in of_imports.items()]),
            f"## Compilation of {LAYERS} layers with relu and their gradient",
            "Processor seconds of all threads. The goal is no more than linen's.",
            *(table([row], (*STAGES, "all", "time / jbn"), compiled) for row in compilation),
            "## Kept for backward",
            f"Bytes over those of x, {'×'.join(map(str, SHAPE))}.",
            table(kept, [""], lambda row, name: [harness.cell(row["over_x"][name], 3)]),
            "## Eager calls",
            f"x is {'×'.join(map(str, EAGER))}. The goal is no more than linen's.",
            table(eager, ("µs", "time / jbn"), called),
        ]
    )


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        rounds=9,
        turn=0.05,
        options={
            "contestants": harness.some(IN_JAX, ("jbn", "linen", "plain")),
            "dtypes": harness.some(harness.DTYPES, harness.DTYPES[:2]),
        },
        quick={"dtypes": 1, "rounds": 2},
    )
