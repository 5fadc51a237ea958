"""Named axes and barriers: what the arithmetic needs of the machine, and nothing else.

Inside ``shard_map`` each array's type says along which mesh axes it varies, and collectives come in a
form whose result is known to be the same everywhere; ``vmap``, ``pmap`` and unchecked ``shard_map``
know neither. These functions are the one place that tells the two apart.
"""

import math
import operator
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Groups = tuple[tuple[int, ...], ...]

__all__ = [
    "Groups",
    "add",
    "all_gather",
    "axis_total",
    "enter",
    "gather_group",
    "psum",
    "select",
    "separate",
    "sum_after",
    "to_varying",
    "varying_axes",
]


def _barrier(*arrays):
    return lax.optimization_barrier(arrays)


def _identity(*arrays):
    return arrays


def separate(tree: Any) -> Any:
    """The same arrays, as values that XLA:CPU does not merge with other uses of them.

    XLA:CPU pulls a conversion, a subtraction or even a broadcast into a reduction only if that reduction
    is its one user; shared, it is written to memory at full size. Its compiler drops the barrier before
    it fuses, so copies cost nothing there. Elsewhere barriers cost passes: none is emitted. Two calls
    give different values only if their trees hold different arrays.
    """
    arrays, structure = jax.tree.flatten(tree)
    # Older versions of JAX type all results of a barrier alike, so its operands are made alike first.
    varying = frozenset[Any]().union(*map(varying_axes, arrays))
    arrays = [to_varying(array, varying) for array in arrays]
    return jax.tree.unflatten(structure, lax.platform_dependent(*arrays, cpu=_barrier, default=_identity))


def sum_after(first: jax.Array, values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The sum of ``values`` over ``axes``, begun when ``first``, another sum, is done; NaN if that is not finite.

    Kernels that do not depend on each other XLA:CPU runs side by side, with one thread for each. One after the
    other both have all threads: for two sums over x a fifth faster.
    """
    if any(jax.typeof(first).sharding.spec):  # an explicit mesh has no one entry that all devices could read
        return jnp.sum(values, axes)
    return _sum_from(axes)(first, values)


@cache
def _sum_from(axes):
    @jax.custom_batching.custom_vmap
    def total(first, values):
        return lax.reduce(values, 0 * first[(0,) * first.ndim], lax.add, axes)  # XLA does not know that this is 0

    @total.def_vmap
    def batched(size, is_batched, first, values):  # a start of its own for each member is not to be had
        if not is_batched[1]:
            return jnp.sum(values, axes), False
        return jnp.sum(values, tuple(axis + 1 for axis in axes)), True

    return total


@jax.custom_jvp
def select(mask: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` where ``mask`` and elsewhere the finite number next to ``other``, in x's dtype also in memory.

    XLA:CPU does not pull a selection into a reduction: it writes it to memory, and in float32 if it is one of
    narrower floats. One of their bits stays as narrow as x, so that it fits where a result of x's size, the
    output or a gradient, is put later.
    """
    largest = jnp.finfo(x.dtype).max.astype(other.dtype)
    other = jnp.clip(other, -largest, largest).astype(x.dtype)
    return lax.platform_dependent(mask, x, other, cpu=_select_bits, default=jnp.where)


@select.defjvp
def _select_tangent(primals, tangents):
    mask, x, _ = primals
    _, x_dot, other_dot = tangents
    return select(*primals), jnp.where(mask, x_dot, other_dot.astype(x.dtype))


def _select_bits(mask, x, other):
    bits = partial(lax.bitcast_convert_type, new_dtype=f"uint{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(jnp.where(mask, bits(x), bits(other)), x.dtype)


def add(dtype: Any, *terms: jax.Array) -> jax.Array:
    """The sum of the terms, in ``dtype``; on a CPU its transpose reads the cotangent once for each term.

    The transpose of a barrier is a barrier, so behind a different number of them the cotangent comes back
    as a value of its own for each term, and in a narrow dtype each is converted inside the reduction that
    uses it. The price is paid by narrow forward-mode tangents on a CPU: each term is rounded to ``dtype``
    before the sum.
    """
    return lax.platform_dependent(*terms, cpu=partial(_add_apart, dtype), default=partial(_add, dtype))


def _add(dtype, *terms):
    return reduce(operator.add, terms).astype(dtype)


def _add_apart(dtype, *terms):
    apart = []
    for depth, term in enumerate(terms):
        wide, term = term.dtype, term.astype(dtype)
        for _ in range(depth):
            term = lax.optimization_barrier(term)
        apart.append(term.astype(wide))
    return _add(dtype, *apart)


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes along which ``x`` varies, by its type; empty outside a checked ``shard_map``."""
    return jax.typeof(x).manual_axis_type.varying


def to_varying(x: jax.Array, names: Any) -> jax.Array:
    """``x`` typed as varying along those ``names`` along which it is not yet."""
    missing = tuple(name for name in names if name not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def enter(x: jax.Array, names: tuple[Any, ...]) -> jax.Array:
    """``x`` as one device's share along the named axes, also where it is the same on all of them."""
    return to_varying(x, _checked(names))


def _checked(names: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of the ``names`` that a checked ``shard_map`` binds."""
    return tuple(name for name in names if name in varying_axes(lax.axis_index(name)))


def axis_total(names: tuple[Any, ...]) -> int:
    """How many devices (or batch members) the named axes hold together."""
    try:
        return math.prod(lax.axis_size(name) for name in names)
    except NameError:
        shown = names[0] if len(names) == 1 else names
        raise ValueError(
            f"axis_name: got {shown!r}, which is not bound here; expected the name of an enclosing axis; "
            f"call inside shard_map, pmap or vmap with that axis_name, or leave it out."
        ) from None


def all_gather(x: jax.Array, names: tuple[Any, ...]) -> jax.Array:
    """(D, …) the ``x`` of every device along the named axes, typed as the same everywhere if that can be."""
    if _checked(names) == names:
        return lax.all_gather(to_varying(x, names), names, to="invarying")
    return lax.all_gather(x, names)


def gather_group(x: jax.Array, names: tuple[Any, ...], groups: Groups) -> tuple[jax.Array, jax.Array]:
    """(D, …) the ``x`` of every device along the named axis, and (D,) which of them are in one group with this one.

    JAX's own collectives refuse groups under ``vmap`` and ``shard_map``; rows can be selected anywhere.
    """
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    number = jnp.array([group_of[index] for index in range(len(group_of))])
    return lax.all_gather(enter(x, names), names), number == number[lax.axis_index(names)]


def psum(x: jax.Array, names: tuple[Any, ...], groups: Groups | None) -> jax.Array:
    """The sum over all devices along the named axes, or over those in one group with this one."""
    if groups is not None:
        rows, mine = gather_group(x, names, groups)
        return jnp.sum(jnp.where(lax.expand_dims(mine, range(1, rows.ndim)), rows, 0), 0)
    return lax.psum(x, names) if names else x
