"""Ctrl-C that is not lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["interrupts"]


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Gives ``check()``, which raises KeyboardInterrupt if there was a Ctrl-C that got no further.

    Python drops an exception that comes up inside a callback of its garbage collector, and JAX has one
    that runs often: without a second look a Ctrl-C that falls there would do nothing.
    """
    seen = threading.Event()

    def on_signal(number, frame):
        seen.set()
        raise KeyboardInterrupt

    def check() -> None:
        if seen.is_set():
            raise KeyboardInterrupt

    # Python lets only the main thread have handlers; one that the caller set stays.
    standard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not standard or threading.current_thread() is not threading.main_thread():
        yield check
        return
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
