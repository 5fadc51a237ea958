"""Compiles a training step of ResNet-50 ahead of time: for one chip of a TPU v5e, one H100, and 256 chips.

None of them has to be there. Forward, backward, SGD with momentum and the update of the running statistics, in one
jit, with and without remat; on 256 chips the batch is split over an explicit mesh and everything else is on every
chip. The table holds facts of the compiler: they come out the same on every run, and are not timings.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aot  # first, since it sets what the compilers read when jax is imported
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hlo import Program, bytes_of
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from step import NORMS

from jbn import networks
from jbn.training import TrainState, make_train_step

SIZE, CLASSES = 224, 1000
CHIPS = 256
TARGETS = {
    "tpu": "one chip of a TPU v5e",
    "gpu": "one H100",
    "tpu256": f"{CHIPS} chips of a TPU v5e, an explicit mesh",
}
BESIDE = "gpu"  # the target on which other norms, and none, stand beside jbn: its compiler is the fastest
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")

ABOUT = """\
Figures are those of one chip. Bytes accessed: what all kernels read and write; of a conditional the cheapest branch
counts, the one that ordinary data takes. In brackets the compiler's own count, where it gives one: it counts the
dearest branch, and whole tiles where a slice is read. Temporaries: memory beyond arguments and results. Arithmetic:
the compiler's own count. Collectives: those on the way that ordinary data takes. Of n bytes of a result over D
chips each receives n·(D−1)/D, and twice that in an all-reduce, which is a reduce-scatter and an all-gather."""


@dataclasses.dataclass
class Row:
    target: str
    norm: str
    remat: bool
    bytes: float | None = None
    reported: float | None = None  # the compiler's own "bytes accessed" (TPU)
    temporaries: int | None = None
    flops: float | None = None
    kernels: int | None = None
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    received: float = 0.0  # bytes that collectives deliver to each chip
    compilation: float | None = None  # seconds of the processor
    error: str = ""


def placed(target: str) -> tuple[Any, Any]:
    """The sharding of the batch and that of all else."""
    if target != "tpu256":
        alone = SingleDeviceSharding(aot.topology(target).devices[0])
        return alone, alone
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    mesh = Mesh(np.array(chips), ("data",), axis_types=(AxisType.Explicit,))
    return NamedSharding(mesh, P("data")), NamedSharding(mesh, P())


def loss_fn(outputs: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), y).mean()


def measure(row: Row, shardings: tuple[Any, Any], options: Any) -> None:
    over_batch, everywhere = shardings
    make = networks.imagenet(options.depth)
    network = networks.resnet(
        CLASSES, **make, **NORMS[row.norm].options(), remat=row.remat, dtype=jnp.dtype(options.dtype)
    )
    optimizer = optax.sgd(0.1, momentum=0.9)

    def start(key):
        params, state = network.init(key)
        return TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))

    def described(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    train_state = jax.tree.map(lambda v: described(v, everywhere), jax.eval_shape(start, jax.random.key(0)))
    images = options.batch * (CHIPS if row.target == "tpu256" else 1)
    x = jax.ShapeDtypeStruct((images, SIZE, SIZE, 3), options.dtype, sharding=over_batch)
    y = jax.ShapeDtypeStruct((images,), "int32", sharding=over_batch)
    step = jax.jit(make_train_step(network.apply, loss_fn, optimizer), donate_argnums=0)
    begun = time.process_time()
    compiled = step.lower(train_state, (x, y)).compile()
    row.compilation = round(time.process_time() - begun, 1)
    text = compiled.as_text()
    if options.dump is not None:
        options.dump.mkdir(parents=True, exist_ok=True)
        (options.dump / f"{row.target}-{row.norm}{'-remat' if row.remat else ''}.txt").write_text(text)
    program, reported = Program(text), compiled.cost_analysis() or {}
    row.bytes, row.kernels = program.cost()
    row.reported, row.flops = reported.get("bytes accessed"), reported.get("flops")
    row.temporaries = compiled.memory_analysis().temp_size_in_bytes
    row.collectives, row.received = received(program, CHIPS)


def received(program: Program, chips: int) -> tuple[dict[str, int], float]:
    """Collectives by kind, and the bytes that each chip receives; an asynchronous one is counted where it ends."""
    kinds, total = Counter[str](), 0.0
    for instruction in program.on_the_way():
        op = instruction.op.removesuffix("-done")
        if op in COLLECTIVES:
            kinds[op] += 1
            passes = 2 if op == "all-reduce" else 1  # a reduce-scatter and an all-gather
            total += passes * bytes_of(instruction.type, everywhere=True) * (chips - 1) / chips
    return dict(kinds), total


def page(rows: list[Row], line: str, options: Any, notes: list[str]) -> str:
    parts = [
        f"# Ahead of time: a training step of ResNet-{options.depth}",
        line,
        f"{options.batch} images of {SIZE}×{SIZE}×3 on each chip, computed in {options.dtype}. {ABOUT}",
        *notes,
    ]
    for target in dict.fromkeys(row.target for row in rows):
        chosen = [row for row in rows if row.target == target]
        header = ["", "bytes accessed, GB", "temporaries, GB", "arithmetic, TFLOP", "kernels", "compilation, s"]
        if target == "tpu256":
            header += ["collectives", "received by each chip, MB"]
        parts += [
            f"## {TARGETS[target][0].upper()}{TARGETS[target][1:]}",
            harness.markdown_table(header, [_cells(row)[: len(header)] for row in chosen]),
            *(f"{_title(row)}: {row.error}" for row in chosen if row.error),
        ]
    return "\n\n".join(parts)


def _title(row: Row) -> str:
    return NORMS[row.norm].title + (", remat" if row.remat else "")


def _cells(row: Row) -> list[str]:
    if row.bytes is None:
        return [_title(row), *["–"] * 7]
    reported = "" if row.reported is None else f" ({row.reported / 1e9:.1f})"
    return [
        _title(row),
        f"{row.bytes / 1e9:.1f}{reported}",
        f"{row.temporaries / 1e9:.2f}",
        "–" if row.flops is None else f"{row.flops / 1e12:.2f}",
        str(row.kernels),
        f"{row.compilation:.0f}",
        ", ".join(f"{n} {kind}" for kind, n in row.collectives.items()) or "none",
        f"{row.received / 1e6:.1f}",
    ]


def arguments() -> Any:
    options = harness.parser(__doc__)
    listed = harness.comma_separated
    options.add_argument("--targets", type=listed(TARGETS), default=list(TARGETS), help=", ".join(TARGETS))
    norms = [name for name in NORMS if not NORMS[name].flax and not NORMS[name].torch]
    options.add_argument(
        "--contestants",
        type=listed(norms),
        default=["jbn", "linen", "none"],
        help=f"{', '.join(norms)}; all but jbn on the H100 alone",
    )
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--batch", type=int, default=128, help="images on each chip")
    options.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50)
    options.add_argument("--dump", type=Path, metavar="DIR", help="write the optimized HLO there")
    options = options.parse_args()
    if options.quick:
        options.depth, options.batch, options.contestants = 18, 8, ["jbn"]
    return options


def main() -> None:
    options = arguments()
    about = harness.machine()
    packages, rows, notes = ["jax", "jaxlib", "jbn", "optax"], [], []
    contestants = [n for n in options.contestants if importlib.util.find_spec(NORMS[n].package) is not None]
    notes += [f"Skipped: {NORMS[n].title}, not installed." for n in options.contestants if n not in contestants]
    for target in options.targets:
        compiler = "jax-cuda12-pjrt" if target == "gpu" else "libtpu"
        try:
            shardings = placed(target)
        except Exception as error:
            notes.append(f"Skipped: {TARGETS[target]}, {aot.one_line(error)} ({compiler} is needed).")
            continue
        packages += [compiler] if compiler not in packages else []
        for norm in contestants if target == BESIDE else [n for n in contestants if n == "jbn"]:
            packages += ["flax"] if NORMS[norm].package == "flax" and "flax" not in packages else []
            for remat in (False, True):
                rows.append(row := Row(target, norm, remat))
                try:
                    with jax.default_device(jax.devices("cpu")[0]):
                        measure(row, shardings, options)
                except Exception as error:
                    row.error = aot.one_line(error)
                print(*(f"{k}={v}" for k, v in dataclasses.asdict(row).items() if v not in (None, "")), flush=True)
                written = write(rows, about, packages, notes, options)  # each time: a row takes minutes
    if not rows:
        sys.exit("\n".join(notes))
    print("\nwritten:", *written)


def write(rows: list[Row], about: dict[str, Any], packages: list[str], notes: list[str], options: Any) -> list[Path]:
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    record = {
        "about": about,
        "versions": versions,
        "settings": {name: getattr(options, name) for name in ("dtype", "batch", "depth")},
        "notes": notes,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    line = harness.machine_line({**about, "load_at_start": None}, versions)
    stem = "aot-network-quick" if options.quick else f"aot-network-{about['date']}"
    return harness.write(options.out, stem, record, page(rows, line, options, notes))


if __name__ == "__main__":
    main()
