"""The median of several runs of `layer.py`, since one run on a shared machine is one sample of it.

Give it the JSON files that they left: ``python benchmarks/median.py results/layer-*.json``.
"""

import argparse
import json
import statistics
from pathlib import Path

import harness
import layer


def page(runs: list[layer.Run]) -> str:
    """Medians with the values of all runs, for what every run has measured."""
    groups = [group for group in runs[0].groups() if all(group in run.groups() for run in runs)]
    shared = [name for name in runs[0].names() if all(name in run.names() for run in runs)]
    names = [name for name in shared if name not in ("jbn", "copy")] + ["floor"]

    def cell(name: str, group: tuple[str, str]) -> str:
        values = [layer.overall(run.select(*group), name) for run in runs]
        medians = [spread.median for spread in values if spread is not None]
        if len(medians) < len(runs):
            return "–"
        return f"{statistics.median(medians):.2f} ({', '.join(f'{value:.2f}' for value in medians)})"

    rows = [[layer.title(name), *(cell(name, group) for group in groups)] for name in names]
    return "\n\n".join(
        [
            f"# One batch norm layer, the median of {len(runs)} runs",
            harness.machine_line(runs[0].about, runs[0].versions, runs[0].device),
            "A contestant's time over that of jbn, geometric mean over the shapes; in brackets each run.",
            harness.markdown_table(["", *(f"{dtype} {mode}" for dtype, mode in groups)], rows),
        ]
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what layer.py has left")
    print(page([layer.Run(**json.loads(file.read_text())) for file in options.parse_args().files]))


if __name__ == "__main__":
    main()
