"""Compiles one batch norm ahead of time for a TPU (v5e) and a GPU (H100), neither of which has to be there.

A memory-bound layer costs what it moves: the table counts passes over x, the bytes that all kernels
read and write over the bytes of x. These are facts of the compiler and come out the same on every run;
they are not timings.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so two may compile at once
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import harness
import jax
from contestants import CONTESTANTS, Case, installed
from hlo import Program
from jax.experimental import topologies

TARGETS = {
    "tpu": ("TPU v5e", "libtpu", {"platform": "tpu", "topology_name": "v5e:2x2"}),
    "gpu": (
        "GPU H100",
        "jax-cuda12-pjrt",
        {"platform": "cuda", "topology_name": "h100", "topology": "1x1x1"},
    ),
}
# In the second, g is an input beside x, and the compiler may make y in the kernel that makes dx. In a network
# g comes after y: the third has a barrier between forward and backward, and updates the running statistics.
PROGRAMS = ("forward", "forward+backward", "training step", "conv+BN+relu+conv")
USUAL = ("jbn", "linen", "linen_two_pass", "plain", "jbn_masked", "linen_masked")


ABOUT = """\
Forward+backward gives y, dx, dγ and dβ for a cotangent g that is there from the start, so that y may be made
together with dx. The training step is what a network sees: g comes after y, and the running statistics are
updated. The block of two 3×3 convolutions gives the gradients of x and of all weights.

Passes: the bytes that all kernels read and write, over the bytes of x. Of a conditional the cheapest branch
counts, the one that ordinary data takes (a second pass over x, for data whose mean is far from 0, is in the
other). In brackets the compiler's own count, where it gives one: it counts the dearest branch, and whole
tiles where a slice is read. Temporaries: memory beyond arguments and results, over the bytes of x."""


@dataclasses.dataclass
class Row:
    target: str
    dtype: str
    program: str
    contestant: str
    passes: float | None = None  # bytes of all kernels' operands and results over the bytes of x
    reported: float | None = None  # the compiler's own "bytes accessed" over the bytes of x (TPU)
    kernels: int | None = None
    temporaries: float | None = None  # bytes over the bytes of x
    error: str = ""


def topology(target: str) -> Any:
    arguments = dict(TARGETS[target][2])
    if target == "gpu":
        arguments["target_config"] = (harness.HERE / "h100_sxm.txtpb").read_text()
    return topologies.get_topology_desc(**arguments)


def program(name: str, layer: Any, case: Case) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """A function of (params, state, x, g, *kernels) and the shapes of the kernels."""
    if name == "forward":
        return lambda params, state, x, g: layer.apply(params, state, x)[0], ()

    def forward_and_backward(params, state, x, g):
        y, pullback = jax.vjp(lambda params, x: layer.apply(params, state, x)[0], params, x)
        return y, *pullback(g)

    if name == "forward+backward":
        return forward_and_backward, ()

    def training_step(params, state, x, g):
        y, pullback, state = jax.vjp(lambda params, x: layer.apply(params, state, x), params, x, has_aux=True)
        y, g = jax.lax.optimization_barrier((y, g))
        return y, *pullback(g), state

    if name == "training step":
        return training_step, ()

    def block(params, state, x, g, first, second):
        """Gradients of a loss whose derivative with respect to the output is g."""

        def output(params, x, first, second):
            y, _ = layer.apply(params, state, _convolve(x, first))
            return _convolve(jax.nn.relu(y), second)

        return jax.vjp(output, params, x, first, second)[1](g)

    kernel = (3, 3, case.channels, case.channels)
    return block, (kernel, kernel)


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def measure(row: Row, case: Case, sharding: Any, dump: Path | None) -> None:
    layer = CONTESTANTS[row.contestant].build(case, 0.9)
    function, kernels = program(row.program, layer, case)

    def described(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params, state = jax.tree.map(lambda v: described(v.shape, v.dtype), (layer.params, layer.state))
    x = described(case.shape, case.dtype)
    weights = [described(shape, case.dtype) for shape in kernels]
    compiled = jax.jit(function).lower(params, state, x, x, *weights).compile()
    size = math.prod(case.shape) * jax.numpy.dtype(case.dtype).itemsize
    text = compiled.as_text()
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{row.target}-{row.dtype}-{row.program}-{row.contestant}.txt").write_text(text)
    cost = Program(text).cost()
    reported = (compiled.cost_analysis() or {}).get("bytes accessed")
    row.passes, row.kernels = round(cost.bytes / size, 3), cost.kernels
    row.reported = None if reported is None else round(reported / size, 3)
    row.temporaries = round(compiled.memory_analysis().temp_size_in_bytes / size, 3)


def page(rows: list[Row], line: str, shape: tuple[int, ...], notes: list[str]) -> str:
    parts = [
        "# Ahead of time: what the compiler makes of one batch norm",
        line,
        f"x is {'×'.join(map(str, shape))}, channels last. {ABOUT}",
        *notes,
    ]
    for target in dict.fromkeys(row.target for row in rows):
        for name in dict.fromkeys(row.program for row in rows):
            chosen = [row for row in rows if (row.target, row.program) == (target, name)]
            dtypes = list(dict.fromkeys(row.dtype for row in chosen))
            names = list(dict.fromkeys(row.contestant for row in chosen))
            cells = {(row.contestant, row.dtype): row for row in chosen}
            parts += [
                f"## {TARGETS[target][0]}: {name}",
                harness.markdown_table(
                    ["", *(f"{d} {what}" for d in dtypes for what in ("passes", "kernels", "temporaries"))],
                    [[CONTESTANTS[n].title, *(c for d in dtypes for c in _cells(cells[n, d]))] for n in names],
                ),
            ]
            parts += [f"{CONTESTANTS[row.contestant].title}, {row.dtype}: {row.error}" for row in chosen if row.error]
    return "\n\n".join(parts)


def _cells(row):
    if row.passes is None:
        return "–", "–", "–"
    reported = "" if row.reported is None else f" ({row.reported:.2f})"
    return f"{row.passes:.2f}{reported}", str(row.kernels), f"{row.temporaries:.2f}"


def picture(rows: list[Row]) -> Any:
    """Passes over x, a panel for each target and program."""
    targets = list(dict.fromkeys(row.target for row in rows))
    names = list(dict.fromkeys(row.program for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    contestants = list(dict.fromkeys(row.contestant for row in rows))
    figure, axes = harness.figure(
        nrows=len(targets), ncols=len(names), figsize=(4.5 * len(names), 2.8 * len(targets)), squeeze=False
    )
    for line, target in enumerate(targets):
        for column, name in enumerate(names):
            panel = axes[line, column]
            for place, dtype in enumerate(dtypes):
                chosen = {
                    row.contestant: row.passes or 0
                    for row in rows
                    if (row.target, row.program, row.dtype) == (target, name, dtype)
                }
                height = 0.8 / len(dtypes)
                bars = panel.barh(
                    [i + (place - (len(dtypes) - 1) / 2) * height for i in range(len(contestants))],
                    [chosen.get(n, 0) for n in contestants],
                    height,
                    label=dtype,
                )
                panel.bar_label(bars, fmt="%.1f", fontsize=7)
            panel.set(title=f"{TARGETS[target][0]}: {name}", yticks=range(len(contestants)))
            panel.set_yticklabels([CONTESTANTS[n].title for n in contestants] if column == 0 else [])
            panel.invert_yaxis()
            panel.margins(x=0.13)  # for the figures at the ends of the bars
    figure.supxlabel("passes over x")
    figure.tight_layout()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower right", ncols=len(dtypes), fontsize=9)
    return figure


def arguments() -> Any:
    options = harness.parser(__doc__)
    listed = harness.comma_separated
    options.add_argument("--targets", type=listed(TARGETS), default=list(TARGETS))
    options.add_argument("--dtypes", type=listed(("float32", "bfloat16")), default=["float32", "bfloat16"])
    options.add_argument("--programs", type=listed(PROGRAMS), default=list(PROGRAMS))
    jax_only = [name for name, contestant in CONTESTANTS.items() if contestant.engine == "jax"]
    options.add_argument("--contestants", type=listed(jax_only), default=list(USUAL), help=", ".join(jax_only))
    options.add_argument("--shape", default="512,56,56,64", help="of x, channels last")
    options.add_argument("--dump", type=Path, metavar="DIR", help="write the optimized HLO there")
    options = options.parse_args()
    options.shape = tuple(int(n) for n in options.shape.split(","))
    if options.quick:
        options.dtypes, options.programs = options.dtypes[:1], options.programs[:3]
        options.contestants = options.contestants[:2]
    return options


def main() -> None:
    options = arguments()
    about = harness.machine()
    cpu = jax.devices("cpu")[0]
    notes, rows, packages = [], [], ["jax", "jaxlib", "jbn", "flax"]
    contestants = [name for name in options.contestants if installed(name)]
    notes += [
        f"Skipped: {CONTESTANTS[n].title}, {CONTESTANTS[n].package} is not installed."
        for n in options.contestants
        if n not in contestants
    ]
    for target in options.targets:
        try:
            devices = topology(target).devices
        except Exception as error:
            notes.append(f"Skipped: {TARGETS[target][0]}, {one_line(error)} ({TARGETS[target][1]} is needed).")
            continue
        packages.append(TARGETS[target][1])
        sharding = jax.sharding.SingleDeviceSharding(devices[0])
        for dtype in options.dtypes:
            for name in options.programs:
                for contestant in contestants:
                    rows.append(row := Row(target, dtype, name, contestant))
                    case = Case(options.shape, -1, dtype, "forward+backward", 1)
                    try:
                        with jax.default_device(cpu):
                            measure(row, case, sharding, options.dump)
                    except Exception as error:
                        row.error = one_line(error)
                    print(
                        *(f"{k}={v}" for k, v in dataclasses.asdict(row).items() if v not in (None, "")),
                        flush=True,
                    )
    if not rows:
        sys.exit("\n".join(notes))
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    line = harness.machine_line({**about, "load_at_start": None}, versions)
    text = page(rows, line, options.shape, notes)
    print("\n" + text)
    record = {
        "about": about,
        "versions": versions,
        "shape": options.shape,
        "notes": notes,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    stem = "aot-quick" if options.quick else f"aot-{about['date']}"
    print("\nwritten:", *harness.write(options.out, stem, record, text, picture(rows)))


def one_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


if __name__ == "__main__":
    main()
