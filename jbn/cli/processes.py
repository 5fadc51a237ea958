"""Several processes that train as one: how they meet, agree on errors, and hear that one of them is gone."""

import atexit
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.interrupt import hear_again
from jbn.cli.options import TrainOptions
from jbn.cli.parsers import dashed
from jbn.cli.supervision import AGAIN, has_met, never_met

__all__ = ["agreed", "first", "joined", "same"]

# A process that is silent for so many seconds counts as gone, also where no broken connection says so.
_HEARTBEAT_S = 20
_BYTES = 4096  # of what a process tells the others
_GONE = re.compile("gloo|nccl|coordination service|connection|socket|heartbeat|unavailable", re.IGNORECASE)


def first() -> bool:
    """Whether this process is the one that shows and writes what comes out."""
    return jax.process_index() == 0


@contextmanager
def joined(options: TrainOptions) -> Iterator[None]:
    """Makes this process one of several, if it is to be; what is done inside is done by all of them."""
    if options.coordinator is None:
        yield
        return
    try:
        _connect(options)
        yield
        jax.distributed.shutdown()
    except Exception as error:
        gone = not isinstance(error, BadInput) and _GONE.search(str(error))
        _leave_at_exit(2 if gone or isinstance(error, BadInput) else 1)
        if not gone:
            raise
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1].rstrip(". ")
        raise BadInput(
            f"--process-id: got process {options.process_id} of {options.num_processes} cut off from the others "
            f"({reason}); {AGAIN}"
        ) from None


def _connect(options: TrainOptions) -> None:
    """Meets the other processes. Where that fails JAX may end this one, with a stack trace."""
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=options.timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_HEARTBEAT_S,
        )
    except Exception:  # of the kinds that a bad address and a port in use have
        raise BadInput(never_met(options)) from None
    finally:
        hear_again()
    has_met()
    _compare(options)


def _compare(options: TrainOptions) -> None:
    """Refuses processes that were not told the same."""
    alike = {dashed(each.name): getattr(options, each.name) for each in fields(options) if not each.metadata["own"]}
    alike |= {"jbn": jbn.__version__, "jax": jax.__version__}
    expected, *others = (json.loads(text) for text in _told(json.dumps(alike, default=str)))
    for process, other in enumerate(others, 1):
        for name, value in expected.items():
            if other[name] != value:
                jax.distributed.shutdown()
                raise BadInput(
                    f"{name}: got {other[name]} in process {process}; expected {value}, as in process 0; "
                    f"start all processes alike."
                )


def _leave_at_exit(code: int) -> None:
    """Ends without JAX's goodbye to the other processes, which waits for them, where they have not agreed to end."""

    def leave() -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    if jax.distributed.is_initialized():
        atexit.register(leave)


@contextmanager
def agreed() -> Iterator[None]:
    """Makes bad input of one process that of all: each raises what the first of them found."""
    found = ""
    try:
        yield
    except BadInput as error:
        found = str(error)
    for text in _told(found):
        if text:
            jax.distributed.shutdown()
            raise BadInput(text)


def same(what: str, value: Any) -> None:
    """Refuses a run whose processes do not all have the same value."""
    with agreed():
        own, *_ = values = _told(str(value))
        for process, other in enumerate(values):
            if other != own:
                raise BadInput(
                    f"{what}: got something else in process {process} than in process 0; expected the same everywhere; "
                    f"give all processes the same."
                )


def _told(text: str) -> list[str]:
    """What each process says, as every one of them hears it."""
    processes = jax.process_count()
    if processes == 1:
        return [text]
    one_each = {device.process_index: device for device in reversed(jax.devices())}
    devices = np.array([one_each[process] for process in range(processes)])
    mesh = Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
    said = text.encode()[:_BYTES].ljust(_BYTES)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("process")), np.frombuffer(said, np.uint8)[None], (processes, _BYTES)
    )
    heard = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, P()))(rows)
    return [bytes(row).decode(errors="ignore").rstrip() for row in np.asarray(heard.addressable_data(0))]
