"""The table of a network's batch norm layers: what was learned, what runs along, what is dead or drifts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jbn import _checks_layer
from jbn._pool import unbiased_factor
from jbn._pytrees import BNParams, BNState, BNStats, map_nodes

__all__ = ["LayerSummary", "Summary", "states_of", "summary"]

_GAMMA_ZERO = 1e-3
_VAR_ZERO = 1e-3  # of ε

_Range = tuple[float, float]


class LayerSummary(NamedTuple):
    """One batch norm layer in numbers; plain Python values, None where there is nothing to tell.

    Attributes:
        path: where its params stand, as in the errors of jbn: ``"[0]['bn']"``; ``""`` for the tree itself.
        features: C, the shape of its fields; of stacked layers (L, C).
        gamma, beta: least and largest γ and β.
        mean, var: least and largest running mean and variance.
        dead_gamma: channels with |γ| < 0.001.
        dead_var: channels with a running variance < ε/1000.
        dead: channels with either.
        drift_mean: the largest |μ_B − μ|/√(σ²+ε), in standard deviations of the running statistics.
        drift_var: the largest |log((σ²_B+ε)/(σ²+ε))|; 0.69 is a factor of two.
        updates: least and most updates that a channel has absorbed.

    Example:
        >>> from jbn import bn_init
        >>> from jbn.report import summary
        >>> (layer,) = summary(*bn_init(3)).rows
        >>> layer.features, layer.gamma, layer.var, layer.dead, layer.updates
        ((3,), (1.0, 1.0), (1.0, 1.0), 0, (0, 0))
    """

    path: str
    features: tuple[int, ...]
    gamma: _Range | None
    beta: _Range | None
    mean: _Range | None
    var: _Range | None
    dead_gamma: int | None
    dead_var: int | None
    dead: int
    drift_mean: float | None
    drift_var: float | None
    updates: tuple[int, int] | None


class Summary(NamedTuple):
    """A table of batch norm layers: ``print`` it to read it, take ``rows`` for the numbers.

    Attributes:
        rows: one for each layer, in the order of the params' leaves.
        eps: the ε that zero and drift are measured by.

    Example:
        >>> from jbn import bn_init
        >>> from jbn.report import summary
        >>> table = summary(*bn_init(3))
        >>> table.rows[0]._asdict()["mean"]
        (0.0, 0.0)
        >>> print(str(table).splitlines()[0].split()[0])
        layer
    """

    rows: tuple[LayerSummary, ...]
    eps: float

    def __str__(self) -> str:
        drifts = any(row.drift_mean is not None for row in self.rows)
        columns = {**_COLUMNS, **(_DRIFT if drifts else {})}
        lines = [list(columns), *([show(row) for show in columns.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [_line(cells, widths) for cells in lines]
        table.insert(1, "─" * len(table[0]))
        return "\n".join([*table, *_legend(self.eps, drifts)])


def summary(params: Any, state: Any, stats: Any = None, *, eps: float = 1e-5) -> Summary:
    """Tables the batch norm layers of a network: ranges, dead channels, drift, updates.

    A channel is dead where it says (nearly) the same for every example: |γ| < 0.001, or a running variance
    below ε/1000, which ε outweighs. Drift is how far the statistics of a batch are from the running ones,
    as evaluation sees it, the largest of all channels that the batch has seen:

        mean: |μ_B − μ|/√(σ²+ε)        variance: |log((σ²_B+ε)/(σ²+ε))|

    with the unbiased σ²_B, since `bn_update_stats` stores that one. With ε, a constant channel does not
    drift.

    Args:
        params: a `BNParams`, or any pytree that holds them among other leaves; γ and β may be None. None
            tables the state alone.
        state: a `BNState`, or a pytree with one for each `BNParams`: at the same place, or where the layer
            of the params is (``state[0]`` for ``params[0]["bn"]``). None, whole or in part, where there
            are no running statistics. Stacked layers (L, C) are one row.
        stats: what a batch showed, of the structure of ``state``: what the network's ``apply`` returned.
        eps: ε > 0 of the network.

    Returns:
        A `Summary`: a table when printed, and its numbers as ``rows``.

    Raises:
        TypeError: another type in the place of a `BNState` or `BNStats`, a call under `jax.jit`.
        ValueError: no batch norm at all, structures or shapes that do not match (with the path), ``eps`` ≤ 0.

    Example:
        >>> import jax
        >>> from jbn.networks import mlp
        >>> from jbn.report import summary
        >>> network = mlp((4, 8, 8, 3))
        >>> params, state = network.init(jax.random.key(0))
        >>> _, stats = network.apply(params, state, jax.random.normal(jax.random.key(1), (16, 4)), train=True)
        >>> table = summary(params, state, stats)
        >>> [(row.path, row.features, row.updates) for row in table.rows]
        [("[0]['bn']", (8,), (0, 0)), ("[1]['bn']", (8,), (0, 0))]
        >>> print(table)  # doctest: +ELLIPSIS
        layer      C ...

    Flax: ``nn.tabulate`` shows shapes; PyTorch and Keras have nothing of the kind for the statistics.
    """
    _checks_layer.as_eps(eps)
    _no_tracers(params, state, stats)
    owners = _params_of(params)
    running = states_of(state, stats)
    rows = []
    for path, node, match in _matched(owners, list(running), params is None):
        now, seen = (None, None) if match is None else running[match]
        rows.append(_row(jax.tree_util.keystr(path), node, now, seen, eps))
    if not rows:
        raise ValueError(
            "params: got no BNParams in it; expected at least one; pass the params of a network with batch norm."
        )
    return Summary(tuple(rows), float(eps))


_Path = tuple[Any, ...]


def _params_of(params: Any) -> list[tuple[_Path, BNParams]]:
    """Every BNParams and its path; the leaves around them are passed over."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, BNParams))
    return [(path, node) for path, node in leaves if isinstance(node, BNParams)]


def states_of(state: Any, stats: Any) -> dict[_Path, tuple[BNState, BNStats | None]]:
    """Every BNState by its path, with its stats."""
    found: list[tuple[BNState, BNStats | None]] = []

    def collect(node, *seen, path):
        if seen:
            _checks_layer.check_matching(path, node, seen[0])
        found.append((node, seen[0] if seen else None))

    expected = (("state", BNState), ("stats", BNStats))
    if stats is None:
        map_nodes(collect, expected[:1], state)
    else:
        map_nodes(collect, expected, state, stats)
    paths = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: isinstance(node, BNState))
    return {path: pair for (path, _), pair in zip(paths, found, strict=True)}


def _matched(
    owners: list[tuple[_Path, BNParams]], states: list[_Path], alone: bool
) -> list[tuple[_Path, BNParams | None, _Path | None]]:
    """Each BNParams with the path of its state, or None: the state at its own path, else at that of its layer."""
    if alone:
        return [(path, None, path) for path in states]
    match: dict[_Path, _Path] = {}
    free = [path for path, _ in owners]
    # Longest first, so that a state takes what stands right below it before one further up does.
    for place in sorted(states, key=len, reverse=True):
        below = [path for path in free if path[: len(place)] == place]
        below = [path for path in below if path == place] or below
        if len(below) != 1:
            name = f"state{jax.tree_util.keystr(place)}"
            raise ValueError(
                f"{name}: got a BNState with {len(below)} BNParams at or below that place in params; expected one; "
                f"nest the state as the params are, with None where there is no batch norm."
            )
        match[below[0]] = place
        free.remove(below[0])
    return [(path, node, match.get(path)) for path, node in owners]


def _row(path: str, params: BNParams | None, state: BNState | None, stats: BNStats | None, eps: float) -> LayerSummary:
    gamma, beta = (None, None) if params is None else map(_float64, params)
    mean, var = (None, None) if state is None else (_float64(state.mean), _float64(state.var))
    shapes = [np.shape(field) for field in (mean, gamma, beta) if field is not None]
    for name, field in (("gamma", gamma), ("beta", beta)):
        if field is not None and field.shape != shapes[0]:
            raise ValueError(
                f"params{path}.{name}: got shape {field.shape}; expected {shapes[0]}, that of the other fields of "
                f"this layer; pass the params and the state of one network."
            )
    still = None if gamma is None else np.abs(gamma) < _GAMMA_ZERO
    flat = None if var is None else var < _VAR_ZERO * eps
    dead = np.zeros(shapes[0] if shapes else (0,), bool)
    for part in (still, flat):
        dead = dead if part is None else dead | part
    drift = None if state is None or stats is None else _drift(mean, var, stats, eps)
    return LayerSummary(
        path=path,
        features=shapes[0] if shapes else (),
        gamma=_range(gamma),
        beta=_range(beta),
        mean=_range(mean),
        var=_range(var),
        dead_gamma=None if still is None else int(still.sum()),
        dead_var=None if flat is None else int(flat.sum()),
        dead=int(dead.sum()),
        drift_mean=None if drift is None else drift[0],
        drift_var=None if drift is None else drift[1],
        updates=None if state is None else _range(np.asarray(state.count)),
    )


def _drift(mean: Any, var: Any, stats: BNStats, eps: float) -> tuple[float, float] | None:
    """The largest drift of mean and variance; NaN where something is not a number; None if nothing was seen."""
    batch_mean, batch_var, count = map(_float64, stats)
    seen = count > 0
    if not seen.any():
        return None
    with np.errstate(all="ignore"):
        away = np.abs(batch_mean - mean) / np.sqrt(var + eps)
        ratio = np.abs(np.log((batch_var * unbiased_factor(count, np) + eps) / (var + eps)))
    return float(away[seen].max()), float(ratio[seen].max())


def _float64(field: Any) -> Any:
    return None if field is None else np.asarray(field).astype(np.float64)


def _range(field: Any) -> Any:
    """Least and largest as Python numbers; (nan, nan) with a NaN among them."""
    return None if field is None or not field.size else (field.min().item(), field.max().item())


def _no_tracers(*trees: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees)):
        raise TypeError(
            "params, state, stats: got traced arrays; expected concrete ones; call summary outside jax.jit and "
            "other transformations."
        )


def _span(pair: Any) -> str:
    return "–" if pair is None else f"{pair[0]:.3g} … {pair[1]:.3g}"


def _updates(row: LayerSummary) -> str:
    if row.updates is None:
        return "–"
    least, most = row.updates
    return str(least) if least == most else f"{least} … {most}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.1e}"


_COLUMNS: dict[str, Callable[[LayerSummary], str]] = {
    "layer": lambda row: row.path or "(whole)",
    "C": lambda row: "×".join(map(str, row.features)) or "–",
    "γ": lambda row: _span(row.gamma),
    "β": lambda row: _span(row.beta),
    "running μ": lambda row: _span(row.mean),
    "running σ²": lambda row: _span(row.var),
    "updates": _updates,
    "dead": lambda row: str(row.dead),
}
_DRIFT: dict[str, Callable[[LayerSummary], str]] = {
    "drift μ": lambda row: _number(row.drift_mean),
    "drift σ²": lambda row: _number(row.drift_var),
}


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])


def _legend(eps: float, drifts: bool) -> list[str]:
    lines = [f"dead: channels with |γ| < {_GAMMA_ZERO:g} or running σ² < {_VAR_ZERO * eps:g} (ε/1000)"]
    if drifts:
        lines.append("drift: largest |μ_B − μ|/√(σ²+ε) and |log((σ²_B+ε)/(σ²+ε))|, batch B against running")
    return lines
