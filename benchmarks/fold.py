"""Times inference of networks whose batch norms are folded against the same networks as they were trained.

An inference gives the most probable class of each example, and its probability: XLA:CPU runs a program of up to
eight kernels in the thread that calls it, which makes matrix products slower, and the bare folded MLP is one.

Ratios are the time of the network over that of the folded one, round by round: above 1, folding is faster.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from step import Case

import jbn
from jbn import networks
from jbn.cli.bench.engine import Spread, Turn, ratios, spread, timed

MLP, DEEP = (784, 1024, 1024, 1024, 10), (64, *[128] * 12, 10)
WIDE = (64, 128, 256)
CASES = (
    Case("MLP 784-1024-1024-1024-10, batch 256", partial(networks.mlp, MLP), (256, 784)),
    Case("the same, norm after the activation", partial(networks.mlp, MLP, norm="a"), (256, 784)),
    Case("MLP of 12 layers of 128, batch 4096", partial(networks.mlp, DEEP), (4096, 64)),
    Case("ResNet-20, batch 64", partial(networks.resnet, 10), (64, 32, 32, 3)),
    Case("ResNet-20 of width 64, 128, 256, batch 16", partial(networks.resnet, 10, widths=WIDE), (16, 32, 32, 3)),
)
TINY = (
    Case("MLP 16-32-32-4, batch 8", partial(networks.mlp, (16, 32, 32, 4)), (8, 16)),
    Case("ResNet of one block, batch 2", partial(networks.resnet, 4, widths=(4,), blocks=1), (2, 8, 8, 3)),
)


class Inference:
    """One inference, and waiting for it."""

    def __init__(self, case: Case, dtype: str, folded: bool) -> None:
        make = partial(case.network, dtype=jnp.dtype(dtype))
        network = make()
        params, state = network.init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), case.shape, jnp.dtype(dtype))
        _, stats = jax.jit(partial(network.apply, train=True))(params, state, x)
        state = jbn.bn_update_stats(state, stats)  # so that the outputs are those of a network that was trained
        if folded:
            network, params = networks.fold(make, params, state)
            state = None

        def infer(params, state, x):
            outputs, _ = network.apply(params, state, x, train=False)
            probabilities = jax.nn.softmax(outputs)
            return outputs, jnp.argmax(outputs, -1), jnp.max(probabilities, -1)

        self._infer = jax.jit(infer)
        self._arguments = params, state, x

    def __call__(self) -> Any:
        return jax.block_until_ready(self._infer(*self._arguments)[0])

    def turn(self) -> Turn:
        """Moves the arrays first: where in memory weights happen to lie makes a matrix product up to a tenth slower."""

        def turn(repeats):
            self._arguments = jax.block_until_ready(jax.tree.map(partial(jnp.array, copy=True), self._arguments))
            return timed(self)(repeats)

        return turn


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    for dtype in options.dtypes:
        for case in TINY if options.quick else CASES:
            both = {"network": Inference(case, dtype, False), "folded": Inference(case, dtype, True)}
            timings = harness.timings(options, {name: inference.turn for name, inference in both.items()})
            network, folded = (np.asarray(inference(), np.float64) for inference in both.values())
            difference = float(np.max(np.abs(folded - network)) / np.max(np.abs(network)))
            jax.clear_caches()
            yield {
                "title": case.title,
                "shape": case.shape,
                "dtype": dtype,
                **timings,
                "difference": float(f"{difference:.2g}"),  # the largest, relative to the largest output
            }


def speedup(row: dict[str, Any]) -> Spread:
    return spread(ratios(row["seconds"]["network"], row["seconds"]["folded"]))


def line(row: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * spread(seconds).median:.3f}" for seconds in row["seconds"].values()]
    return [row["title"], row["dtype"], *times, speedup(row).text(), f"{row['difference']:.1e}"]


def page(run: harness.Run) -> str:
    header = ("network", "dtype", "ms", "ms, folded", "times faster (quartiles)", "difference of the outputs")
    return "\n\n".join([*run.heading("Inference with batch norms folded"), harness.table(header, map(line, run.rows))])


def picture(run: harness.Run) -> Any:
    spreads = [speedup(row) for row in run.rows]
    figure, axes = harness.figure(8, 1 + 0.45 * len(spreads))
    low, median, high = np.transpose(spreads)
    axes.errorbar(median, range(len(spreads)), xerr=(median - low, high - median), fmt="o", capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(spreads)), [f"{row['title']}, {row['dtype']}" for row in run.rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of the network / time of the folded one (right of 1: folding is faster)")
    axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        picture,
        rounds=31,
        turn=0.05,
        options={"dtypes": harness.some(harness.DTYPES, harness.DTYPES[:2])},
        quick={"dtypes": 1, "rounds": 3, "turn": 0.005},
    )
