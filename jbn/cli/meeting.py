"""Where processes meet before JAX connects them: all are there, with the same options, or each says what is wrong.

JAX ends a process with a stack trace when another one does not turn up, and waits for ever on one that was
told something else. So process 0 listens at the address first, by itself; each of the others says who it is;
and when all have come, or it is too late, they are told.
"""

import json
import os
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

import jax

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.options import TrainOptions

__all__ = ["meet"]

# What may differ between the processes of a run.
_OWN = ("process_id", "data", "out", "timeout")
_PAUSE_S = 0.2
# A stranger at the port has so long to say something.
_PATIENCE_S = 2.0


def meet(options: TrainOptions) -> None:
    """Returns when all processes have turned up at the coordinator's address, within ``options.timeout``."""
    host, _, port = str(options.coordinator).rpartition(":")
    address = host.strip("[]"), int(port)
    deadline = time.monotonic() + options.timeout
    if options.process_id == 0:
        _receive(options, address, deadline)
    else:
        _report(options, address, deadline)


def _hello(options: TrainOptions) -> dict[str, Any]:
    """What a process says of itself."""
    alike = {name: value for name, value in asdict(options).items() if name not in _OWN}
    versions = {"jbn": jbn.__version__, "jax": jax.__version__}
    said = {"process": options.process_id, "options": alike, "versions": versions}
    return json.loads(json.dumps(said, default=str))  # paths


def _receive(options: TrainOptions, address: tuple[str, int], deadline: float) -> None:
    """Process 0: hears the others, and answers all of them alike."""
    own = _hello(options)
    waiting: list[tuple[int, socket.socket]] = []
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(options, address))
        error = ""
        while not error and len(waiting) < (options.num_processes or 1) - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                error = _missing(options, {process for process, _ in waiting})
                break
            connection.settimeout(_PATIENCE_S)
            with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger
                other = json.loads(connection.makefile("r", encoding="utf-8").readline())
                error = _difference(own, other, {process for process, _ in waiting})
                waiting.append((other["process"], connection))
        for _, connection in waiting:
            with suppress(OSError):
                connection.sendall(json.dumps({"error": error}).encode() + b"\n")
    if error:
        raise BadInput(error)


def _listen(options: TrainOptions, address: tuple[str, int]) -> socket.socket:
    """A socket at the port, which the address must lead to."""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", address[1]), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise BadInput(
            f"--coordinator: got {options.coordinator}, where process 0 cannot listen "
            f"({os.strerror(error.errno or 0)}); expected a free port of this machine; choose another."
        ) from None
    try:
        socket.create_connection(address, timeout=options.timeout).close()
    except OSError as error:
        listener.close()
        raise BadInput(
            f"--coordinator: got {options.coordinator}, which does not lead to process 0 ({error.strerror or error}); "
            f"expected an address of this machine; give the one that the others reach it by."
        ) from None
    return listener


def _missing(options: TrainOptions, come: set[int]) -> str:
    absent = [str(process) for process in range(1, options.num_processes or 1) if process not in come]
    return (
        f"--num-processes: got {len(come) + 1} of {options.num_processes} processes within {options.timeout} s, "
        f"none with --process-id {', '.join(absent)}; expected all of them; start all within --timeout."
    )


def _difference(own: dict[str, Any], other: dict[str, Any], come: set[int]) -> str:
    """What of another process does not fit this one; nothing if all is well."""
    process = other["process"]
    if process == 0 or process in come:
        return f"--process-id: got {process} twice; expected it once; give each process a number of its own."
    for kind in ("options", "versions"):
        for name in own[kind]:
            mine, its = own[kind][name], other[kind].get(name)
            if mine != its:
                shown = f"--{name.replace('_', '-')}" if kind == "options" else name
                return (
                    f"{shown}: got {its} in process {process}; expected {mine}, as in process 0; "
                    f"start all processes alike."
                )
    return ""


def _report(options: TrainOptions, address: tuple[str, int], deadline: float) -> None:
    """The others: say who they are, and hear whether all is well."""
    told: str | None = None
    reason = "no answer"
    while told is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic())) as connection:
                connection.sendall(json.dumps(_hello(options)).encode() + b"\n")
                connection.settimeout(options.timeout + _PATIENCE_S)
                line = connection.makefile("r", encoding="utf-8").readline()
                told = json.loads(line)["error"] if line else None
        except socket.gaierror as error:
            reason, deadline = str(error.strerror), 0.0
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "no answer"
        if told is None:
            time.sleep(min(_PAUSE_S, max(0.0, deadline - time.monotonic())))
    if told is None:
        raise BadInput(
            f"--coordinator: got {options.coordinator}, where no process 0 answered within {options.timeout} s "
            f"({reason}); expected the address that process 0 listens at; start it, or check the address."
        )
    if told:
        raise BadInput(told)
