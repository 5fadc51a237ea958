"""The picture of running statistics against those of a batch."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jbn._pool import unbiased_factor
from jbn.report._pictures import COLOURS, new_figure
from jbn.report._summary import states_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_statistics"]

_LAYERS_A_ROW = 4


def plot_statistics(state: Any, stats: Any) -> "Figure":
    """Draws the statistics of a batch over the running ones, channel by channel, for each layer.

    Args:
        state: a `BNState`, or any pytree with one for each batch norm.
        stats: what a batch showed, of the same structure.

    Returns:
        A matplotlib ``Figure`` with two panels a layer: means above, logarithms of the variances below,
        unbiased, as they are stored. On the line both agree. What cannot be drawn (not finite, a
        variance of 0, a channel that saw nothing) is counted in the title of its panel.

    Raises:
        TypeError: another type in the place of a `BNState` or `BNStats`.
        ValueError: no `BNState` at all, structures or shapes that do not match (with the path).

    Example:
        >>> import jax
        >>> from jbn.networks import mlp
        >>> from jbn.report import plot_statistics
        >>> network = mlp((4, 8, 8, 3))
        >>> params, state = network.init(jax.random.key(0))
        >>> _, stats = network.apply(params, state, jax.random.normal(jax.random.key(1), (16, 4)), train=True)
        >>> figure = plot_statistics(state, stats)
        >>> len(figure.axes)  # two layers
        4
    """
    if stats is None:
        raise TypeError(
            "stats: got None; expected BNStats, or a pytree of them; pass what the network's apply returned."
        )
    layers = states_of(state, stats)
    if not layers:
        raise ValueError(
            "state: got no BNState in it; expected at least one; pass the state of a network with batch norm."
        )
    columns = min(_LAYERS_A_ROW, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(max(4, 3 * columns), 5.6 * rows)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for i, (path, (running, seen)) in enumerate(layers.items()):
        means, variances = grid[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        mean, var, count = (np.asarray(field).astype(np.float64).ravel() for field in seen or ())
        name = jax.tree_util.keystr(path) or "(whole)"
        _scatter(means, running.mean, mean, count > 0, f"{name}\n")
        with np.errstate(all="ignore"):
            logs = np.log10(np.asarray(running.var).astype(np.float64)), np.log10(var * unbiased_factor(count, np))
        _scatter(variances, *logs, count > 0)
        means.set_xlabel("running mean")
        variances.set_xlabel("log₁₀ running variance")
        if i % columns == 0:
            means.set_ylabel("mean of the batch")
            variances.set_ylabel("log₁₀ variance of the batch")
    for blank in grid[-2:, len(layers) - columns * (rows - 1) :].ravel():
        blank.remove()
    return figure


def _scatter(axes: "Axes", running: Any, batch: np.ndarray, seen: np.ndarray, title: str = "") -> None:
    """One point a channel, and the line on which both agree."""
    running = np.asarray(running).astype(np.float64).ravel()
    drawn = seen & np.isfinite(running) & np.isfinite(batch)
    both = np.concatenate([running[drawn], batch[drawn]])
    if both.size:
        margin = 0.08 * np.ptp(both) or 1.0
        ends = both.min() - margin, both.max() + margin
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(xlim=ends, ylim=ends)
    axes.scatter(running[drawn], batch[drawn], s=14, color=COLOURS[0], alpha=0.6, linewidths=0)
    axes.set_box_aspect(1)
    axes.grid(alpha=0.3)
    lost = int((~drawn).sum())
    remark = f"{lost} of {drawn.size} channels not drawn" if lost else f"{drawn.size} channels"
    axes.set_title(f"{title}{remark}", fontsize="medium")
