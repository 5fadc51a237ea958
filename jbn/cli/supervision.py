"""A process that is one of several trains in a child, so that its parent can say how that ended.

JAX ends a process from within, with a stack trace, when it hears that another one is gone: nothing in that process
is sure to have the last word.
"""

import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import fields
from subprocess import PIPE

from jbn.cli.bad_input import BadInput
from jbn.cli.child import start
from jbn.cli.interrupt import signal_seen
from jbn.cli.options import TrainOptions
from jbn.cli.parsers import dashed

__all__ = ["AGAIN", "has_met", "is_child", "never_met", "watched"]

AGAIN = "expected all of them to stay to the end; start them all again, with the same options."
_CHILD = "JBN_CHILD"  # a variable of the child's
_MET = "jbn: met\n"


def watched(options: TrainOptions) -> int:
    """Trains in a child, and returns its exit code.

    The child's stderr comes through this process: lines of the command line's own at once, all else at the end, and
    only where it is not what JAX says of processes that are not there, which is one line here.
    """
    columns = str(shutil.get_terminal_size().columns)  # only its stdout is a terminal, and not the one to be asked
    child = start(
        ["-m", "jbn_command", "train", *_typed(options)],
        {_CHILD: "1", "COLUMNS": columns},
        stderr=PIPE,
        encoding=sys.stderr.encoding,
        errors="replace",
    )
    met, own, others, code = False, "", "", None
    while code is None:
        try:
            for line in child.stderr or ():
                if line.endswith(_MET):
                    met = True
                elif line.startswith("jbn: "):
                    own += line
                    _pass_on(line)
                else:
                    others += line
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal((signal_seen() or signal.SIGINT) if os.name == "posix" else signal.SIGTERM)
    if signal_seen() and code in (1, -(signal_seen() or 0)):  # it came before the child could hear it
        raise KeyboardInterrupt
    if code in (0, 1) or (code < 0 and met and "coordination service" not in others):
        _pass_on(others)
    if code >= 0 or AGAIN in own:
        return code if code >= 0 else 2
    if not met:
        raise BadInput(never_met(options))
    name = signal.Signals(-code).name
    why = ", as JAX does where another one is gone" if name == "SIGABRT" else ""
    raise BadInput(
        f"--process-id: got process {options.process_id} of {options.num_processes} ended by {name}{why}; {AGAIN}"
    )


def _pass_on(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _typed(options: TrainOptions) -> list[str]:
    """The options, as they are typed."""
    typed = []
    for declared in fields(options):
        name, value = declared.name, getattr(options, declared.name)
        if declared.metadata["parse"] is None:
            typed.append(dashed(name if value else f"no_{name}"))
        elif value is not None:
            typed.append(f"{dashed(name)}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return typed


def never_met(options: TrainOptions) -> str:
    """What is wrong where the processes have not found each other."""
    return (
        f"--coordinator: got {options.coordinator}, where process {options.process_id} did not meet all "
        f"{options.num_processes} processes within {options.timeout} s; expected an address of process 0 with a free "
        f"port, and each --process-id once; check it, and start all of them within --timeout."
    )


def is_child() -> bool:
    """Whether this is the child. It ends with its parent, and keeps to itself what is not printed by Python."""
    if _CHILD not in os.environ:
        return False

    def end_with_parent() -> None:
        os.read(0, 1)  # nobody writes there: it returns at the end of the file
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Gloo reports its connections on stdout, where a JSON document belongs.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def has_met() -> None:
    """Tells the parent that all processes are there."""
    if _CHILD in os.environ:
        _pass_on(_MET)
