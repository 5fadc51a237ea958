"""What there is around a layer: importing, compiling and calling it eagerly, and what it keeps for backward.

Compilation is that of 20 batch norms with relu, their gradient and the update of their running statistics,
from Python to machine code. Its time is the processor time of all threads, which other programs disturb less than
the clock; every turn compiles anew. Eager calls are training and evaluation steps without jit. Kept are the arrays
of a `jax.vjp`, in bytes over those of x.
"""

import dataclasses
import importlib.metadata
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
from contestants import CONTESTANTS, Case, installed

LAYERS = 20
SHAPE = (32, 28, 28, 64)  # of the data that compilation is for
EAGER = (32, 64)  # small, so that the call is all that costs
NAMES = ("jbn", "linen", "plain")
LIMIT_MS = 50  # for the import

_IMPORT = """
import time, {first}
start = time.perf_counter()
import {second}
print(time.perf_counter() - start)
"""


def importing(first: str, second: str) -> float:
    """Seconds that the import of ``second`` takes, in a process that has imported ``first``."""
    code = _IMPORT.format(first=first, second=second)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def imports(rounds: int, order: random.Random) -> dict[str, list[float]]:
    """Milliseconds, after jax; the first round fills the disk's cache."""
    pairs = {"jax": ("time", "jax"), "jbn": ("jax", "jbn"), "linen": ("jax", "flax.linen")}
    names = [name for name in pairs if name == "jax" or installed(name)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            taken = importing(*pairs[name])
            if turn:
                times[name].append(1e3 * taken)
    return times


def stack(name: str, dtype: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Gradient of 20 layers with relu: ``f(params, states, x)``, and its arguments."""
    import jax
    import jax.numpy as jnp

    layer = CONTESTANTS[name].build(Case(SHAPE, -1, dtype, "forward+backward", 1), 0.9)

    def loss(params, states, x):
        news = []
        for own, state in zip(params, states, strict=True):
            x, new = layer.apply(own, state, x)
            x = jax.nn.relu(x)
            news.append(new)
        return jnp.mean(jnp.square(x.astype(jnp.float32))), news

    gradient = jax.grad(loss, argnums=(0, 2), has_aux=True)
    return gradient, ([layer.params] * LAYERS, [layer.state] * LAYERS, jnp.ones(SHAPE, dtype))


def compiling(name: str, dtype: str) -> dict[str, float]:
    """Processor seconds of each stage."""
    import jax

    jax.clear_caches()
    gradient, arguments = stack(name, dtype)
    times = [time.process_time()]
    traced = jax.jit(gradient).trace(*arguments)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    stages = dict(zip(("trace", "lower", "compile"), (b - a for a, b in itertools.pairwise(times)), strict=True))
    return stages | {"all": times[-1] - times[0]}


def compilations(dtype: str, names: list[str], rounds: int, order: random.Random) -> dict[str, dict[str, list[float]]]:
    """Stage → contestant → seconds in each round."""
    names, seconds = list(names), {}
    for turn in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            for stage, taken in compiling(name, dtype).items():
                if turn:  # the first loads what is compiled with
                    seconds.setdefault(stage, {}).setdefault(name, []).append(taken)
    return seconds


def kept(name: str, dtype: str) -> float:
    """Bytes of all that one training-mode layer keeps for backward, over those of x."""
    import jax

    layer = CONTESTANTS[name].build(Case(SHAPE, -1, dtype, "forward+backward", 1), 0.9)
    x = jax.random.normal(jax.random.key(0), SHAPE, dtype)
    _, pullback, _ = jax.vjp(lambda p, x: layer.apply(p, layer.state, x), layer.params, x, has_aux=True)
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}
    return sum(leaf.nbytes for leaf in arrays.values()) / x.nbytes


def eager(name: str, case: dict[str, Any]) -> Callable[[], Any]:
    """A step without jit, and waiting for it."""
    import jax

    case = Case(**case)
    layer = CONTESTANTS[name].build(case, 0.9)
    x = jax.random.normal(jax.random.key(0), case.shape)

    def forward():
        return jax.block_until_ready(layer.apply(layer.params, layer.state, x))

    def forward_and_backward():
        y, pullback, state = jax.vjp(lambda p, x: layer.apply(p, layer.state, x), layer.params, x, has_aux=True)
        return jax.block_until_ready((pullback(y), state))

    return forward_and_backward if case.mode == "forward+backward" else forward


@dataclasses.dataclass
class Run(harness.Run):
    """All that was measured."""

    imports: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # ms
    compilation: dict[str, Any] = dataclasses.field(default_factory=dict)  # dtype → stage → name → s of processor
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)  # dtype → name → bytes over those of x
    eager: dict[str, Any] = dataclasses.field(default_factory=dict)  # mode → name → s


def page(run: Run) -> str:
    parts = [
        "# Around the layer",
        harness.machine_line(run.about, run.versions, run.device),
        f"Medians (and quartiles) of {run.settings['rounds']} rounds in random order. Times over those of jbn are "
        "taken round by round: above 1, the contestant is slower.",
        *(f"Skipped: {CONTESTANTS[name].title}, {why}." for name, why in run.skipped.items()),
        "## Import",
        f"In a fresh process, after jax; the goal is less than {LIMIT_MS} ms.",
        harness.markdown_table(
            ["", "ms"], [[f"import {name}", harness.spread(ms).text(1)] for name, ms in run.imports.items()]
        ),
        f"## Compilation of {LAYERS} layers with relu and their gradient",
        "Processor seconds of all threads: tracing and lowering in Python, then XLA. The goal is no more than linen's.",
    ]
    for dtype, stages in run.compilation.items():
        rows = [
            [
                _title(name),
                *(f"{harness.spread(stages[stage][name]).median:.2f}" for stage in stages),
                _ratio(stages["all"], name),
            ]
            for name in stages["all"]
        ]
        parts += [f"### {dtype}", harness.markdown_table(["", *stages, "time / jbn"], rows)]
    names = next(iter(run.kept.values()))
    parts += [
        "## Kept for backward",
        f"Bytes over those of x, {'×'.join(map(str, SHAPE))}.",
        harness.markdown_table(
            ["", *run.kept],
            [[_title(name), *(f"{of[name]:.3f}" for of in run.kept.values())] for name in names],
        ),
    ]
    parts += ["## Eager calls", f"x is {'×'.join(map(str, EAGER))}. The goal is no more than linen's."]
    parts.append(
        harness.markdown_table(
            ["", *(f"{mode}{unit}" for mode in run.eager for unit in (", µs", ", time / jbn"))],
            [
                [
                    _title(name),
                    *(
                        cell
                        for times in run.eager.values()
                        for cell in (f"{1e6 * harness.spread(times[name]).median:.0f}", _ratio(times, name))
                    ),
                ]
                for name in next(iter(run.eager.values()))
            ],
        )
    )
    return "\n\n".join(parts)


def _title(name):
    return CONTESTANTS[name].title


def _ratio(times, name):
    return harness.spread(harness.ratios(times[name], times["jbn"])).text()


def measure(options: Any) -> Run:
    wanted = ["jbn", *(name for name in options.contestants if name != "jbn")]
    skipped = {name: f"{CONTESTANTS[name].package} is not installed" for name in wanted if not installed(name)}
    names = [name for name in wanted if name not in skipped]
    about, order = harness.machine(), random.Random(options.seed)
    # Before jax starts threads in this process.
    found = imports(options.rounds, order)
    _tell("import", {name: harness.spread(ms).text(1) for name, ms in found.items()})
    import jax

    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "jbn")}
    if "flax" in {CONTESTANTS[name].package for name in names}:
        versions["flax"] = importlib.metadata.version("flax")
    device = jax.devices()[0]
    settings = {
        "rounds": options.rounds,
        "seed": options.seed,
        "quick": options.quick,
        "layers": LAYERS,
        "shape": SHAPE,
    }
    run = Run(about, versions, f"{device.platform}: {device.device_kind}", settings, skipped, imports=found)
    for dtype in options.dtypes:
        run.compilation[dtype] = compilations(dtype, names, options.rounds, order)
        total = run.compilation[dtype]["all"]
        _tell(f"compile {dtype}", {name: _ratio(total, name) for name in total})
        run.kept[dtype] = {name: float(f"{kept(name, dtype):.4g}") for name in names}
        _tell(f"kept {dtype}", run.kept[dtype])
    engines = {"here": harness.Here(eager)}
    for mode in ("forward", "forward+backward", "evaluation"):
        case = Case(EAGER, -1, "float32", mode, 1)._asdict()
        here = dict.fromkeys(names, "here")
        seconds, errors = harness.interleave(
            engines, here, case, rounds=options.rounds, turn_seconds=options.turn, order=order
        )
        for name, error in errors.items():
            print(f"{name}, eager {mode}: {error}", file=sys.stderr)
        run.eager[mode] = {name: seconds[name] for name in names if name in seconds}
        _tell(f"eager {mode}", {name: _ratio(run.eager[mode], name) for name in run.eager[mode]})
    return run


def _tell(what, values):
    print(f"{what}: " + "  ".join(f"{name} {value}" for name, value in values.items()), flush=True)


def arguments() -> Any:
    options = harness.parser(__doc__, rounds=9, turn=0.05)
    listed = harness.comma_separated
    jax_only = [name for name in CONTESTANTS if CONTESTANTS[name].engine == "jax"]
    options.add_argument("--contestants", type=listed(jax_only), default=list(NAMES), help=", ".join(jax_only))
    options.add_argument("--dtypes", type=listed(("float32", "bfloat16", "float16")), default=["float32", "bfloat16"])
    options = options.parse_args()
    if options.quick:
        options.dtypes, options.rounds = options.dtypes[:1], 2
    return options


def main() -> None:
    options = arguments()
    run = measure(options)
    print("\n" + page(run))
    stem = harness.stem("costs", run.device, run.about["date"], quick=run.settings["quick"])
    print("\nwritten:", *harness.write(options.out, stem, dataclasses.asdict(run), page(run)), flush=True)


if __name__ == "__main__":
    main()
