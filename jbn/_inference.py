"""What a trained batch norm becomes: an affine map, a part of the layer before it, exact statistics of the data."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import _checks, _checks_inference, _checks_layer
from jbn._core import bn_update_stats
from jbn._pytrees import BNParams, BNState, BNStats, map_nodes

__all__ = ["bn_affine", "bn_calibrate", "bn_fold"]


def bn_affine(params: BNParams, state: BNState, *, eps: Any = 1e-5) -> tuple[jax.Array, jax.Array]:
    """Inference as one multiplication and one addition: y = x·scale + shift.

    scale = γ/√(σ²+ε) and shift = β − μ·scale, with the running μ and σ². Where |μ|/σ is large both terms
    are, and digits cancel; `bn_apply` subtracts μ first and keeps them.

    Args:
        params: γ and β, each (C,) or None.
        state: running statistics, (C,). Stacks of layers (L, C) are as welcome.
        eps: ε > 0, the one the network was trained with; may be traced.

    Returns:
        ``(scale, shift)``, each of the shape of the state's fields, float32 (float64 for a float64 state).

    Raises:
        TypeError: ``params`` or ``state`` of another type, ``eps`` no number.
        ValueError: fields that differ in shape, ``eps`` ≤ 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import BNParams, BNState, bn_affine
        >>> params = BNParams(jnp.array([3.0]), jnp.array([1.0]))
        >>> state = BNState(jnp.array([5.0]), jnp.array([4.0]), jnp.array([1]))
        >>> scale, shift = bn_affine(params, state, eps=1e-12)
        >>> scale, shift
        (Array([1.5], dtype=float32), Array([-6.5], dtype=float32))

    Flax, PyTorch and Keras have no such function for users.

    References:
        Ioffe & Szegedy 2015, Algorithm 2, step 11.
    """
    params, state = _checks_layer.as_layer(params, state)
    return _affine(params, state, _checks_layer.as_eps(eps))


@jax.jit
def _affine(params, state, eps):
    dtype = _checks.compute_dtype(state.mean.dtype)
    mean, var, eps = (jnp.asarray(v, dtype) for v in (state.mean, state.var, eps))
    scale = lax.rsqrt(var + eps)
    if params.gamma is not None:
        scale = jnp.asarray(params.gamma, dtype) * scale
    shift = -mean * scale
    if params.beta is not None:
        shift = jnp.asarray(params.beta, dtype) + shift
    return scale, shift


def bn_fold(
    params: BNParams, state: BNState, kernel: Any, bias: Any = None, *, eps: Any = 1e-5, kernel_axis: int = -1
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into the dense or convolution layer before it: one layer, the same outputs.

    With `bn_affine`'s scale and shift, BN(x ∗ kernel + bias) = x ∗ (kernel·scale) + (bias·scale + shift).
    There may be nothing between the two, no activation either.

    Args:
        params: γ and β of the batch norm, each (C,) or None.
        state: its running statistics, (C,).
        kernel: floating-point weights of any rank, with the C output features along ``kernel_axis``.
        bias: (C,) floating-point, or None.
        eps: ε > 0, the one the network was trained with; may be traced.
        kernel_axis: the axis of the output features (static): -1 for dense (in, out) and for convolutions
            HWIO, grouped and depthwise too; 0 for OIHW. Transposed without groups: -1 for HWIO, as
            `jax.lax.conv_transpose` has it (-2 with its ``transpose_kernel``), 1 for PyTorch's.

    Returns:
        ``(kernel, bias)`` in the kernel's dtype, computed in at least float32. The bias is (C,).

    Raises:
        TypeError: ``kernel`` or ``bias`` not floating point, ``kernel_axis`` no int, ``params`` or
            ``state`` of another type.
        ValueError: ``kernel_axis`` out of range or not of size C, another shape of ``bias``, ``eps`` ≤ 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn import BNState, bn_apply, bn_fold, bn_init
        >>> params, _ = bn_init(3)
        >>> state = BNState(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]), jnp.ones(3, jnp.int32))
        >>> W, x = jax.random.normal(jax.random.key(0), (4, 3)), jnp.ones((2, 4))
        >>> y, _ = bn_apply(params, state, x @ W, train=False)
        >>> W_folded, b_folded = bn_fold(params, state, W)
        >>> bool(jnp.allclose(x @ W_folded + b_folded[None], y, atol=1e-5))
        True

    Layers that are stacked are folded by `jax.vmap`. PyTorch: ``torch.nn.utils.fusion.fuse_conv_bn_weights``.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks", equation 14.
    """
    params, state = _checks_layer.as_layer(params, state)
    kernel = _checks.as_array("kernel", kernel)
    channels = jnp.shape(state.mean)
    axis = _checks_inference.as_kernel_axis(kernel_axis, kernel.shape, channels)
    if bias is not None:
        bias = _checks_inference.as_bias(bias, channels)
    return _folded(axis, params, state, kernel, bias, _checks_layer.as_eps(eps))


@partial(jax.jit, static_argnums=0)
def _folded(axis, params, state, kernel, bias, eps):
    scale, shift = _affine(params, state, eps)
    dtype = max(scale.dtype, _checks.compute_dtype(kernel.dtype), key=lambda dtype: dtype.itemsize)
    scale, shift = scale.astype(dtype), shift.astype(dtype)
    if bias is not None:
        shift = bias.astype(dtype) * scale + shift
    over = lax.expand_dims(scale, [a for a in range(kernel.ndim) if a != axis])
    return (kernel.astype(dtype) * over).astype(kernel.dtype), shift.astype(kernel.dtype)


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
        The new state, same structure, shapes and dtypes. Its ``count`` is the number of batches that each
        channel could use. One in which a channel saw nothing, or a NaN or an infinity, is skipped for that
        channel (the bar counts such batches); a channel that could use none keeps its old values.

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
    totals = [_Total(*np.zeros((4, *jnp.shape(node.mean)))) for node in _states(state)]
    stream = _checks_inference.as_iterator("batches", batches)
    measured = (_stats_of(state, apply_fn(params, state, batch)) for batch in stream)
    seen = 0  # batches
    with _bar(batches) if progress else contextlib.nullcontext(_silent) as tell:
        for stats in _one_behind(measured):
            seen += 1
            before, totals = totals, _absorbed(totals, stats)
            tell(all(np.all(new.used > old.used) for new, old in zip(totals, before, strict=True)))
    _checks_inference.check_usable(seen, any(np.any(total.used) for total in totals))
    pooled = iter(totals)
    return map_nodes(lambda node, path: _replaced(node, next(pooled)), (("state", BNState),), state)


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
    count = total.count + np.where(usable, m, 0)
    share = np.where(usable, m, 0) / np.where(count > 0, count, 1)
    shift = np.where(usable, mean - total.mean, 0)
    within = (1 - share) * total.var + share * np.where(usable, var, 0)
    between = share * (1 - share) * np.square(shift)
    return _Total(total.mean + share * shift, within + between, count, total.used + usable)


def _replaced(state: BNState, total: _Total) -> BNState:
    """The pooled statistics in the place of the running ones, as one update of a new state by one batch."""
    mean, var, m = (_like(leaf, v) for leaf, v in zip((state.mean, state.var, state.mean), total, strict=False))
    start = BNState(state.mean, state.var, jnp.zeros_like(state.count))
    new = bn_update_stats(start, BNStats(mean, var, m), momentum=0.0)
    used = _like(state.count, np.minimum(total.used, np.iinfo(state.count.dtype).max))
    return BNState(new.mean, new.var, jnp.where(new.count > 0, used, state.count))


def _like(leaf: Any, values: np.ndarray) -> jax.Array:
    with np.errstate(over="ignore"):
        return jnp.asarray(values.astype(leaf.dtype))


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
    try:
        return len(batches)
    except TypeError:
        return None
