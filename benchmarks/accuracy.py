"""Measures the error of every contestant against float64, over mean/std from 1 to 10⁶.

Each is given the same x, already rounded to its dtype, and is compared with the plain formula in NumPy
float64 on that x. The figure is that of the worst channel: of var |v−v₆₄|/v₆₄; of y, dx and dγ the norm of
the error over the norm of the true values (dγ: over that of one channel's value, |dγ₆₄|).
"""

import dataclasses
import datetime
import importlib.metadata
import sys
from typing import Any, NamedTuple

import harness
import numpy as np
from contestants import CONTESTANTS, EPS, Case, installed
from worker import PACKAGES

QUANTITIES = ("var", "y", "dx", "dgamma")
SHAPE = (64, 8, 8, 64)  # 4096 values a channel
USUAL = ("jbn", "linen", "linen_two_pass", "nnx", "haiku", "equinox", "keras", "plain", "torch")
ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-9}  # half a unit in the last place
# Beyond this, bfloat16 data is a handful of distinct values.
LARGEST = {"float32": 1e6, "bfloat16": 100.0}


class Values(NamedTuple):
    var: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray


def data(dtype: str, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """x and g in float64, exactly as they are in ``dtype``: means of both signs and scales over four decades.

    g holds a share of x̂, so that dγ, the sum of their product, is no difference of large numbers.
    """
    random = np.random.default_rng(0)
    scale = 10.0 ** random.uniform(-2, 2, SHAPE[-1])
    sign = random.choice((-1.0, 1.0), SHAPE[-1])
    normal = random.standard_normal(SHAPE)
    x = _rounded((normal + sign * offset) * scale, dtype)
    g = _rounded(random.standard_normal(SHAPE) + 0.5 * normal, dtype)
    return x, g


def _rounded(values, dtype):
    import ml_dtypes  # comes with JAX

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return values.astype(np.float32).astype(kind).astype(np.float64)


def truth(x: np.ndarray, g: np.ndarray) -> Values:
    """The plain formula and its gradients with γ = 1, β = 0, over all axes but the last."""
    axes = (0, 1, 2)
    centred = x - x.mean(axes)
    centred -= centred.mean(axes)  # what float64 left of the mean
    var = np.square(centred).mean(axes)
    r = 1 / np.sqrt(var + EPS)
    xhat = centred * r
    dgamma = (g * xhat).sum(axes)
    dx = r * (g - g.mean(axes) - xhat * (g * xhat).mean(axes))
    return Values(var, xhat, dx, dgamma)


def of_jax(name: str, dtype: str, x: np.ndarray, g: np.ndarray) -> Values:
    import jax
    import jax.numpy as jnp

    case = Case(SHAPE, -1, dtype, "forward+backward", 1)
    layer = CONTESTANTS[name].build(case, 0.0)

    @jax.jit
    def run(params, state, x, g):
        y, pullback, state = jax.vjp(lambda x, params: layer.apply(params, state, x), x, params, has_aux=True)
        dx, dparams = pullback(g)
        return layer.var(state).ravel(), y, dx, layer.params_of(dparams)[0].ravel()

    values = run(layer.params, layer.state, jnp.asarray(x, dtype), jnp.asarray(g, dtype))
    return Values(*(np.asarray(v.astype(jnp.float32), np.float64) for v in values))


def of_torch(name: str, dtype: str, x: np.ndarray, g: np.ndarray) -> Values:
    import torch

    def tensor(values):
        return torch.from_numpy(values).to(getattr(torch, dtype)).movedim(-1, 1)

    layer = torch.nn.BatchNorm2d(SHAPE[-1], eps=EPS, momentum=1.0)
    value = tensor(x).requires_grad_()
    y = layer(value)
    dx, dgamma = torch.autograd.grad(y, (value, layer.weight), tensor(g))
    count = x.size // SHAPE[-1]
    var = layer.running_var.double() * (count - 1) / count  # torch keeps the unbiased variance
    arrays = (var, y.detach().movedim(1, -1), dx.movedim(1, -1), dgamma)
    return Values(*(v.double().numpy() for v in arrays))


def errors(got: Values, true: Values) -> dict[str, float]:
    """The worst channel's relative error of each quantity; infinite where something is not finite."""

    def worst(values, expected):
        axes = tuple(range(values.ndim - 1))
        with np.errstate(all="ignore"):
            error = np.sqrt(np.square(values - expected).sum(axes) / np.square(expected).sum(axes))
        return float(np.max(np.where(np.isfinite(error), error, np.inf)))

    return {name: worst(getattr(got, name), getattr(true, name)) for name in QUANTITIES}


@dataclasses.dataclass
class Row:
    dtype: str
    offset: float  # mean/std
    contestant: str
    errors: dict[str, float]


def measure(names: list[str], dtypes: list[str], offsets: list[float]) -> tuple[list[Row], list[str]]:
    rows, notes = [], []
    for dtype in dtypes:
        for offset in offsets:
            if offset > LARGEST[dtype]:
                continue
            x, g = data(dtype, offset)
            true = truth(x, g)
            for name in names:
                try:
                    of = of_jax if CONTESTANTS[name].engine == "jax" else of_torch
                    rows.append(Row(dtype, offset, name, errors(of(name, dtype, x, g), true)))
                except Exception as error:
                    note = f"{CONTESTANTS[name].title}, {dtype}: {type(error).__name__}: {str(error)[:200]}"
                    if note not in notes:
                        notes.append(note)
                        print(note, file=sys.stderr)
            print(f"{dtype} mean/std {offset:g}", flush=True)
    return rows, notes


def page(rows: list[Row], line: str, notes: list[str]) -> str:
    parts = [
        "# Error against float64",
        line,
        f"x is {'×'.join(map(str, SHAPE))}, γ = 1, β = 0; the worst of {SHAPE[-1]} channels, relative. The "
        "plain formula in NumPy float64 on the same rounded x is the truth.",
        *notes,
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        for quantity in QUANTITIES:
            chosen = [row for row in rows if row.dtype == dtype]
            offsets = list(dict.fromkeys(row.offset for row in chosen))
            found = {(row.contestant, row.offset): row.errors[quantity] for row in chosen}
            names = list(dict.fromkeys(row.contestant for row in chosen))
            parts += [
                f"## {quantity}, {dtype}",
                harness.markdown_table(
                    ["mean/std", *(f"{o:g}" for o in offsets)],
                    [
                        [
                            CONTESTANTS[n].title,
                            *(f"{found[n, o]:.0e}" if (n, o) in found else "–" for o in offsets),
                        ]
                        for n in names
                    ],
                ),
            ]
    return "\n\n".join(parts)


def picture(rows: list[Row]) -> Any:
    """Error over mean/std on log-log axes, a panel for each dtype and quantity."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    names = list(dict.fromkeys(row.contestant for row in rows))
    figure, axes = harness.figure(
        nrows=len(dtypes),
        ncols=len(QUANTITIES),
        figsize=(4 * len(QUANTITIES), 3.6 * len(dtypes)),
        squeeze=False,
    )
    for line, dtype in enumerate(dtypes):
        for column, quantity in enumerate(QUANTITIES):
            panel = axes[line, column]
            for place, name in enumerate(names):
                chosen = [row for row in rows if (row.dtype, row.contestant) == (dtype, name)]
                panel.loglog(
                    [row.offset for row in chosen],
                    [max(row.errors[quantity], 1e-9) for row in chosen],
                    color="k" if name == "jbn" else f"C{place}",
                    linewidth=2.5 if name == "jbn" else 1.2,
                    marker="o" if name == "jbn" else "os^vDP*X"[place % 8],
                    markersize=4,
                    zorder=3 if name == "jbn" else 2,
                    label=CONTESTANTS[name].title,
                )
            panel.axhline(ULP[dtype], color="0.6", linestyle=":")
            panel.set(title=f"{quantity}, {dtype}", xlabel="mean/std")
            panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative error, worst channel")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(names), fontsize=9)
    return figure


def _finite(row):
    """JSON knows no infinity: null."""
    row["errors"] = {name: value if np.isfinite(value) else None for name, value in row["errors"].items()}
    return row


def main() -> None:
    options = harness.parser(__doc__)
    listed = harness.comma_separated
    options.add_argument("--contestants", type=listed(CONTESTANTS), default=list(USUAL), help=", ".join(CONTESTANTS))
    options.add_argument("--dtypes", type=listed(LARGEST), default=list(LARGEST))
    options = options.parse_args()
    decades = range(7)
    offsets = [1.0, 1e4] if options.quick else [m * 10.0**d for d in decades for m in (1, 3)][:-1]
    dtypes = options.dtypes[:1] if options.quick else options.dtypes
    names = [name for name in options.contestants if installed(name)]
    skipped = [
        f"Skipped: {CONTESTANTS[n].title}, {CONTESTANTS[n].package} is not installed."
        for n in options.contestants
        if n not in names
    ]
    about = harness.machine()
    rows, notes = measure(names, dtypes, offsets)
    versions = {}
    for package in (*PACKAGES["jax"], *PACKAGES["torch"]):
        if package in {d.metadata["Name"] for d in importlib.metadata.distributions()}:
            versions[package] = importlib.metadata.version(package)
    import jax

    device = jax.devices()[0]
    line = harness.machine_line({**about, "load_at_start": None}, versions, f"{device.platform}: {device.device_kind}")
    text = page(rows, line, skipped + notes)
    print("\n" + text)
    record = {
        "about": about,
        "versions": versions,
        "shape": SHAPE,
        "notes": skipped + notes,
        "rows": [_finite(dataclasses.asdict(row)) for row in rows],
    }
    stem = "accuracy-quick" if options.quick else f"accuracy-{datetime.date.today().isoformat()}"
    print("\nwritten:", *harness.write(options.out, stem, record, text, picture(rows)))


if __name__ == "__main__":
    main()
