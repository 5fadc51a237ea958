"""Ctrl-C, SIGTERM and SIGHUP, none of which is lost."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["check", "heard", "signal_seen"]

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_seen: list[int] = []


@contextmanager
def heard() -> Iterator[None]:
    """Makes each of the signals a KeyboardInterrupt, for the time of the block.

    Python lets only the main thread have handlers; one that the caller set stays, and so does one who ignores them.
    """

    def on_signal(number, frame):
        _seen.append(number)
        raise KeyboardInterrupt

    def on_unraisable(dropped):
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)

    before = {}
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
        for number, old in before.items():
            signal.signal(number, old)
        _seen.clear()


def check() -> None:
    """Raises KeyboardInterrupt if there was a signal that got no further.

    Python drops an exception that comes up inside a callback of its garbage collector, and JAX has one that runs
    often: without a second look a Ctrl-C that falls there would do nothing.
    """
    if _seen:
        raise KeyboardInterrupt


def signal_seen() -> int:
    """The signal behind a KeyboardInterrupt."""
    return _seen[-1] if _seen else signal.SIGINT
