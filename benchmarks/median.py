"""The median of several runs of `layer.py`, since one run on a shared machine is one sample of it.

Give it the JSON files that they left: ``python benchmarks/median.py results/layer-*.json``.
"""

import argparse
import json
import statistics
from pathlib import Path

import harness
import layer


def page(runs: list[harness.Run]) -> str:
    """Medians with the values of all runs, for what every run has measured."""
    found, (names, *others) = [run.by("dtype", "mode") for run in runs], map(layer.names, runs)
    shared = [group for group in found[0] if all(group in of for of in found)]

    def cell(name: str, group: tuple[str, str]) -> str:
        medians = [spread.median for of in found if (spread := layer.overall(of[group], name)) is not None]
        if len(medians) < len(runs):
            return "–"
        return f"{statistics.median(medians):.2f} ({', '.join(f'{value:.2f}' for value in medians)})"

    rows = [
        [layer.title(name), *(cell(name, group) for group in shared)]
        for name in names
        if all(name in other for other in others)
    ]
    return "\n\n".join(
        [
            *runs[0].heading(f"One batch norm layer, the median of {len(runs)} runs")[:2],
            "A contestant's time over that of jbn, geometric mean over the shapes; in brackets each run.",
            harness.table(["", *map(" ".join, shared)], rows),
        ]
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what layer.py has left")
    print(page([harness.Run(**json.loads(file.read_text())) for file in options.parse_args().files]))
