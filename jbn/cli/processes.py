"""Several processes that train as one: how they meet, agree on errors, and end when one of them is gone."""

import atexit
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.interrupt import hear_again, signal_seen
from jbn.cli.options import TrainOptions
from jbn.cli.parsers import dashed

__all__ = ["agreed", "first", "joined", "same", "supervised"]

# A process that is silent for so many seconds counts as gone, also where no broken connection says so.
_HEARTBEAT_S = 20
_BYTES = 4096  # of what a process tells the others
_GONE = re.compile("gloo|nccl|coordination service|connection|socket|heartbeat|unavailable", re.IGNORECASE)
_MET = "met\n"
_AGAIN = "expected all of them to stay to the end; start them all again, with the same options."


def first() -> bool:
    """Whether this process is the one that shows and writes what comes out."""
    return jax.process_index() == 0


# To whom a child speaks.
_parent: socket.socket | None = None


class _Gone(BadInput):
    """Another process is not there any more."""


def supervised(options: TrainOptions, job: Callable[[], int | None]) -> int | None:
    """Runs the job in a child where it is one of several processes, so that its parent can say how it ended.

    Returns the child's exit code, in the parent.

    JAX ends a process from within, with a stack trace, when it hears that another one is gone: nothing in that
    process is sure to have the last word.
    """
    if options.coordinator is None or not hasattr(os, "fork"):
        return job()
    sys.stdout.flush()
    sys.stderr.flush()
    own, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        own.close()
        _as_child(its)
        try:
            return job()
        except _Gone as error:
            its.sendall(str(error).encode())
            os._exit(2)
    its.close()
    code = _wait(child)
    said = own.makefile().read()
    if said.removeprefix(_MET):
        raise BadInput(said.removeprefix(_MET))
    if code >= 0:
        return code
    if not said:
        raise BadInput(_never_met(options))
    name = signal.Signals(-code).name
    why = ", as JAX does where another one is gone" if name == "SIGABRT" else ""
    raise BadInput(
        f"--process-id: got process {options.process_id} of {options.num_processes} ended by {name}{why}; {_AGAIN}"
    )


def _never_met(options: TrainOptions) -> str:
    return (
        f"--coordinator: got {options.coordinator}, where process {options.process_id} did not meet all "
        f"{options.num_processes} processes within {options.timeout} s; expected an address of process 0 with a free "
        f"port, and each --process-id once; check it, and start all of them within --timeout."
    )


def _as_child(parent: socket.socket) -> None:
    """Ends with its parent, hears Ctrl-C from it alone, and keeps to itself what is not printed by Python."""

    def end_with_parent() -> None:
        with suppress(OSError):
            parent.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.setpgid(0, 0)
    printed = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    # Gloo reports its connections on stdout, where a JSON document belongs.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = printed
    global _parent
    _parent = parent


def _wait(child: int) -> int:
    """The exit code of the child; negative for a signal."""
    while True:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except KeyboardInterrupt:
            os.kill(child, signal_seen() or signal.SIGINT)


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
        if not isinstance(error, BadInput) and _GONE.search(str(error)):
            reason = str(error).splitlines()[0].rsplit("] ", 1)[-1].rstrip(". ")
            raise _Gone(
                f"--process-id: got process {options.process_id} of {options.num_processes} cut off from the others "
                f"({reason}); {_AGAIN}"
            ) from None
        _leave_at_exit(2 if isinstance(error, BadInput) else 1)
        raise


def _connect(options: TrainOptions) -> None:
    """Meets the other processes. Where that fails JAX may end this one, with a stack trace that is kept back."""
    sys.stderr.flush()
    shown = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
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
        raise BadInput(_never_met(options)) from None
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        hear_again()
    if _parent is not None:
        _parent.sendall(_MET.encode())
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
