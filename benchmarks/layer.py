"""Times one batch norm layer: every contestant on eight shapes, forward, forward+backward and evaluation.

Ratios are a contestant's time over that of jbn, round by round: above 1, the contestant is slower.
"""

import dataclasses
import random
import sys
from typing import Any

import harness
from contestants import CONTESTANTS, FAR, MODES, Case, installed

# The shapes of a ResNet and of wide and narrow dense layers, with the feature axis.
SHAPES = (
    ((256, 1024), -1),
    ((8192, 512), -1),
    ((100_000, 32), -1),
    ((32, 56, 56, 64), -1),
    ((32, 28, 28, 128), -1),
    ((32, 14, 14, 256), -1),
    ((8, 112, 112, 64), -1),
    ((32, 64, 56, 56), 1),
)
# Reads and writes of x that nothing can avoid; for forward+backward those of g, y and dx as well.
PASSES = {"forward": 3, "forward+backward": 8, "evaluation": 2}
RIVALS = ("nnx", "haiku", "equinox", "keras")
USUAL = (
    "jbn",
    "jbn_far",
    "linen",
    "linen_two_pass",
    "nnx",
    "haiku",
    "equinox",
    "keras",
    "torch",
    "torch_tuned",
)


class Run(harness.Run):
    """A run whose rows are of one shape, dtype and mode each."""

    def select(self, dtype: str, mode: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if (row["dtype"], row["mode"]) == (dtype, mode)]

    def groups(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((row["dtype"], row["mode"]) for row in self.rows))

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row["seconds"]))


def relative(row: dict[str, Any], name: str) -> list[float] | None:
    """Time over that of jbn for each round; for "floor", jbn's time over that of bare copies."""
    seconds = row["seconds"]
    if name == "floor":
        copy = [t * PASSES[row["mode"]] / 2 for t in seconds["copy"]]
        return harness.ratios(seconds["jbn"], copy)
    return harness.ratios(seconds[name], seconds["jbn"]) if name in seconds else None


def overall(rows: list[dict[str, Any]], name: str) -> harness.Spread | None:
    """Geometric mean over the shapes, with the spread of its rounds; None unless it ran on all of them."""
    columns = [relative(row, name) for row in rows]
    return None if not columns or None in columns else harness.spread(harness.geomeans(columns))


def title(name: str) -> str:
    return "jbn / copy floor" if name == "floor" else CONTESTANTS[name].title


def page(run: Run) -> str:
    names = [name for name in run.names() if name not in ("jbn", "copy")]
    groups = run.groups()
    parts = [
        "# One batch norm layer",
        harness.machine_line(run.about, run.versions, run.device),
        f"{run.settings['steps']} dependent calls in one jit (one eager chain in torch), "
        f"{run.settings['rounds']} rounds in random order. Each figure is a contestant's time over that of "
        "jbn in the same round: the median (and quartiles) of the rounds. Above 1 the contestant is slower.",
        *(f"Skipped: {CONTESTANTS[name].title}, {why}." for name, why in run.skipped.items()),
        "## Geometric mean over the shapes",
        harness.markdown_table(
            ["", *(f"{dtype} {mode}" for dtype, mode in groups)],
            [
                [title(name), *(_cell(overall(run.select(*group), name)) for group in groups)]
                for name in [*names, "floor"]
            ]
            + [["best of " + ", ".join(RIVALS), *(_best(run, group) for group in groups)]],
        ),
        f"The floor counts {PASSES['forward']} passes over x for forward, {PASSES['forward+backward']} for "
        f"forward+backward and {PASSES['evaluation']} for evaluation, at the bandwidth of a copy of x. "
        f"Data with mean/std {FAR:.0e} makes jbn take its second pass over x at every call, on a CPU.",
    ]
    for group in groups:
        rows = [
            [
                Case(**row["case"]).label,
                f"{1e3 * harness.spread(row['seconds']['jbn']).median:.3f}",
                *(_cell(_spread(relative(row, name))) for name in [*names, "floor"]),
            ]
            for row in run.select(*group)
        ]
        parts += [
            "## {}, {}".format(*group),
            harness.markdown_table(["shape", "jbn, ms a call", *map(title, names), title("floor")], rows),
        ]
        parts += [
            f"{CONTESTANTS[name].title} could not run {Case(**row['case']).label}: {error}."
            for row in run.select(*group)
            for name, error in row["errors"].items()
        ]
    return "\n\n".join(parts)


def _spread(values):
    return None if values is None else harness.spread(values)


def _cell(spread):
    return "–" if spread is None else spread.text()


def _best(run, group):
    """The fastest rival, by its geometric mean over all shapes."""
    found = {name: overall(run.select(*group), name) for name in RIVALS}
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        return "–"
    name = min(found, key=lambda name: found[name].median)
    return f"{found[name].text()} {name}"


def picture(run: Run) -> Any:
    """A dot for each shape and a bar for their geometric mean, a panel for each dtype and mode."""
    from matplotlib.ticker import LogLocator

    groups = run.groups()
    names = [name for name in run.names() if name not in ("jbn", "copy")] + ["floor"]
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = harness.figure(
        nrows=lines,
        ncols=columns,
        figsize=(5 * columns, 1 + 0.32 * len(names) * lines),
        squeeze=False,
        sharey=True,
    )
    for panel in axes.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, group in zip(axes.flat, groups, strict=False):
        for line, name in enumerate(names):
            values = [harness.spread(r).median for row in run.select(*group) if (r := relative(row, name))]
            if values:
                panel.plot(values, [line] * len(values), "o", color="0.6", markersize=4)
                panel.plot(harness.geomean(values), line, "|", color="C3" if name == "floor" else "C0", ms=16, mew=3)
        panel.axvline(1, color="0.3", linewidth=1)
        panel.set(xscale="log", title="{}, {}".format(*group), yticks=range(len(names)))
        panel.set_yticklabels(map(title, names))
        panel.xaxis.set_major_locator(LogLocator(base=2))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.minorticks_off()
        panel.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("time / time of jbn (right of 1: slower than jbn); last row: jbn / copy floor")
    figure.tight_layout()
    return figure


def save(run: Run, out: Any) -> None:
    stem = harness.stem("layer", run.device, run.about["date"], quick=run.settings["quick"])
    paths = harness.write(out, stem, dataclasses.asdict(run), page(run), picture(run))
    print("\nwritten:", *paths, flush=True)


def measure(options: Any) -> Run:
    wanted = ["jbn", *(name for name in options.contestants if name != "jbn")]
    skipped = {name: f"{CONTESTANTS[name].package} is not installed" for name in wanted if not installed(name)}
    present = {name: CONTESTANTS[name].engine for name in wanted if name not in skipped}
    present["copy"] = "jax"
    about = harness.machine()
    engines = {name: harness.Engine(name) for name in dict.fromkeys(present.values())}
    described = {name: engine.ask("describe") for name, engine in engines.items()}
    versions = {package: v for answer in described.values() for package, v in answer["versions"].items()}
    settings = {
        "steps": options.steps,
        "rounds": options.rounds,
        "seed": options.seed,
        "quick": options.quick,
    }
    run = Run(about, versions, described["jax"]["device"], settings, skipped)
    order = random.Random(options.seed)
    for dtype in options.dtypes:
        for mode in options.modes:
            # In evaluation the data does not matter.
            names = {k: v for k, v in present.items() if mode != "evaluation" or k != "jbn_far"}
            for index in options.shapes:
                shape, axis = SHAPES[index]
                case = Case(shape, axis, dtype, mode, options.steps)._asdict()
                seconds, errors = harness.interleave(
                    engines, names, case, rounds=options.rounds, turn_seconds=options.turn, order=order
                )
                seconds = {name: [float(f"{t:.5g}") for t in seconds[name]] for name in names if name in seconds}
                run.rows.append({"dtype": dtype, "mode": mode, "case": case, "seconds": seconds, "errors": errors})
                _tell(run.rows[-1])
            if not options.quick:
                save(run, options.out)  # what is measured so far, should the rest be interrupted
    for engine in engines.values():
        engine.close()
    return run


def _tell(row):
    """One line while it runs."""
    medians = {name: harness.spread(values).median for name, values in row["seconds"].items()}
    shown = "  ".join(f"{name} {t / medians['jbn']:.2f}" for name, t in medians.items() if name != "jbn")
    print(
        f"{row['dtype']} {row['mode']} {row['case']['shape']}: jbn {1e3 * medians['jbn']:.3f} ms  {shown}",
        flush=True,
    )
    for name, error in row["errors"].items():
        print(f"  {name}: {error}", file=sys.stderr)


def arguments() -> Any:
    options = harness.parser(__doc__, rounds=11, turn=0.02)
    listed = harness.comma_separated
    options.add_argument("--contestants", type=listed(CONTESTANTS), default=list(USUAL), help=", ".join(CONTESTANTS))
    options.add_argument("--dtypes", type=listed(("float32", "bfloat16", "float16")), default=["float32", "bfloat16"])
    options.add_argument("--modes", type=listed(MODES), default=list(MODES), help=", ".join(MODES))
    options.add_argument(
        "--shapes",
        type=listed(map(str, range(len(SHAPES)))),
        default=list(range(len(SHAPES))),
        help="; ".join(f"{i}: {Case(s, a, '', '', 0).label}" for i, (s, a) in enumerate(SHAPES)),
    )
    options.add_argument("--steps", type=int, default=10, help="calls in a chain")
    options = options.parse_args()
    options.shapes = [int(index) for index in options.shapes]
    if options.quick:
        options.dtypes, options.shapes = options.dtypes[:1], options.shapes[:1]
        options.steps, options.rounds = 3, 3
    return options


def main() -> None:
    options = arguments()
    run = measure(options)
    print("\n" + page(run))
    save(run, options.out)


if __name__ == "__main__":
    main()
