"""Ctrl-C, SIGTERM and SIGHUP, none of which is lost."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["check", "hear_again", "heard", "signal_seen"]

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_seen: list[int] = []
_AGAIN = 0.05  # s


@contextmanager
def heard() -> Iterator[None]:
    """Makes each of the signals a KeyboardInterrupt, for the time of the block.

    Python drops an exception that comes up inside a callback of its garbage collector, and JAX has one that runs
    often: then the signal is sent once more. Python lets only the main thread have handlers; one that the caller set
    stays, and what is ignored is ignored.
    """

    def on_signal(number, frame):
        _seen.append(number)
        raise KeyboardInterrupt

    def on_unraisable(dropped):
        if _seen and isinstance(dropped.exc_value, KeyboardInterrupt):
            again.append(threading.Timer(_AGAIN, os.kill, (os.getpid(), _seen[-1])))
            again[-1].daemon = True
            again[-1].start()
        else:
            hook(dropped)

    before: dict[int, Any] = {}
    again: list[threading.Timer] = []
    if threading.current_thread() is threading.main_thread():
        standard = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: old for number in _NUMBERS if (old := signal.getsignal(number)) in standard}
    for number in before:
        signal.signal(number, on_signal)
    hook, sys.unraisablehook = sys.unraisablehook, on_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in again:
            timer.cancel()
        for number, old in before.items():
            signal.signal(number, old)
        _seen.clear()


def hear_again() -> None:
    """Puts the handlers back where somebody else has taken a signal, as the preemption service of JAX takes SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in _NUMBERS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def check() -> None:
    """Raises KeyboardInterrupt if there was a signal whose exception somebody has caught and dropped."""
    if _seen:
        raise KeyboardInterrupt


def signal_seen() -> int | None:
    """The last signal, if there was one."""
    return _seen[-1] if _seen else None
