"""Times inference of networks whose batch norms are folded against the same networks as they were trained.

An inference gives the most probable class of each example, and its probability: XLA:CPU runs a program of up to
eight kernels in the thread that calls it, which makes matrix products slower, and the bare folded MLP is one.

Ratios are the time of the network over that of the folded one, round by round: above 1, folding is faster.
"""

import dataclasses
import importlib.metadata
import random
from functools import partial
from typing import Any, NamedTuple

import harness


class Case(NamedTuple):
    """A network, and the shape of its input."""

    title: str
    network: str  # a name in jbn.networks
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    shape: tuple[int, ...]


NAMES = ("network", "folded")
MLP, DEEP, IMAGES = (784, 1024, 1024, 1024, 10), (64, *[128] * 12, 10), (64, 32, 32, 3)
CASES = (
    Case("MLP 784-1024-1024-1024-10, batch 256", "mlp", (MLP,), {}, (256, 784)),
    Case("the same, norm after the activation", "mlp", (MLP,), {"norm": "a"}, (256, 784)),
    Case("MLP of 12 layers of 128, batch 4096", "mlp", (DEEP,), {}, (4096, 64)),
    Case("ResNet-20, batch 64", "resnet", (10,), {}, IMAGES),
    Case("ResNet-20 of width 64, 128, 256, batch 16", "resnet", (10,), {"widths": (64, 128, 256)}, (16, 32, 32, 3)),
)
TINY = (
    Case("MLP 16-32-32-4, batch 8", "mlp", ((16, 32, 32, 4),), {}, (8, 16)),
    Case("ResNet of one block, batch 2", "resnet", (4,), {"widths": (4,), "blocks": 1}, (2, 8, 8, 3)),
)


class Inference:
    """One inference, and waiting for it."""

    def __init__(self, name: str, case: Case, dtype: str) -> None:
        import jax
        import jax.numpy as jnp

        import jbn
        from jbn import networks

        make = partial(getattr(networks, case.network), *case.arguments, **case.options, dtype=jnp.dtype(dtype))
        network = make()
        params, state = network.init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), case.shape, jnp.dtype(dtype))
        _, stats = jax.jit(partial(network.apply, train=True))(params, state, x)
        state = jbn.bn_update_stats(state, stats)  # so that the outputs are those of a network that was trained
        if name == "folded":
            network, params = networks.fold(make, params, state)
            state = None

        def infer(params, state, x):
            outputs, _ = network.apply(params, state, x, train=False)
            probabilities = jax.nn.softmax(outputs)
            return outputs, jnp.argmax(outputs, -1), jnp.max(probabilities, -1)

        self._infer = jax.jit(infer)
        self._arguments = params, state, x

    def __call__(self) -> Any:
        import jax

        return jax.block_until_ready(self._infer(*self._arguments)[0])

    def refresh(self) -> None:
        """Moves the arrays: where in memory weights happen to lie makes a matrix product up to a tenth slower."""
        import jax
        import jax.numpy as jnp

        self._arguments = jax.block_until_ready(jax.tree.map(partial(jnp.array, copy=True), self._arguments))


def inference(dtype: str, name: str, case: dict[str, Any]) -> Inference:
    return Inference(name, Case(**case), dtype)


def difference(case: Case, dtype: str) -> float:
    """The largest, relative to the largest output."""
    import numpy as np

    network, folded = (np.asarray(Inference(name, case, dtype)(), np.float64) for name in NAMES)
    return float(np.max(np.abs(folded - network)) / np.max(np.abs(network)))


def measure(options: Any) -> harness.Run:
    import jax

    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jbn")}
    settings = {"rounds": options.rounds, "seed": options.seed, "quick": options.quick}
    run = harness.Run(harness.machine(), versions, f"{device.platform}: {device.device_kind}", settings)
    order = random.Random(options.seed)
    for dtype in options.dtypes:
        for case in TINY if options.quick else CASES:
            seconds, _ = harness.interleave(
                {"here": harness.Here(partial(inference, dtype))},
                dict.fromkeys(NAMES, "here"),
                case._asdict(),
                rounds=options.rounds,
                turn_seconds=options.turn,
                order=order,
            )
            seconds = {name: [float(f"{t:.5g}") for t in seconds[name]] for name in NAMES}
            row = {"case": case._asdict(), "dtype": dtype, "seconds": seconds}
            run.rows.append({**row, "difference": float(f"{difference(case, dtype):.2g}")})
            print(*line(run.rows[-1]), sep="  ", flush=True)
    return run


def speedup(row: dict[str, Any]) -> harness.Spread:
    return harness.spread(harness.ratios(row["seconds"]["network"], row["seconds"]["folded"]))


def line(row: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * harness.spread(row['seconds'][name]).median:.3f}" for name in NAMES]
    return [row["case"]["title"], row["dtype"], *times, speedup(row).text(), f"{row['difference']:.1e}"]


def page(run: harness.Run) -> str:
    header = ("network", "dtype", "ms", "ms, folded", "times faster (quartiles)", "difference of the outputs")
    parts = [
        "# Inference with batch norms folded",
        harness.machine_line(run.about, run.versions, run.device),
        harness.markdown_table(header, map(line, run.rows)),
    ]
    if run.settings["quick"]:
        parts.append("A smoke run: its figures mean nothing.")
    return "\n\n".join(parts) + "\n"


def picture(run: harness.Run) -> Any:
    spreads = [speedup(row) for row in run.rows]
    figure, axes = harness.figure(figsize=(8, 1 + 0.45 * len(spreads)))
    places = range(len(spreads))
    medians = [s.median for s in spreads]
    bars = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.errorbar(medians, places, xerr=bars, fmt="o", capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{row['case']['title']}, {row['dtype']}" for row in run.rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of the network / time of the folded one (right of 1: folding is faster)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def arguments() -> Any:
    options = harness.parser(__doc__, rounds=31, turn=0.05)
    dtypes = harness.comma_separated(("float32", "bfloat16", "float16"))
    options.add_argument("--dtypes", type=dtypes, default=["float32", "bfloat16"])
    options = options.parse_args()
    if options.quick:
        options.dtypes, options.rounds, options.turn = options.dtypes[:1], 3, 0.005
    return options


def main() -> None:
    options = arguments()
    run = measure(options)
    print("\n" + page(run))
    stem = harness.stem("fold", run.device, run.about["date"], quick=run.settings["quick"])
    print("written:", *harness.write(options.out, stem, dataclasses.asdict(run), page(run), picture(run)))


if __name__ == "__main__":
    main()
