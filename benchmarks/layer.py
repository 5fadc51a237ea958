"""Times one batch norm layer: every contestant on eight shapes, forward, forward+backward and evaluation.

Ratios are a contestant's time over that of jbn, round by round: above 1, the contestant is slower.
"""

import itertools
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import harness
import jax

from jbn.cli.bench.contestants import CONTESTANTS, PASSES, Case
from jbn.cli.bench.engine import Spread, ratios, spread
from jbn.cli.bench.in_jax import jax_turn
from jbn.cli.bench.torch_process import torch_process

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
USUAL = ("jbn", "jbn_far", "linen", "linen_two_pass", "nnx", "haiku", "equinox", "keras", "torch", "torch_tuned")
Rows = list[dict[str, Any]]


def relative(row: dict[str, Any], name: str) -> list[float] | None:
    """Time over that of jbn for each round; for "floor", jbn's time over that of bare copies."""
    seconds = row["seconds"]
    if name == "floor":
        return ratios(seconds["jbn"], [t * PASSES[row["mode"]] / 2 for t in seconds["copy"]])
    return ratios(seconds[name], seconds["jbn"]) if name in seconds else None


def names(run: harness.Run) -> list[str]:
    """What is compared with jbn, and the floor."""
    found = dict.fromkeys(name for row in run.rows for name in row["seconds"])
    return [name for name in found if name not in ("jbn", "copy")] + ["floor"]


def overall(rows: Rows, name: str) -> Spread | None:
    """Geometric mean over the shapes, with the spread of its rounds; None unless it ran on all of them."""
    columns = [values for row in rows if (values := relative(row, name))]
    return spread(map(statistics.geometric_mean, zip(*columns, strict=True))) if len(columns) == len(rows) else None


def title(name: str) -> str:
    return "jbn / copy floor" if name == "floor" else CONTESTANTS[name].title


def page(run: harness.Run) -> str:
    compared, found = names(run), run.by("dtype", "mode")
    means = [[title(name), *(harness.cell(overall(rows, name)) for rows in found.values())] for name in compared]
    parts = [
        *run.heading("One batch norm layer"),
        "## Time over that of jbn, geometric mean over the shapes",
        harness.table(["", *map(" ".join, found)], means),
    ]
    header = ["shape", "jbn, ms a call", *map(title, compared)]
    for group, rows in found.items():
        milliseconds = [harness.cell(1e3 * spread(row["seconds"]["jbn"]).median, 3) for row in rows]
        ratios_of = [[harness.cell(overall([row], name)) for name in compared] for row in rows]
        lines = [[row["shape"], ms, *own] for row, ms, own in zip(rows, milliseconds, ratios_of, strict=True)]
        parts += ["## Time over that of jbn, " + ", ".join(group), harness.table(header, lines)]
    return "\n\n".join(parts)


def picture(run: harness.Run) -> Any:
    """A dot for each shape and a bar for their geometric mean, a panel for each dtype and mode."""
    from matplotlib.ticker import LogLocator, NullLocator

    compared, found = names(run), run.by("dtype", "mode")
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    size = (5 * columns, 1 + 0.32 * len(compared) * lines)
    figure, axes = harness.figure(*size, nrows=lines, ncols=columns, squeeze=False, sharey=True)
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    for panel, (group, rows) in zip(axes.flat, found.items(), strict=False):
        for line, name in enumerate(compared):
            values = [spread(each).median for row in rows if (each := relative(row, name))]
            if values:
                panel.plot(values, [line] * len(values), "o", color="0.6", markersize=4)
                panel.plot(
                    statistics.geometric_mean(values), line, "|", color="C3" if name == "floor" else "C0", ms=16, mew=3
                )
        panel.axvline(1, color="0.3", linewidth=1)
        panel.set(xscale="log", title=", ".join(group), yticks=range(len(compared)), ylim=(len(compared) - 0.5, -0.5))
        panel.set_yticklabels(map(title, compared))
        panel.xaxis.set(major_locator=LogLocator(base=2), minor_locator=NullLocator())
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(axis="x", alpha=0.3)
    figure.supxlabel("time / time of jbn (right of 1: slower than jbn); last row: jbn / copy floor")
    return figure


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    able = run.able(("jbn", *options.contestants, "copy"))
    with ExitStack() as stack:
        platform = jax.default_backend()
        # Torch with another allocator is another process.
        torch = {
            tuned: stack.enter_context(torch_process(platform, tuned=tuned))
            for tuned in {name == "torch_tuned" for name in able if CONTESTANTS[name].package == "torch"}
        }

        def turn(name: str, case: Case) -> Any:
            in_torch = CONTESTANTS[name].package == "torch"
            return torch[name == "torch_tuned"].turn(name, case) if in_torch else jax_turn(name, case)

        for dtype, mode, index in itertools.product(options.dtypes, options.modes, options.shapes):
            case = Case(*SHAPES[int(index)], dtype, mode, options.steps)
            # In evaluation the data does not matter.
            taking = [name for name in able if mode != "evaluation" or name != "jbn_far"]
            timings = harness.timings(options, {name: partial(turn, name, case) for name in taking}, options.steps)
            jax.clear_caches()
            yield {"dtype": dtype, "mode": mode, "shape": case.label, **timings}


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        picture,
        rounds=11,
        turn=0.02,
        options={
            "contestants": harness.some([name for name in CONTESTANTS if name != "copy"], USUAL),
            "dtypes": harness.some(harness.DTYPES, harness.DTYPES[:2]),
            "modes": harness.some(PASSES, PASSES),
            "shapes": harness.some(range(len(SHAPES)), range(len(SHAPES))),
            "steps": {"type": int, "default": 10, "help": "calls in a chain"},
        },
        quick={"dtypes": 1, "shapes": 1, "steps": 3, "rounds": 3},
    )
