"""Pictures of training runs and of the values in a layer."""

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "new_figure", "plot_activations", "plot_curves", "style"]

# Okabe and Ito 2008: apart for every kind of colour vision. A line style beside each, for grey prints.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_LINES = ("-", "--", "-.", ":")


def style(*, dpi: int = 120) -> dict[str, Any]:
    """Gives the settings of matplotlib under which pictures of your own look like those of `jbn.report`.

    Four colours that are apart for every kind of colour vision ("C0" to "C3"), each with a line style of its own for
    grey prints; a faint grid; legends without a frame; a map of colours whose lightness rises evenly.

    Args:
        dpi: resolution, in dots an inch.

    Returns:
        Names and values for ``matplotlib.rcParams``, a new dict at each call.

    Example:
        >>> import matplotlib
        >>> from jbn.report import style
        >>> with matplotlib.rc_context(style()):
        ...     matplotlib.rcParams["axes.grid"]
        True

    References:
        Okabe & Ito 2008, "Color Universal Design", for the colours.
    """
    return {
        "axes.prop_cycle": f"cycler(color={list(COLOURS)}, linestyle={list(_LINES)})",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "figure.constrained_layout.use": True,
        "figure.dpi": dpi,
        "savefig.dpi": dpi,
        "image.cmap": "viridis",
        "legend.frameon": False,
        "lines.linewidth": 2,
    }


def plot_curves(runs: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draws the loss of each step and the accuracy of each epoch, one colour a run.

    Args:
        runs: name → ``{"loss": (steps,), "accuracy": (epochs,)}``, the accuracy as a share in [0, 1].
            Losses that are not finite leave a gap.

    Returns:
        A matplotlib ``Figure``, bound to no window: ``figure.savefig("curves.png")``.

    Raises:
        ValueError: no runs.

    Example:
        >>> from jbn.report import plot_curves
        >>> figure = plot_curves({"with": {"loss": [2.0, 1.0, 0.5, 0.2], "accuracy": [0.6, 0.9]}})
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['step', 'epoch']
    """
    _some("runs", runs)
    figure = new_figure(10, 4)
    losses, accuracies = figure.subplots(1, 2)
    for i, (name, run) in enumerate(runs.items()):
        style = {"color": COLOURS[i % 4], "linestyle": _LINES[i % 4]}
        loss = np.asarray(run["loss"], np.float64)
        steps = np.arange(1, len(loss) + 1)
        losses.plot(steps, loss, color=COLOURS[i % 4], alpha=0.25, linewidth=0.8)
        window = max(1, min(10, len(loss)))
        means = np.convolve(loss, np.ones(window) / window, "valid")
        losses.plot(steps[window - 1 :], means, label=name, linewidth=2, **style)
        accuracy = np.asarray(run["accuracy"], np.float64)
        style["marker"] = "o" if len(accuracy) == 1 else ""  # a line through one point is not seen
        accuracies.plot(np.arange(1, len(accuracy) + 1), 100 * accuracy, label=name, linewidth=2, **style)
    losses.set(title="training loss (mini-batch; thick: mean of 10)", xlabel="step", ylabel="cross-entropy (nats)")
    losses.set_yscale("log")
    accuracies.locator_params("x", integer=True)
    accuracies.set(title="test accuracy", xlabel="epoch", ylabel="accuracy (%)")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def plot_activations(values: Mapping[str, Any], *, title: str | None = None) -> "Figure":
    """Draws how the values of a layer are distributed: over all units, and unit by unit.

    Args:
        values: name → (N, C), what C units hold for N examples: z of one layer before and after
            normalization, say. Each is one column of the picture; all columns have the same axes.
        title: above the picture.

    Returns:
        A matplotlib ``Figure``: above, a histogram over all units; below, the middle 90% and the
        median of each unit, in the order of their medians. Means and standard deviations are those of
        all values; the outermost 0.5% at either end are left out of the histogram.

    Raises:
        ValueError: no values, or an array not of rank 2 or empty. Values that are not finite are not drawn, but
            counted in the title.

    Example:
        >>> import numpy as np
        >>> from jbn.report import plot_activations
        >>> z = np.random.default_rng(0).normal(3.0, 2.0, size=(100, 8))
        >>> figure = plot_activations({"before": z, "after": (z - z.mean(0)) / z.std(0)})
        >>> len(figure.axes)
        4

    References:
        Ioffe & Szegedy 2015, figure 1 (b, c).
    """
    _some("values", values)
    colour = COLOURS[0]
    arrays = {name: np.asarray(array).astype(np.float64) for name, array in values.items()}
    for name, array in arrays.items():
        if array.ndim != 2 or not array.size:
            raise ValueError(
                f"values: got shape {array.shape} for {name!r}; expected (N, C), examples by units, not empty; "
                f"reshape it."
            )
    figure = new_figure(max(5, 3.6 * len(arrays)), 5.6)
    grid = figure.subplots(2, len(arrays), squeeze=False, sharey="row", sharex="row")
    ends = [np.percentile(array[np.isfinite(array)], (0.5, 99.5)) for array in arrays.values() if _seen(array)]
    low, high = (min(end[0] for end in ends), max(end[1] for end in ends)) if ends else (0, 0)
    edges = np.linspace(low, high, 61) if low < high else np.linspace(low - 1, low + 1, 61)
    for i, (name, array) in enumerate(arrays.items()):
        above, below = grid[:, i]
        finite = array[np.isfinite(array)]
        if _seen(array):
            share = np.full(finite.size, 1 / finite.size)
            # Not hist(density=True), which would leave out what lies beyond the edges.
            above.hist(finite, edges, weights=share / (edges[1] - edges[0]), color=colour)
        above.set(title=f"{name}\n{_moments(array, finite)}", xlabel="value")
        quantiles = np.stack([_quantiles(unit) for unit in array.T])
        five, half, most = quantiles[np.argsort(quantiles[:, 1])].T
        units = np.arange(1, array.shape[1] + 1)
        below.fill_between(units, five, most, color=colour, alpha=0.35, linewidth=0, step="mid", label="5–95%")
        below.plot(units, half, color=colour, linewidth=2, label="median")
        below.axhline(0, color="black", linewidth=0.6)
        below.set(xlabel="unit, in order of its median")
        below.locator_params("x", integer=True)
    grid[1, 0].legend(frameon=False, loc="upper left")
    grid[0, 0].set_ylabel("density over all units")
    grid[1, 0].set_ylabel("value")
    if title is not None:
        figure.suptitle(title)
    return figure


def _seen(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).any())


def _moments(array: np.ndarray, finite: np.ndarray) -> str:
    """A line about mean and standard deviation, and about values that have neither."""
    if not finite.size:
        return "no finite values"
    lost = array.size - finite.size
    remark = f"\n{lost} of {array.size} values not finite" if lost else ""
    return f"mean {finite.mean():.2f}, standard deviation {finite.std():.2f}{remark}"


def _quantiles(unit: np.ndarray) -> np.ndarray:
    """5%, 50% and 95% of the finite values, NaN (not drawn) where there are none."""
    finite = unit[np.isfinite(unit)]
    return np.percentile(finite, (5, 50, 95)) if finite.size else np.full(3, np.nan)


def _some(name: str, values: Mapping[str, Any]) -> None:
    if not values:
        raise ValueError(f"{name}: got nothing to draw; expected at least one entry; pass name → values.")


def new_figure(width: float, height: float) -> "Figure":
    """A figure of its own, not one of pyplot's: no global state, and no window system needed. Notebooks show it."""
    from matplotlib.figure import Figure

    class ShownInNotebooks(Figure):
        def _repr_png_(self) -> bytes:  # what IPython asks for; pyplot's figures alone are shown without it
            png = BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    return ShownInNotebooks(figsize=(width, height), dpi=120, layout="constrained")
