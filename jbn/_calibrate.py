"""Exact statistics of a data set with frozen weights, in the place of running ones."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn import _checks, _checks_inference, _checks_layer
from jbn._pool import Moments, pool, unbiased_factor
from jbn._pytrees import BNState, BNStats, map_nodes
from jbn._shardings import laid_out_like

__all__ = ["bn_calibrate"]


def bn_calibrate(
    apply_fn: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    state: Any,
    batches: Iterable[Any],
    *,
    progress: bool = False,
) -> Any:
    """Replaces running statistics by the exact ones of a data set, with frozen weights ("precise BN").

    One pass over ``batches``; for each channel the moments of all of them are pooled by count, in float64
    on the host, so that unequal batches and any number of values are exact. The variance is unbiased, as in
    `bn_update_stats`. How the data are cut does not matter for a layer that sees the data themselves; a
    layer behind another batch norm sees them normalized batch by batch, so there large batches are better.

    Args:
        apply_fn: ``apply_fn(params, state, batch) -> (anything, stats)``, with the network in training
            mode. It is called as it is: jit it yourself.
        params: what ``apply_fn`` takes, frozen.
        state: a `BNState`, or any pytree with one for each batch norm.
        batches: any iterable: a list, a generator, a data loader. It is read once, and no more than two
            batches are held at a time.
        progress: whether to show a bar on stderr; needs the package rich.

    Returns:
        The new state, same structure, shapes and dtypes; each statistic is rounded once, to its dtype. Its
        ``count`` is the number of batches that each channel could use. One in which a channel saw nothing, or
        a NaN or an infinity, is skipped for that channel (the bar counts such batches); a channel that could
        use none, or whose statistics overflow the dtype of the state, keeps its old values.

    Raises:
        TypeError: ``batches`` not iterable, ``apply_fn`` not a function or not returning a pair, a call
            under `jax.jit` or another transformation.
        ValueError: no batches, or none that any channel could use (nothing is lost: the old state is
            as it was); stats whose structure or shapes do not match (with the path).
        ModuleNotFoundError: ``progress`` without rich.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> from jbn import bn_calibrate
        >>> from jbn.networks import mlp
        >>> network = mlp((4, 8, 3))
        >>> params, state = network.init(jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (250, 4))
        >>> batches = (x[i : i + 100] for i in range(0, 250, 100))  # the last one smaller
        >>> state = bn_calibrate(jax.jit(partial(network.apply, train=True)), params, state, batches)
        >>> state[0].count
        Array([3, 3, 3, 3, 3, 3, 3, 3], dtype=int32)

    PyTorch: ``torch.optim.swa_utils.update_bn``, which averages the moments of batches, equally weighted.

    References:
        Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; Izmailov et al. 2018, "Averaging
        Weights Leads to Wider Optima", for averaged weights; Chan, Golub & LeVeque 1983, equation 2.1.
    """
    apply_fn = _checks.as_function("apply_fn", apply_fn)
    progress = _checks.as_flag("progress", progress)
    states = _states(state)
    totals = [_Total(*np.zeros((4, *jnp.shape(node.mean)))) for node in states]
    stream = _checks_inference.as_iterator("batches", batches)
    measured = (_stats_of(state, apply_fn(params, state, batch)) for batch in stream)
    seen = 0  # batches
    with _bar(batches) if progress else contextlib.nullcontext(_silent) as tell:
        for stats in _one_behind(measured):
            seen += 1
            before, totals = totals, _absorbed(totals, stats)
            tell(all(np.all(new.used > old.used) for new, old in zip(totals, before, strict=True)))
    stored = [_stored(node, total) for node, total in zip(states, totals, strict=True)]
    _checks_inference.check_usable(seen, any(np.any(total.used) for total in stored))
    new = iter(stored)
    return map_nodes(lambda node, path: _replaced(node, next(new)), (("state", BNState),), state)


class _Total(NamedTuple):
    """Pooled moments of one layer so far, float64 on the host: float32 counts stand still from 2²⁴ on."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # type: ignore[assignment]  # how many values; it hides tuple.count
    used: np.ndarray  # how many batches


def _states(state: Any) -> list[BNState]:
    """The states in the order of the walk."""
    found: list[BNState] = []
    map_nodes(lambda node, path: found.append(node), (("state", BNState),), state)
    _checks_inference.check_states(found)
    return found


def _stats_of(state: Any, returned: Any) -> list[BNStats]:
    """The stats of one batch, in the order of the states."""
    found: list[BNStats] = []

    def check(node, stats, *, path):
        _checks_layer.check_matching(path, node, stats)
        found.append(stats)

    expected = (("state", BNState), ("stats", BNStats))
    map_nodes(check, expected, state, _checks_inference.as_returned_stats(returned))
    return found


def _one_behind(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each given when the next is made: the device works on one while the host pools another."""
    waiting = None
    for item in items:
        if waiting is not None:
            yield waiting
        waiting = item
    if waiting is not None:
        yield waiting


def _absorbed(totals: list[_Total], batch: list[BNStats]) -> list[_Total]:
    return [_pooled(total, stats) for total, stats in zip(totals, jax.device_get(batch), strict=True)]


@np.errstate(over="ignore", invalid="ignore")  # what overflows float64 is not finite, and not used in the end
def _pooled(total: _Total, stats: BNStats) -> _Total:
    """Chan's formula for two parts; a channel that is not finite, or saw nothing, stays as it was."""
    mean, var, m = (np.asarray(leaf, np.float64) for leaf in stats)
    usable = (m > 0) & np.isfinite(m) & np.isfinite(mean) & np.isfinite(var)
    parts = zip((total.mean, total.var, total.count), (mean, var, np.where(usable, m, 0)), strict=True)
    means, variances, counts = map(np.stack, parts)
    union = pool(Moments(means, np.zeros_like(means), variances, counts), np)
    return _Total(union.mean_hi + union.mean_lo, union.var, union.count, total.used + usable)


@np.errstate(over="ignore")  # what overflows the dtype of the state is not finite there, and not used
def _stored(state: BNState, total: _Total) -> _Total:
    """What a state is to hold, each number rounded once to its dtype; used 0 times where it is not to be used."""
    mean, var = (
        total.mean.astype(state.mean.dtype),
        (total.var * unbiased_factor(total.count, np)).astype(state.var.dtype),
    )
    used = np.where(np.isfinite(mean) & np.isfinite(var), total.used, 0)
    used = np.minimum(used, np.iinfo(state.count.dtype).max).astype(state.count.dtype)
    return _Total(mean, var, total.count, used)


def _replaced(state: BNState, new: _Total) -> BNState:
    """The new statistics in the place of the running ones, channel by channel where there are any."""
    pairs = zip((new.mean, new.var, new.used), state, strict=True)
    return BNState(*(laid_out_like(jnp.where(new.used > 0, now, old), old) for now, old in pairs))


def _silent(complete: bool) -> None:
    pass


@contextlib.contextmanager
def _bar(batches: Any) -> Iterator[Callable[[bool], None]]:
    """A bar that moves by one batch at each call, and counts those that some channel could not use."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        raise ModuleNotFoundError(
            "progress: got True; expected the package rich to be installed; "
            "run pip install rich, or pass progress=False."
        ) from None
    tally = TextColumn("{task.fields[skipped]} skipped")
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), tally, TimeElapsedColumn())
    skipped = 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=_length(batches), skipped=skipped)

        def tell(complete: bool) -> None:
            nonlocal skipped
            skipped += not complete
            bar.update(task, advance=1, skipped=skipped)

        yield tell


def _length(batches: Any) -> int | None:
    """How many batches there are, if they can say so: a bar is no reason to fail for a wrong ``__len__``."""
    try:
        return len(batches)
    except Exception:
        return None
