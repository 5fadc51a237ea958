"""PyTorch: the entries of a ``state_dict`` that belong to a batch norm."""

from typing import Any

import numpy as np

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_numpy
from jbn.convert._formats import Entry, Format, as_names, found, named, refilled
from jbn.convert._layer import SATURATED, as_arrays, as_layer, one_count, spread

__all__ = ["TORCH", "from_torch", "to_torch"]


def from_torch(state_dict: Any, prefix: Any = "", *, count: Any = None) -> tuple[BNParams, BNState]:
    """A batch norm of PyTorch as ``(params, state)``.

    γ, β, μ and σ² are ``weight``, ``bias``, ``running_mean`` and ``running_var``. Both libraries store the unbiased
    variance, σ²·m/(m−1). PyTorch's ``momentum`` m is the share of the batch: go on with
    ``bn_update_stats(state, stats, momentum=1 - m, debias=False)``, and after ``momentum=None`` with ``momentum=1.0``
    and debias, the plain average. ε is no part of a state dict; PyTorch's default is jbn's, 1e-5.

    Args:
        state_dict: a mapping from names to arrays, what ``module.state_dict()`` returns: tensors on any device,
            wanting gradients or not, or arrays of NumPy or JAX.
        prefix: the name of the layer, ``"layer1.0.bn1"``, or a tuple of the names along it; for the state dict of the
            layer itself none.
        count: how many updates the running statistics hold, in the place of what the state dict says.

    Returns:
        ``(params, state)`` of shape (C,), or (L, C) as ``torch.func.stack_module_state`` has them. γ and β keep their
        dtype and are None where the layer has none; running statistics are float32, or float64 where they are stored
        so. ``state.count`` is ``num_batches_tracked``. Where that is 0 or absent although the statistics are not those
        of a new layer, (0, 1), nothing is known: it is saturated, so that they count as fully warmed up.

    Raises:
        TypeError: an entry that holds no real floating-point numbers, or float64 ones with 64 bit off.
        ValueError: no batch norm at ``prefix``, a running statistic missing, a key too many, shapes that differ, a
            negative variance, a number that is not finite.

    Example:
        >>> import numpy as np
        >>> from jbn.convert import from_torch
        >>> state_dict = {
        ...     "bn.weight": np.float32([1, 2]), "bn.bias": np.float32([0, 0]), "bn.running_mean": np.float32([3, 4]),
        ...     "bn.running_var": np.float32([5, 6]), "bn.num_batches_tracked": np.int64(7),
        ... }
        >>> params, state = from_torch(state_dict, "bn")
        >>> params.gamma, state.count
        (Array([1., 2.], dtype=float32), Array([7, 7], dtype=int32))

    References:
        PyTorch, ``torch.nn.BatchNorm2d``.
    """
    return _read(found(TORCH, _entries(state_dict), prefix), {"count": count})


def to_torch(params: BNParams, state: BNState, prefix: Any = "", *, dtype: Any = None) -> dict[str, np.ndarray]:
    """A batch norm as PyTorch has it in a ``state_dict``.

    The converse of `from_torch`. To load it:
    ``module.load_state_dict({name: torch.as_tensor(array) for name, array in to_torch(params, state).items()})``.

    Args:
        params: γ and β, (C,); what is None is left out, as with ``affine=False``.
        state: running statistics, (C,), and counts.
        prefix: the name of the layer, ``"layer1.0.bn1"``.
        dtype: of all but the count; None keeps the dtype that each array has. A model that was cast whole, as by
            ``module.bfloat16()``, has its running statistics in that dtype too. NumPy's bfloat16 becomes a tensor by
            ``torch.from_dlpack(jnp.asarray(array))``.

    Returns:
        A dict of NumPy arrays under PyTorch's names. ``num_batches_tracked`` is int64, one number for the layer: the
        largest of its channels' counts. A saturated count is written as 0, PyTorch's own mark for statistics whose
        number of updates is not known (with ``momentum=None`` its next batch would replace them).

    Raises:
        TypeError: ``params`` or ``state`` of another type.
        ValueError: fields that differ in shape.

    Example:
        >>> import jbn
        >>> arrays = jbn.convert.to_torch(*jbn.bn_init(2), prefix="bn")
        >>> list(arrays)
        ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']

    References:
        PyTorch, ``torch.nn.BatchNorm2d``.
    """
    start = "".join(f"{name}." for name in as_names("prefix", prefix, "."))
    return {start + leaf: array for leaf, array in _write(params, state, {}, {"dtype": dtype}).items()}


def _entries(state_dict: Any) -> dict[str, Entry]:
    if not hasattr(state_dict, "items"):
        hint = "pass module.state_dict()" if hasattr(state_dict, "state_dict") else "pass a dict of arrays by name"
        raise TypeError(f"state_dict: got {kind_of(state_dict)}; expected a mapping from names to arrays; {hint}.")
    return named("state_dict", dict(state_dict), _name)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _read(pieces: dict[str, Entry], options: dict[str, Any]) -> tuple[BNParams, BNState]:
    mean, var, tracked = pieces["running_mean"], pieces["running_var"], pieces.get("num_batches_tracked")
    counted = None
    if tracked is not None:
        means, vars_ = as_numpy(*mean), as_numpy(*var)
        counted = spread(tracked.label, tracked.value, means)
        new = np.all(means == 0) and np.all(vars_ == 1)
        counted = counted if new else np.where(counted == 0, SATURATED, counted)
    return as_layer(pieces.get("weight"), pieces.get("bias"), mean, var, counted=counted, count=options.get("count"))


def _write(params: Any, state: Any, like: dict[str, Entry], options: dict[str, Any]) -> dict[str, np.ndarray]:
    gamma, beta, mean, var, count = as_arrays(params, state, options.get("dtype"))
    tracked = np.asarray(one_count(count, mean.ndim - 1), np.int64)
    arrays = {
        "weight": gamma,
        "bias": beta,
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": np.asarray(np.where(tracked == SATURATED, 0, tracked)),
    }
    return {leaf: array for leaf, array in arrays.items() if array is not None}


def _build(arrays: dict[str, Any], like: Any) -> dict[str, Any]:
    return dict(arrays) if like is None else refilled(dict(like), arrays, _name)


TORCH = Format(
    name="torch",
    argument="state_dict",
    separator=".",
    learned=("weight", "bias"),
    running=(("running_mean", "running_var"),),
    optional=("num_batches_tracked",),
    kernel="weight",
    bias="bias",
    kernels_first=True,
    needs_like=False,
    entries=_entries,
    read=_read,
    write=_write,
    build=_build,
)
