"""Arrays fitted to where they go: no number is rounded unasked, and what is shared has to agree."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import as_jax, as_numpy, shape_of
from jbn.convert._formats import Entry, Format
from jbn.convert._places import label

__all__ = ["as_field", "as_ours", "as_theirs", "put"]


def put(
    into: dict[str, Any], came_from: dict[tuple[str, str], str], tree: str, place: str, value: Any, source: str
) -> None:
    """Puts a value where nothing is, or the same."""
    known = into.setdefault(place, value)
    first = came_from.setdefault((tree, place), source)
    if known is not value and not _same(known, value):
        raise ValueError(
            f"{label(tree, place)}: got different numbers from {first!r} and {source!r}; expected the same from both, "
            f"since they share it; map one of them alone, and name the other in skip."
        )


def _same(a, b):
    a, b = (v if isinstance(v, (BNParams, BNState)) else (v,) for v in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def as_field(form: Format, theirs: str, tree: str, place: str, field: str, value: Any, old: Any) -> Any:
    """A field of a batch norm at its place, whose dtype it takes; None on both sides or on neither."""
    where = f"{label(tree, place)}.{field}"
    if value is None and old is None:
        return None
    if value is None or old is None:
        got, wanted = ("nothing", "an array") if value is None else ("an array", "None")
        raise ValueError(
            f"{where}: got {got} from {theirs!r}; expected {wanted}, which stands there; make both layers "
            f"with γ and β, or both without."
        )
    if value.shape != shape_of(old):
        raise ValueError(
            f"{where}: got shape {value.shape} from {theirs!r}; expected {shape_of(old)}; map the layer elsewhere."
        )
    return (
        value if field == "count" else as_ours(f"{form.argument}[{theirs!r}]", as_numpy(where, value), old, tree, place)
    )


def as_ours(source: str, array: np.ndarray, like: Any, tree: str, place: str) -> Any:
    """In the dtype of the place, if that changes no number."""
    narrow = _exact(array, like.dtype)
    if narrow is None:
        raise TypeError(
            f"{source}: got dtype {array.dtype}, numbers that {label(tree, place)} of dtype {like.dtype} would round; "
            f"expected {like.dtype}; convert it with astype, or make params of a wider dtype."
        )
    return as_jax(source, narrow)


def _exact(array, dtype):
    with np.errstate(over="ignore"):
        other = array.astype(dtype)
    return other if np.array_equal(other.astype(array.dtype), array) else None


def as_theirs(form: Format, name: str, array: Any, entry: Entry | None, origin: str, dtype: Any) -> Any:
    """An array in the shape and dtype that the foreign tree has for it."""
    array = as_numpy(origin, array)
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    if entry is not None:
        shape = shape_of(entry.value) or ()
        if array.size != np.prod(shape):
            raise ValueError(
                f"{entry.label}: got shape {shape}; expected {array.shape}, from {origin}; map it elsewhere."
            )
        array = array.reshape(shape)
    if floats and dtype is not None:
        array = array.astype(dtype)
    elif floats and entry is not None:
        wanted = jnp.dtype(str(getattr(entry.value, "dtype", array.dtype)).removeprefix("torch."))
        narrow = _exact(array, wanted)
        if narrow is None:
            raise TypeError(
                f"{entry.label}: got dtype {wanted}, which would round the numbers of {origin}, {array.dtype}; "
                f"expected {array.dtype}; pass dtype={wanted} to have them rounded."
            )
        array = narrow
    return np.array(array) if form.name in ("torch", "keras") else as_jax(name, np.asarray(array))
