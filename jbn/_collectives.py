"""Named axes, one at a time or several: gather, sum, groups.

A name is bound by `jax.shard_map`, `jax.pmap` or `jax.vmap`, and several of them may be mixed and nested in any
order. What differs between them is known here and nowhere else: inside a *checked* `shard_map` the type of an array
says along which mesh axes it varies, and collectives come in a form whose result is known to be the same
everywhere; an unchecked `shard_map` and `pmap` know a mesh but no such types; a `vmap` knows neither.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Names = tuple[Any, ...]
Groups = tuple[tuple[int, ...], ...]

__all__ = [
    "Groups",
    "Names",
    "as_device_share",
    "as_varying",
    "axis_total",
    "gather",
    "gather_group",
    "is_common",
    "mean_gradient",
    "on_mesh",
    "sum_over",
    "varying_axes",
]


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes along which ``x`` varies, by its type; empty outside a checked ``shard_map``."""
    return jax.typeof(x).manual_axis_type.varying


def as_varying(x: jax.Array, names: Any) -> jax.Array:
    """``x`` typed as varying along those ``names`` along which it is not yet."""
    missing = tuple(name for name in names if name not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def as_device_share(x: jax.Array, names: Names) -> jax.Array:
    """``x`` as one device's share along the named axes, also where it is the same on all of them."""
    return as_varying(x, _checked(names))


def is_common(x: Any, names: Names) -> bool:
    """Whether the type of ``x`` proves that it is the same on all devices along the named axes."""
    return _checked(names) == names and varying_axes(x).isdisjoint(names)


def on_mesh(names: Names) -> bool:
    """Whether all names are axes of a mesh (of ``shard_map`` or ``pmap``), none of a ``vmap``."""
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def _checked(names: Names) -> Names:
    """Those of the ``names`` that a checked ``shard_map`` binds."""
    return tuple(name for name in names if name in varying_axes(lax.axis_index(name)))


def _together(names: Names) -> list[Names]:
    """The names in runs, each for one collective: those of a mesh together, those of ``vmap`` one by one.

    JAX's collectives over several names of ``vmap``, or over those of ``vmap`` and of a mesh at once, fail or give
    results in another order (jax 0.10 to 0.12; ``tests/collectives/test_named_axes.py`` nests them in every order).
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    checked = _checked(tuple(manual))
    members = [(name,) for name in names if name not in manual]
    if checked and members:
        shown = names[0] if len(names) == 1 else names
        raise ValueError(
            f"axis_name: got {shown!r} inside a shard_map that checks types, where JAX refuses collectives over the "
            f"name of a vmap; expected names of its mesh; pass check_vma=False to jax.shard_map."
        )
    unchecked = tuple(name for name in names if name in manual and name not in checked)
    return [run for run in (*members, unchecked, tuple(name for name in names if name in checked)) if run]


def axis_total(names: Names) -> int:
    """How many devices (or batch members) the named axes hold together."""
    try:
        return math.prod(lax.axis_size(name) for name in names)
    except NameError:
        shown = names[0] if len(names) == 1 else names
        raise ValueError(
            f"axis_name: got {shown!r}, which is not bound here; expected the name of an enclosing axis; "
            f"call inside shard_map, pmap or vmap with that axis_name, or leave it out."
        ) from None


def gather(x: jax.Array, names: Names) -> jax.Array:
    """(D, …) the ``x`` of every device along the named axes, typed as the same everywhere if that can be."""
    shape = x.shape
    for run in _together(names):
        checked = _checked(run) == run
        x = lax.all_gather(as_varying(x, run), run, to="invarying") if checked else lax.all_gather(x, run)
    return lax.reshape(x, (math.prod(x.shape[: x.ndim - len(shape)]), *shape))


def gather_group(x: jax.Array, names: Names, groups: Groups) -> tuple[jax.Array, jax.Array]:
    """(D, …) the ``x`` of every device along the named axis, and (D,) which of them are in one group with this one.

    JAX's own collectives refuse groups under ``vmap`` and ``shard_map``; rows can be selected anywhere.
    """
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    number = jnp.array([group_of[index] for index in range(len(group_of))])
    (run,) = _together(names)
    return lax.all_gather(as_device_share(x, run), run), number == number[lax.axis_index(run)]


def sum_over(x: jax.Array, names: Names, groups: Groups | None = None) -> jax.Array:
    """The sum over all devices along the named axes, or over those in one group with this one."""
    if groups is not None:
        rows, mine = gather_group(x, names, groups)
        return jnp.sum(jnp.where(lax.expand_dims(mine, range(1, rows.ndim)), rows, 0), 0)
    for run in _together(names):
        x = lax.psum(x, run)
    return x


def mean_gradient(gradients: Any, names: Names) -> Any:
    """The gradient of a mean loss over the named axes, from each device's share of it.

    In a checked ``shard_map`` the derivative of a mean over D devices reaches each of them as 1/D, so that the
    shares are summed. ``pmap``, ``vmap`` and an unchecked ``shard_map`` transpose a sum to a sum: there it reaches
    each as 1, and the shares are averaged.
    """
    for run in _together(names):
        gradients = lax.psum(gradients, run) if _checked(run) == run else lax.pmean(gradients, run)
    return gradients
