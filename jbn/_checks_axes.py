"""What is static about the axes of a call: features, named axes, groups, blocks; parsed, or refused in one line."""

import math
from collections.abc import Hashable, Iterable
from typing import Any

from jbn._checks import as_int, as_ints, as_size, as_tuple, refuse_traced

__all__ = [
    "as_axes",
    "as_ghost_size",
    "as_groups",
    "as_names",
    "as_stack_axis",
    "check_groups",
    "refuse_one_value",
]


def as_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Feature axes as an ascending tuple of non-negative ints."""
    wanted = "expected an int or a tuple of ints; name the feature axes, as in axis=-1."
    axes = as_ints("axis", axis, wanted, as_tuple(axis))
    if not axes:
        raise ValueError("axis: got (); expected at least one feature axis; pass axis=-1 for channels last.")
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis: got {a}; expected {-ndim} ≤ axis < {ndim} for x of rank {ndim}; name feature axes that x has."
            )
    canonical = tuple(sorted(a % ndim for a in axes))
    if len(set(canonical)) != len(canonical):
        raise ValueError(f"axis: got {axis!r}; expected distinct axes; name each feature axis once.")
    return canonical


def as_stack_axis(axis: Any) -> int | None:
    """None, or the axis along which statistics are stacked."""
    wanted = "expected None or an int; pass axis=0 where each argument is a stack."
    return None if axis is None else as_int("axis", axis, wanted)


def as_names(axis_name: Any) -> tuple[Hashable, ...]:
    """Mesh or vmap axis names as a tuple; () for None."""
    if axis_name is None:
        return ()
    names = as_tuple(axis_name)
    for name in names:
        refuse_traced("axis_name", name)
        if not isinstance(name, Hashable):
            raise TypeError(
                f"axis_name: got {axis_name!r}; expected an axis name or a tuple of them; "
                f"pass the name that shard_map, pmap or vmap binds."
            )
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name: got {axis_name!r}; expected distinct names; name each axis once.")
    return names


def as_groups(groups: Any, names: tuple[Hashable, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Groups of indices along one named axis, as a tuple of tuples; whether they cover it, `check_groups` says."""
    refuse_traced("axis_index_groups", groups)
    if groups is None:
        return None
    if len(names) != 1:
        raise ValueError(
            f"axis_index_groups: got groups with {len(names)} axis names; expected one name; "
            f"pass axis_name, or name the axis of a mesh whose devices are to be synchronized."
        )
    wanted = "expected a tuple of tuples of ints; as in ((0, 1), (2, 3))."
    rows = tuple(groups) if isinstance(groups, Iterable) else (groups,)
    return tuple(as_ints("axis_index_groups", groups, wanted, row) for row in rows)


def check_groups(groups: tuple[tuple[int, ...], ...] | None, devices: int) -> None:
    """Each index along the axis is in one group."""
    if groups is not None and sorted(i for group in groups for i in group) != list(range(devices)):
        raise ValueError(
            f"axis_index_groups: got {groups}; expected each of the indices 0 to {devices - 1} in one group; "
            f"name every index once."
        )


def as_ghost_size(ghost_size: Any, axes: tuple[int, ...]) -> int | None:
    """The number of examples in a block; whether it divides the batch, `refuse_one_value` says."""
    if ghost_size is None:
        return None
    size = as_size("ghost_size", ghost_size, "pass the number of examples in a block")
    if 0 in axes:
        raise ValueError(
            f"ghost_size: got {size} with feature axis 0; expected the leading axis to be the batch; "
            f"move the features to another axis."
        )
    return size


def refuse_one_value(
    shape: tuple[int, ...],
    reduce_axes: tuple[int, ...],
    devices: int,
    groups: tuple[tuple[int, ...], ...] | None,
    ghost_size: int | None,
) -> None:
    """Training on one value per channel is an error: its variance is 0 and its output β."""
    per_device = math.prod(shape[a] for a in reduce_axes)
    if ghost_size is not None:
        examples = shape[0]
        if examples % ghost_size:
            known = range(1, examples + 1) if isinstance(examples, int) else ()  # an exported size may be open
            divisors = ", ".join(str(n) for n in known if examples % n == 0) or "its divisors"
            raise ValueError(
                f"ghost_size: got {ghost_size}; expected a divisor of the batch of {examples}; use one of {divisors}."
            )
        if examples and per_device // examples * ghost_size == 1:
            raise ValueError(
                f"ghost_size: got {ghost_size} for x of shape {shape}, one value per channel in a block; expected at "
                f"least 2, since the variance of one is 0; use a larger ghost_size, or pass train=False."
            )
        return
    if groups is not None:
        devices = min(map(len, groups))
    if per_device * devices == 1:
        raise ValueError(
            f"x: got shape {shape}, one value per channel; expected at least 2 in training, since the variance "
            f"of one is 0; use a larger batch, synchronize over devices with axis_name, or pass train=False."
        )
