"""Haiku: the parameters of a batch norm, and the averages that its two modules keep."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jbn._checks import as_ints, as_size, as_tuple, kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_jax, as_numpy, shape_of
from jbn.convert._averages import counted, counter_of, hidden_of
from jbn.convert._formats import Entry, Format, as_names, found, leaves, refilled, slashed
from jbn.convert._layer import as_arrays, as_layer, one_count, spread

__all__ = ["HAIKU", "from_haiku", "to_haiku"]

_MEAN, _VAR = "~/mean_ema/", "~/var_ema/"


def from_haiku(variables: Any, prefix: Any = "", *, axis: Any = -1, count: Any = None) -> tuple[BNParams, BNState]:
    """A batch norm of Haiku as ``(params, state)``; the variables of `jbn.haiku.BatchNorm` are the same.

    γ and β are ``scale`` and ``offset``; μ and σ² are the ``average`` of ``mean_ema`` and ``var_ema``, with which
    Haiku normalizes, and their ``counter`` is the count. Haiku's ``decay_rate`` d is jbn's momentum; it stores the
    biased variance and corrects the start as jbn does: go on with
    ``bn_update_stats(state, stats, momentum=d, unbiased=False)``. ``eps`` is no variable; Haiku's default is jbn's,
    1e-5.

    Args:
        variables: the pair ``(params, state)`` that ``init`` returns, two mappings from module names.
        prefix: the name of the module, ``"res_net18/~/initial_batchnorm"``.
        axis: where the features are in Haiku's arrays, which keep all other axes with size 1: 1 for
            ``data_format="NCHW"``; a tuple for several.
        count: how many updates the running statistics hold, in the place of the counter.

    Returns:
        ``(params, state)`` of shape (C,), or (L, C) where layers are stacked and there is a counter for each. γ and β
        keep their dtype and are None where the layer has none; running statistics are float32, or float64 where they
        are stored so.

    Raises:
        TypeError: an entry that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: no batch norm at ``prefix``, a running statistic missing, a key too many, features elsewhere than
            along ``axis``, shapes or counters that differ, a negative variance, a number that is not finite.

    Example:
        >>> import haiku as hk, jax.numpy as jnp
        >>> from jbn.convert import from_haiku
        >>> model = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True))
        >>> variables = model.init(None, jnp.ones((4, 2)))
        >>> params, state = from_haiku(variables, "batch_norm")
        >>> params.gamma, state.count
        (Array([1., 1.], dtype=float32), Array([0, 0], dtype=int32))

    References:
        Haiku, `haiku.BatchNorm` and `haiku.ExponentialMovingAverage`.
    """
    return _read(found(HAIKU, _entries(variables), prefix), {"axis": axis, "count": count})


def to_haiku(
    params: BNParams,
    state: BNState,
    prefix: Any = "batch_norm",
    *,
    momentum: Any = None,
    ndim: int = 2,
    axis: Any = -1,
    dtype: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch norm as Haiku has it among its parameters and state; `jbn.haiku.BatchNorm` takes them as well.

    The converse of `from_haiku`: ``average`` is the running statistic bit for bit, ``hidden`` average·(1−dᵗ).

    Args:
        params: γ and β; what is None is left out, as with ``create_scale=False``.
        state: running statistics and counts.
        prefix: the name of the module, with ``/`` between those it is nested in.
        momentum: the layer's ``decay_rate`` d; needed unless the count is 0 or saturated.
        ndim: the rank of what the layer is applied to, 4 after a convolution of images.
        axis: where the features are in it: 1 for ``data_format="NCHW"``; a tuple for several.
        dtype: of all but the counter; None keeps the dtype that each array has.

    Returns:
        ``(params, state)``, two dicts of JAX arrays by module name. The counter is one number for the layer: the
        largest of its channels' counts. A saturated one is written as 2³⁰, so that Haiku, which adds to it without a
        check, does not overflow.

    Raises:
        TypeError: ``params`` or ``state`` of another type.
        ValueError: fields that differ in shape, no ``momentum`` where it is needed, an ``axis`` out of range.

    Example:
        >>> import jbn
        >>> params, state = jbn.convert.to_haiku(*jbn.bn_init(2), "bn", ndim=4)
        >>> params["bn"]["scale"].shape, list(state)
        ((1, 1, 1, 2), ['bn/~/mean_ema', 'bn/~/var_ema'])

    References:
        Haiku, `haiku.BatchNorm` and `haiku.ExponentialMovingAverage`.
    """
    start = "".join(f"{name}/" for name in as_names("prefix", prefix, "/"))
    if not start:
        raise ValueError("prefix: got ''; expected the name of the module; pass 'batch_norm', Haiku's own.")
    options = {"momentum": momentum, "ndim": ndim, "axis": axis, "dtype": dtype}
    return _build({start + leaf: array for leaf, array in _write(params, state, {}, options).items()}, None)


def _entries(variables: Any) -> dict[str, Entry]:
    pair = isinstance(variables, tuple) and len(variables) == 2 and all(isinstance(v, Mapping) for v in variables)
    if not pair:
        raise TypeError(
            f"variables: got {kind_of(variables)}; expected the pair (params, state) of two mappings; "
            f"pass what init returned."
        )
    named = zip(("params", "state"), variables, strict=True)
    return {slashed(path): entry for name, tree in named for path, entry in leaves(name, tree)}


def _read(pieces: dict[str, Entry], options: dict[str, Any]) -> tuple[BNParams, BNState]:
    counters = [pieces[part + "counter"] for part in (_MEAN, _VAR)]
    average = pieces[_MEAN + "average"]
    shape = as_numpy(*average).shape
    counts = [spread(*counter, as_numpy(*average)) for counter in counters]
    if not np.array_equal(counts[0], counts[1]):
        raise ValueError(
            f"{counters[1].label}: got {counts[1].ravel()}; expected {counts[0].ravel()}, that of the mean; "
            f"pass the state of one layer."
        )
    stacked = as_numpy(*counters[0]).ndim
    axes = _axes(options.get("axis", -1), len(shape) - stacked)
    kept = {*range(stacked), *(stacked + a for a in axes)}

    def squeezed(leaf):
        if leaf not in pieces:
            return None
        entry = pieces[leaf]
        array = as_numpy(*entry)
        if array.ndim != len(shape) or any(n != 1 for a, n in enumerate(array.shape) if a not in kept):
            raise ValueError(
                f"{entry.label}: got shape {array.shape}; expected rank {len(shape)} and size 1 everywhere but along "
                f"axis {options.get('axis', -1)}; name the axis of the features in axis."
            )
        return Entry(entry.label, array.reshape([n for a, n in enumerate(array.shape) if a in kept]))

    mean, var = squeezed(_MEAN + "average"), squeezed(_VAR + "average")
    counted_updates = counted(counts[0]).reshape(counts[0].shape[:stacked] + (1,) * len(axes))
    learned = squeezed("scale"), squeezed("offset")
    return as_layer(*learned, mean, var, counted=counted_updates, count=options.get("count"))


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    axes = as_ints("axis", axis, "expected an int or a tuple of ints; pass 1 for NCHW.", as_tuple(axis))
    if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) != len(axes):
        raise ValueError(
            f"axis: got {axis}; expected different axes of an array of rank {ndim}; name those of the features."
        )
    return tuple(sorted(a % ndim for a in axes))


def _write(params: Any, state: Any, like: dict[str, Entry], options: dict[str, Any]) -> dict[str, jax.Array]:
    gamma, beta, mean, var, count = as_arrays(params, state, options.get("dtype"))
    if like:  # the arrays that stand there say which rank they have, and how many axes of stacked layers
        lead = len(shape_of(like[_MEAN + "counter"].value) or ())
        rank = len(shape_of(like[_MEAN + "average"].value) or ()) - lead
    else:
        rank = as_size("ndim", options.get("ndim", 2), "pass the rank of the layer's inputs")
        lead = max(mean.ndim - len(as_tuple(options.get("axis", -1))), 0)
    axes = _axes(options.get("axis", -1), rank)
    if mean.ndim != lead + len(axes):
        raise ValueError(
            f"state.mean: got shape {mean.shape}; expected {len(axes)} axes of features; name each of them in axis."
        )
    sizes = iter(mean.shape[lead:])
    shape = (*mean.shape[:lead], *(next(sizes) if a in axes else 1 for a in range(rank)))
    counter = counter_of(one_count(count, lead))
    beside = counter.reshape(counter.shape + (1,) * (mean.ndim - lead))
    arrays = {"scale": gamma, "offset": beta}
    for part, average in ((_MEAN, mean), (_VAR, var)):
        arrays[part + "hidden"] = hidden_of(average, beside, options.get("momentum"))
        arrays[part + "average"] = average
    written = {leaf: as_jax(leaf, a.reshape(shape)) for leaf, a in arrays.items() if a is not None}
    return written | {part + "counter": as_jax("counter", counter) for part in (_MEAN, _VAR)}


def _build(arrays: dict[str, Any], like: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an average keeps goes to the state, all else to the params."""
    if like is not None:
        params, state = (refilled(tree, arrays, slashed) for tree in like)
        return params, state
    params, state = {}, {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition("/")
        running = any(f"/{name}".endswith(f"/{part}{leaf}") for part in (_MEAN, _VAR))
        (state if running else params).setdefault(module, {})[leaf] = array
    return params, state


HAIKU = Format(
    name="haiku",
    argument="variables",
    separator="/",
    learned=("scale", "offset"),
    running=(tuple(part + leaf for part in (_MEAN, _VAR) for leaf in ("average", "hidden", "counter")),),
    optional=(),
    kernel="w",
    bias="b",
    kernels_first=False,
    needs_like=True,
    entries=_entries,
    read=_read,
    write=_write,
    build=_build,
)
