"""How arrays are split over an explicit mesh, and how one is laid out as another.

`jax.make_mesh` makes explicit meshes by default: there the type of an array says which axes of the mesh each of
its own axes is split over, and JAX refuses to select between, stack or branch on arrays that are split in
different ways. Everywhere else (one device, automatic meshes, inside `shard_map`) no axis is split by its type,
and these functions return what they were given.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Spec = tuple[Any, ...]  # for each axis of an array: the mesh axis it is split over, a tuple of them, or None

__all__ = [
    "Spec",
    "broadcast_like",
    "cut",
    "filled_like",
    "for_product",
    "is_copied",
    "laid_out_like",
    "parts_along",
    "reshaped",
    "sharding_of",
    "spec_of",
    "with_spec",
]


def spec_of(x: Any) -> Spec:
    """Which axes of an explicit mesh each axis of ``x`` is split over, by its type."""
    return tuple(jax.typeof(x).sharding.spec)


def with_spec(x: jax.Array, spec: Iterable[Any], *, mesh_of: Any = None) -> jax.Array:
    """``x`` split as ``spec`` says; the mesh is that of ``x`` or, where it is on none, of ``mesh_of``."""
    spec, mesh = tuple(spec), _mesh(x, mesh_of)
    if not _is_explicit(mesh):
        return x
    if not _is_explicit(_mesh(x)):  # placed whole first, so that its cotangent comes back whole
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x if spec_of(x) == spec else jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def laid_out_like(x: jax.Array, example: Any) -> jax.Array:
    """``x`` split over the mesh as ``example``, an array of the same shape, is."""
    return with_spec(x, spec_of(example), mesh_of=example)


def filled_like(example: jax.Array, value: Any, dtype: Any = None) -> jax.Array:
    """An array of one value, in the shape, the dtype unless given, and the layout of ``example``.

    `jax.numpy.full_like` alone leaves the layout out.
    """
    return laid_out_like(jnp.full_like(example, value, dtype=dtype), example)


def broadcast_like(v: jax.Array, example: jax.Array) -> jax.Array:
    """``v``, whose axes have size 1 or that of ``example``'s, in the shape and the layout of ``example``.

    `jax.numpy.broadcast_to` gives every device the whole of what it makes, and so the whole of its cotangent.
    """
    spec = spec_of(example)
    entries = [e if n == m else None for e, n, m in zip(spec, v.shape, example.shape, strict=True)]
    v = with_spec(v, entries, mesh_of=example)
    return lax.broadcast_in_dim(v, example.shape, range(v.ndim), out_sharding=sharding_of(example, spec))


def parts_along(x: Any, axis: int) -> int:
    """How many parts an axis of ``x`` is split into."""
    return math.prod(_mesh(x).shape[name] for name in _names(spec_of(x)[axis]))


def is_copied(x: Any) -> bool:
    """Whether several devices of an explicit mesh hold the same part of ``x``, since an axis of it splits nothing."""
    mesh, used = _mesh(x), _names(*spec_of(x))
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return any(kind is AxisType.Explicit and mesh.shape[name] > 1 and name not in used for name, kind in kinds)


def reshaped(x: jax.Array, shape: tuple[int, ...], spec: Iterable[Any]) -> jax.Array:
    """``x`` in another shape, split as ``spec`` says."""
    return lax.reshape(x, shape, out_sharding=sharding_of(x, spec))


def for_product(a: jax.Array, W: jax.Array) -> tuple[jax.Array, jax.Array, Spec]:
    """``a`` and ``W`` laid out so that a may be multiplied by W, and how what comes of it is split.

    Their sum runs over the last axis of ``a`` and the last but one of ``W``: where it is split in ``a`` it is split in
    ``W`` alike. The outputs, the last axis of ``W``, stay split over a mesh axis that ``a`` does not use, and are
    gathered otherwise. The result has the leading axes of ``a`` and the outputs.
    """
    a = with_spec(a, spec_of(a), mesh_of=W)
    *leading, inputs = spec_of(a)
    outputs = spec_of(W)[-1]
    if not _names(outputs).isdisjoint(_names(*leading, inputs)):
        outputs = None
    W = with_spec(W, (*[None] * (W.ndim - 2), inputs, outputs), mesh_of=a)
    return a, W, (*leading, outputs)


def sharding_of(x: jax.Array, spec: Iterable[Any]) -> NamedSharding | None:
    """The ``out_sharding`` of an operation on ``x`` whose result is split as ``spec`` says."""
    mesh = _mesh(x)
    return NamedSharding(mesh, PartitionSpec(*spec)) if _is_explicit(mesh) else None


def _names(*entries: Any) -> set[Any]:
    """The mesh axes that entries of a spec speak of."""
    return {n for e in entries if e is not None for n in (e if isinstance(e, tuple) else (e,))}


def cut(x: jax.Array, blocks: Any, size: Any, *, between: bool) -> jax.Array:
    """(blocks, size, …): the leading axis in blocks, split over an explicit mesh as before.

    It is split ``between`` blocks if that is wanted and their number allows it, else within them, else not at all.
    """
    parts = parts_along(x, 0)
    entry, *rest = spec_of(x)
    between = between and (parts == 1 or blocks % parts == 0)
    leading = (entry, None) if between else (None, entry if size % parts == 0 else None)
    return reshaped(x, (blocks, size, *x.shape[1:]), (*leading, *rest))


def _mesh(*arrays: Any) -> Any:
    """The explicit mesh of the first array that is on one; any mesh where none is."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays if array is not None]
    return next(filter(_is_explicit, meshes), meshes[0])


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types
