"""The devices of a run: a mesh of one axis, each batch split over it, all else alike on every device."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jbn.cli.bad_input import BadInput

__all__ = ["axis_of", "local", "make_cpu_devices", "mesh_of", "over_devices", "replicated", "split"]

_AXIS = "data"
_CPU_DEVICES = 64  # threads for each; JAX does not start with a thousand


def make_cpu_devices(devices: int) -> None:
    """Lets a CPU be so many devices, if JAX has not started yet."""
    if devices > 1:
        with contextlib.suppress(RuntimeError):  # what JAX says once it has started
            jax.config.update("jax_num_cpu_devices", min(devices, _CPU_DEVICES))


def mesh_of(devices: int) -> Mesh:
    """The first so many devices of every process."""
    own: dict[int, list[Any]] = {}
    for device in jax.devices():
        own.setdefault(device.process_index, []).append(device)
    fewest = min(map(len, own.values()))
    if devices > fewest:
        raise BadInput(
            f"--devices: got {devices}; expected at most {fewest}, as many as there are of {jax.default_backend()}; "
            f"pass --devices {fewest}."
        )
    chosen = [device for process in sorted(own) for device in own[process][:devices]]
    return Mesh(np.array(chosen), (_AXIS,), axis_types=(AxisType.Auto,))


def axis_of(mesh: Mesh) -> str | None:
    """The name to synchronize over; None for one device, where XLA:CPU would keep the collectives and their cost."""
    return None if mesh.size == 1 else _AXIS


def split(values: np.ndarray, rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """``values[rows]`` for rows (steps, batch), the batch split over the mesh; a process touches its share alone."""

    def share(index: Any) -> np.ndarray:
        return values[rows[index[:2]]]

    shape = (*rows.shape, *values.shape[1:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, _AXIS)), share)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The arrays, which every process holds alike, on every device."""

    def everywhere(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, P()), lambda index: leaf[index])

    return jax.tree.map(everywhere, tree)


def local(tree: Any) -> Any:
    """This process's own copy of arrays that are the same on every device."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def over_devices(call: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``call(state, x, y, count)`` with x and y as `split` makes them, and all else alike on every device."""
    if axis_of(mesh) is None:
        return call
    return jax.shard_map(call, mesh=mesh, in_specs=(P(), P(None, _AXIS), P(None, _AXIS), P()), out_specs=P())
