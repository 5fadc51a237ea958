"""What is printed goes where the user wants it, in any encoding, or one line and the exit code say that it did not."""

import inspect
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["Unprinted", "hush", "make_ready", "printing", "say"]


class Unprinted(Exception):
    """Standard output does not take what is printed; the text says why."""


def make_ready() -> None:
    """Lets stdout and stderr take any text, with escapes for what their encoding lacks, also where they are closed."""
    hush()
    for name, number, mode in (("stdout", 1, os.O_RDONLY), ("stderr", 2, os.O_WRONLY)):
        stream = getattr(sys, name)
        if stream is None:
            # No file that is opened later may get the number. What is printed on stdout fails, as it should.
            null = os.open(os.devnull, mode)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hush() -> None:
    """Keeps Orbax from saying again what it raises, for good, since its threads may still be at work afterwards.

    It logs its errors, and where one of many reads or writes fails, it closes the event loop that the others report to.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def without_echo(dropped: Any) -> None:
        if not (inspect.iscoroutine(dropped.object) or str(dropped.exc_value) == "Event loop is closed"):
            hook(dropped)

    if getattr(hook, "__name__", None) != without_echo.__name__:
        sys.unraisablehook = without_echo


def say(line: str) -> None:
    """A line on stderr, if there is room; in one write, for others may write there too."""
    with suppress(OSError):
        sys.stderr.write(f"jbn: {line}\n")


@contextmanager
def printing() -> Iterator[None]:
    """Around what prints: a full disk or a closed stdout is `Unprinted`, a reader who has left a BrokenPipeError."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unprinted(error.strerror or str(error)) from error
