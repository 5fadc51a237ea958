"""Counts what synchronized batch norm sends between the chips of a TPU, none of which has to be there.

Compiled ahead of time for groups of 4 to 4096 chips, each time in both ways: moments gathered, or summed. The
table gives the collectives of the optimized HLO and the bytes that each chip receives, for one batch norm and
for the 53 of a ResNet-50. These are facts of the compiler and come out the same on every run; they are no
timings.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import targets  # isort: skip  (before jax)
import harness
import jax
import jax.numpy as jnp
import numpy as np
from hlo import Program
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn._pool
from jbn import BNParams, BNState, bn_apply, networks

TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:16x16x16")


def _resnet_50() -> tuple[int, ...]:
    """Channels of its 53 batch norms."""
    params, _ = jax.eval_shape(networks.resnet(1000, **networks.imagenet(50)).init, jax.random.key(0))
    layers = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, BNParams))
    return tuple(layer.gamma.size for layer in layers if isinstance(layer, BNParams))


PROGRAMS = {"one of 256 channels": (256,), "ResNet-50, 26 560 channels": _resnet_50()}
# Whether there is a state, whose mean is the shift of all chips; and else up to how many of them moments are gathered.
# The first is the way of the library in training.
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
    compiled = jax.jit(shards).lower(params, states, array(P("data"), 2 * mesh.size, widths[0])).compile()
    return Program(compiled.as_text()).received(mesh.size)


def counted(program: str, way: str, mesh: Any) -> dict[str, Any]:
    stateful, jbn._pool._MOST_GATHERED = WAYS[way]
    jax.clear_caches()  # what was traced went the other way
    try:
        forward, forward_bytes = traffic(network, mesh, PROGRAMS[program], stateful)
        both, both_bytes = traffic(forward_backward, mesh, PROGRAMS[program], stateful)
    finally:
        jbn._pool._MOST_GATHERED = STANDARD
    return {
        "forward": forward,  # collectives by kind
        "backward": dict(Counter(both) - Counter(forward)),
        "forward_bytes": forward_bytes,  # that each chip receives
        "backward_bytes": both_bytes - forward_bytes,
    }


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    for topology in options.topologies:
        devices = targets.compiler(run, topology, topology)
        for program in list(PROGRAMS)[: 1 if options.quick else None] if devices else ():
            mesh = Mesh(np.array(devices), ("data",))
            for way in WAYS:
                row = {"program": program, "topology": topology, "chips": mesh.size, "way": way}
                yield harness.tried(row, partial(counted, program, way, mesh))


def page(run: harness.Run) -> str:
    parts = [*run.heading("What synchronized statistics send"), ABOUT]
    header = ("chips", "way", "forward", "backward", "forward, kB per chip", "backward, kB", "together, kB")
    for program, rows in run.by("program").items():
        parts += [f"## {program}", harness.table(header, [_cells(row) for row in rows if not row["error"]])]
    return "\n\n".join(parts)


def _cells(row):
    def kinds(counts):
        return " + ".join(f"{n} {kind}" for kind, n in counts.items()) or "none"

    forward, backward = row["forward_bytes"], row["backward_bytes"]
    kilobytes = [f"{amount / 1e3:.1f}" for amount in (forward, backward, forward + backward)]
    return f"{row['chips']} ({row['topology']})", row["way"], kinds(row["forward"]), kinds(row["backward"]), *kilobytes


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        options={"topologies": harness.some(TOPOLOGIES, TOPOLOGIES)},
        quick={"topologies": 1},
        on_device=False,
    )
