"""Compiles a training step of ResNet-50 ahead of time: for one chip of a TPU v5e, one H100, and 256 chips.

None of them has to be there. Forward, backward, SGD with momentum and the update of the running statistics, in one
jit, with and without remat; on 256 chips the batch is split over an explicit mesh and everything else is on every
chip. The table holds facts of the compiler: they come out the same on every run, and are not timings.
"""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import targets  # isort: skip  (before jax)
import harness
import jax
import jax.numpy as jnp
import numpy as np
from hlo import facts
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from step import NORMS, training

from jbn import networks
from jbn.cli.bench.contestants import versions

SIZE, CLASSES = 224, 1000
CHIPS = 256
TARGETS = {
    "tpu": ("One chip of a TPU v5e", "v5e:2x2"),
    "gpu": ("One H100", "gpu"),
    "tpu256": (f"{CHIPS} chips of a TPU v5e, an explicit mesh", "v5e:16x16"),
}
BESIDE = "gpu"  # the target on which other norms, and none, stand beside jbn: its compiler is the fastest
IN_JAX = [name for name in NORMS if not NORMS[name].flax and not NORMS[name].torch]


def compiled(row: dict[str, Any], devices: list[Any], options: Any) -> dict[str, Any]:
    over_batch = everywhere = SingleDeviceSharding(devices[0])
    images = options.batch
    if row["target"] == "tpu256":
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Explicit,))
        over_batch, everywhere, images = NamedSharding(mesh, P("data")), NamedSharding(mesh, P()), images * CHIPS
    norm, depth = NORMS[row["norm"]].options(), networks.imagenet(options.depth)
    start, step = training(
        networks.resnet(CLASSES, **depth, **norm, remat=row["remat"], dtype=jnp.dtype(options.dtype)), 0.1
    )
    with jax.default_device(jax.devices("cpu")[0]):
        train_state = jax.eval_shape(start, jax.random.key(0))
        train_state = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere), train_state)
        x = jax.ShapeDtypeStruct((images, SIZE, SIZE, 3), options.dtype, sharding=over_batch)
        y = jax.ShapeDtypeStruct((images,), "int32", sharding=over_batch)
        begun = time.process_time()
        program = step.lower(train_state, (x, y)).compile()
    taken = round(time.process_time() - begun, 1)  # seconds of the processor
    known, read = facts(program, options.dump, f"{row['target']}-{row['norm']}{'-remat' if row['remat'] else ''}")
    collectives, received = read.received(CHIPS)
    return {**known, "collectives": collectives, "received": received, "compilation": taken}


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    names = run.able(options.contestants if BESIDE in options.targets else ["jbn"], NORMS)
    run.versions |= versions(["optax"])
    for target in options.targets:
        devices = targets.compiler(run, *TARGETS[target])
        taking = [name for name in names if target == BESIDE or name == "jbn"] if devices else []
        for norm, remat in itertools.product(taking, (False, True)):
            row = {"target": target, "norm": norm, "remat": remat}
            yield harness.tried(row, partial(compiled, row, devices, options))


def page(run: harness.Run) -> str:
    settings = run.settings
    parts = [
        *run.heading(f"Ahead of time: a training step of ResNet-{settings['depth']}"),
        f"{settings['batch']} images of {SIZE}×{SIZE}×3 on each chip, computed in {settings['dtype']}.",
    ]
    for target, rows in run.by("target").items():
        header = ["", "bytes accessed, GB", "temporaries, GB", "arithmetic, TFLOP", "kernels", "compilation, s"]
        if target == "tpu256":
            header += ["collectives", "received by each chip, MB"]
        parts += [f"## {TARGETS[target][0]}", harness.table(header, [_cells(row)[: len(header)] for row in rows])]
    return "\n\n".join(parts)


def _cells(row):
    title = NORMS[row["norm"]].title + (", remat" if row["remat"] else "")
    if row["error"]:
        return [title, *["–"] * 7]
    reported = "" if row["reported"] is None else f" ({row['reported'] / 1e9:.1f})"
    return [
        title,
        f"{row['bytes'] / 1e9:.1f}{reported}",
        harness.cell(row["temporaries"] / 1e9),
        harness.cell(row["flops"] and row["flops"] / 1e12),
        row["kernels"],
        f"{row['compilation']:.0f}",
        ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "none",
        f"{row['received'] / 1e6:.1f}",
    ]


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        options={
            "targets": harness.some(TARGETS, TARGETS),
            "contestants": harness.some(IN_JAX, ("jbn", "linen", "none")),
            "dtype": {"choices": harness.DTYPES[:2], "default": "bfloat16"},
            "batch": {"type": int, "default": 128, "help": "images on each chip"},
            "depth": {"type": int, "choices": (18, 34, 50, 101, 152), "default": 50},
            "dump": {"type": Path, "metavar": "DIR", "help": "write the optimized HLO there"},
        },
        quick={"depth": 18, "batch": 8, "contestants": 1},
        on_device=False,
    )
