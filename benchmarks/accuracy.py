"""Measures the error of every contestant against float64, over mean/std from 1 to 10⁶.

Each is given the same x, already rounded to its dtype, and is compared with the plain formula in NumPy
float64 on that x. The figure is that of the worst channel: of var |v−v₆₄|/v₆₄; of y, dx and dγ the norm of
the error over the norm of the true values (dγ: over that of one channel's value, |dγ₆₄|).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import ml_dtypes  # comes with JAX
import numpy as np

from jbn.cli.bench.contestants import CONTESTANTS, EPS, IN_JAX, Case

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
    case = Case(SHAPE, -1, dtype, "forward+backward")
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


def errors(got: Values, true: Values) -> dict[str, float | None]:
    """The worst channel's relative error of each quantity; None where something is not finite."""

    def worst(values, expected):
        axes = tuple(range(values.ndim - 1))
        with np.errstate(all="ignore"):
            error = np.sqrt(np.square(values - expected).sum(axes) / np.square(expected).sum(axes))
        return float(np.max(error)) if np.isfinite(error).all() else None

    return {name: worst(getattr(got, name), getattr(true, name)) for name in QUANTITIES}


def measure(options: Any, run: harness.Run) -> Iterator[dict[str, Any]]:
    names = run.able(options.contestants)
    for dtype in options.dtypes:
        for offset in (1.0, 1e4) if options.quick else [m * 10.0**d for d in range(7) for m in (1, 3)][:-1]:
            if offset > LARGEST[dtype]:
                continue
            x, g = data(dtype, offset)
            true = truth(x, g)
            for name in names:
                found = partial(of_torch if name == "torch" else of_jax, name, dtype, x, g)
                row = {"dtype": dtype, "offset": offset, "contestant": name}  # offset: mean/std
                yield harness.tried(row, lambda found=found, true=true: {"errors": errors(found(), true)})


def page(run: harness.Run) -> str:
    parts = [
        *run.heading("Error against float64"),
        f"x is {'×'.join(map(str, SHAPE))}, γ = 1, β = 0; the worst of {SHAPE[-1]} channels, relative. The "
        "plain formula in NumPy float64 on the same rounded x is the truth.",
    ]
    for dtype, rows in run.by("dtype").items():
        header = ["mean/std", *(f"{offset:g}" for offset in dict.fromkeys(row["offset"] for row in rows))]
        for quantity in QUANTITIES:
            cells: dict[str, list[str]] = {}
            for row in rows:
                cells.setdefault(CONTESTANTS[row["contestant"]].title, []).append(_cell(row, quantity))
            parts += [f"## {quantity}, {dtype}", harness.table(header, ([n, *line] for n, line in cells.items()))]
    return "\n\n".join(parts)


def _cell(row, quantity):
    if row["error"]:
        return "–"
    error = row["errors"][quantity]
    return "inf" if error is None else f"{error:.0e}"


def picture(run: harness.Run) -> Any:
    """Error over mean/std on log-log axes, a panel for each dtype and quantity."""
    dtypes, names = list(run.by("dtype")), list(run.by("contestant"))
    size = (4 * len(QUANTITIES), 3.6 * len(dtypes))
    figure, axes = harness.figure(*size, nrows=len(dtypes), ncols=len(QUANTITIES), squeeze=False)
    for (dtype, name), rows in run.by("dtype", "contestant").items():
        number = names.index(name)
        style = {"color": "k", "linewidth": 2.5, "zorder": 3} if name == "jbn" else {"color": f"C{number}"}
        style |= {"marker": "os^vDP*X"[number % 8], "markersize": 4, "label": CONTESTANTS[name].title}
        for panel, quantity in zip(axes[dtypes.index(dtype)], QUANTITIES, strict=True):
            measured = [row for row in rows if not row["error"] and row["errors"][quantity] is not None]
            values = [max(row["errors"][quantity], 1e-9) for row in measured]
            panel.loglog([row["offset"] for row in measured], values, **style)
            panel.axhline(ULP[dtype], color="0.6", linestyle=":")
            panel.set(title=f"{quantity}, {dtype}", xlabel="mean/std")
            panel.grid(True, alpha=0.3)
    axes[0, 0].set_ylabel("relative error, worst channel")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=9)
    return figure


if __name__ == "__main__":
    harness.main(
        __doc__,
        measure,
        page,
        picture,
        options={
            "contestants": harness.some([*IN_JAX, "torch"], USUAL),
            "dtypes": harness.some(LARGEST, LARGEST),
        },
        quick={"dtypes": 1},
    )
