"""Counts what synchronized batch norm sends between the chips of a TPU, none of which has to be there.

Compiled ahead of time for groups of 4 to 4096 chips, each time in both ways: moments gathered, or summed. The
table gives the collectives of the optimized HLO and the bytes that each chip receives, for one batch norm and
for the 53 of a ResNet-50. These are facts of the compiler and come out the same on every run; they are no
timings.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import re
import sys
from collections import Counter
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so two may compile at once
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import harness
import jax
import jax.numpy as jnp
from hlo import Program
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jbn._pool
from jbn import BNParams, BNState, bn_apply

TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:16x16x16")


def _resnet_50() -> tuple[int, ...]:
    """Channels of its 53 batch norms: the stem, and in each stage blocks of three and one shortcut."""
    widths = [64]
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        widths += [inner, inner, 4 * inner, 4 * inner] + [inner, inner, 4 * inner] * (blocks - 1)
    return tuple(widths)


PROGRAMS = {"one of 256 channels": (256,), "ResNet-50, 26 560 channels": _resnet_50()}
# Whether there is a state, whose mean is the shift of all chips; and else up to how many of them moments are gathered.
WAYS = {"one shift": (True, 0), "gathered": (False, sys.maxsize), "summed": (False, 1)}
STANDARD = jbn._pool._MOST_GATHERED

ABOUT = f"""\
Each chip has two examples; between two batch norms of the ResNet stands no convolution, only a change of width,
which moves nothing between chips. Backward is for x alone: the gradients of γ and β travel with those of all
other parameters. Of n bytes of a result over D chips, each chip receives n·(D−1)/D in an all-gather and twice
that in an all-reduce, which is a reduce-scatter and an all-gather.

With a state that all chips share, as in training, their sums are about its mean and are simply added up ("one shift");
a second read and its sum are in a branch that ordinary data does not take, and are not counted. Without a state the
library gathers up to {STANDARD} chips and sums above."""


@dataclasses.dataclass
class Row:
    program: str
    topology: str
    chips: int
    way: str
    standard: bool  # whether the library goes this way in training
    forward: dict[str, int] | None = None  # collectives by kind
    backward: dict[str, int] | None = None
    forward_bytes: float | None = None  # that each chip receives
    backward_bytes: float | None = None
    error: str = ""


def network(params: list[BNParams], states: list[BNState | None], x: jax.Array) -> jax.Array:
    """One batch norm after the other; widths are changed by repetition and by cutting off."""
    for layer, state in zip(params, states, strict=True):
        width = layer.gamma.size
        x = jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]
        x, _ = bn_apply(layer, state, x, train=True, axis_name="data")
        x = jax.nn.relu(x)
    return x


def forward_backward(params: list[BNParams], states: list[BNState | None], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, pullback = jax.vjp(lambda x: network(params, states, x), x)
    return y, pullback(jnp.cos(y))[0]


def traffic(fn: Any, mesh: Any, widths: tuple[int, ...], stateful: bool) -> tuple[dict[str, int], float]:
    """Collectives by kind, and the bytes that each chip receives."""

    def array(spec, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def state(width):
        return BNState(array(P(), width), array(P(), width), array(P(), width, dtype=jnp.int32)) if stateful else None

    out_specs = (P("data"), P("data")) if fn is forward_backward else P("data")
    shards = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=out_specs)
    params, states = [BNParams(array(P(), n), array(P(), n)) for n in widths], [state(n) for n in widths]
    text = jax.jit(shards).lower(params, states, array(P("data"), 2 * mesh.size, widths[0])).compile().as_text()
    return received(Program(text), mesh.size)


def received(program: Program, chips: int) -> tuple[dict[str, int], float]:
    """Collectives by kind, and bytes; an asynchronous one is counted where it ends."""
    kinds, total = Counter[str](), 0.0
    for instruction in program.on_the_way():
        op = instruction.op.removesuffix("-done")
        passes = {"all-gather": 1, "all-reduce": 2}.get(op)
        if passes:
            kinds[op] += 1
            total += passes * _bytes(instruction.type) * (chips - 1) / chips
        elif re.match("all-to-all|collective-permute|reduce-scatter", op) and not op.endswith("-start"):
            raise ValueError(f"text: got {op}; expected all-gather and all-reduce alone; say here what it delivers.")
    return dict(kinds), total


def _bytes(type_: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_):
        width = {"f32": 4, "bf16": 2}[dtype]
        for size in filter(None, sizes.split(",")):
            width *= int(size)
        total += width
    return total


def measure(row: Row, mesh: Any, widths: tuple[int, ...]) -> None:
    stateful, jbn._pool._MOST_GATHERED = WAYS[row.way]
    jax.clear_caches()  # what was traced went the other way
    try:
        row.forward, row.forward_bytes = traffic(network, mesh, widths, stateful)
        both, both_bytes = traffic(forward_backward, mesh, widths, stateful)
    finally:
        jbn._pool._MOST_GATHERED = STANDARD
    row.backward, row.backward_bytes = dict(Counter(both) - Counter(row.forward)), both_bytes - row.forward_bytes


def page(rows: list[Row], line: str, notes: list[str]) -> str:
    parts = ["# What synchronized statistics send", line, ABOUT, *notes]
    header = ("chips", "way", "forward", "backward", "forward, bytes per chip", "backward", "together")
    for name in dict.fromkeys(row.program for row in rows):
        chosen = [row for row in rows if row.program == name and not row.error]
        parts += [f"## {name}", harness.markdown_table(header, map(_cells, chosen))]
    parts += [f"{row.program}, {row.topology}, {row.way}: {row.error}" for row in rows if row.error]
    return "\n\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    def counted(kinds):
        return " + ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"

    def shown(n):
        return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"

    way = f"**{row.way}**" if row.standard else row.way
    amounts = (row.forward_bytes, row.backward_bytes, row.forward_bytes + row.backward_bytes)
    return f"{row.chips} ({row.topology})", way, counted(row.forward), counted(row.backward), *map(shown, amounts)


def arguments() -> argparse.Namespace:
    options = harness.parser(__doc__)
    options.add_argument("--topologies", type=harness.comma_separated(TOPOLOGIES), default=list(TOPOLOGIES))
    options = options.parse_args()
    if options.quick:
        options.topologies = options.topologies[:1]
    return options


def main() -> None:
    options = arguments()
    about, rows, notes = harness.machine(), [], []
    for topology in options.topologies:
        try:
            chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
            mesh = topologies.make_mesh(chips, (len(chips.devices),), ("data",))
        except Exception as error:
            notes.append(f"Skipped: {topology}, {_line(error)} (libtpu is needed).")
            continue
        for name, widths in list(PROGRAMS.items())[: 1 if options.quick else None]:
            for way in WAYS:
                standard = way == "one shift"
                rows.append(row := Row(name, topology, mesh.size, way, standard))
                try:
                    measure(row, mesh, widths)
                except Exception as error:
                    row.error = _line(error)
                print(*(f"{k}={v}" for k, v in dataclasses.asdict(row).items() if v not in (None, "")), flush=True)
    if not rows:
        sys.exit("\n".join(notes))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jbn", "libtpu")}
    text = page(rows, harness.machine_line({**about, "load_at_start": None}, versions), notes)
    print("\n" + text)
    record = {"about": about, "versions": versions, "notes": notes, "rows": [dataclasses.asdict(row) for row in rows]}
    stem = "sync-quick" if options.quick else f"sync-{about['date']}"
    print("\nwritten:", *harness.write(options.out, stem, record, text))


def _line(error):
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


if __name__ == "__main__":
    main()
