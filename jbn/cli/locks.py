"""Locks that the operating system gives back when the process that holds them ends, however it ends."""

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is kept out
    fcntl = None  # type: ignore[assignment]

__all__ = ["take"]


def take(file: Path) -> int | None:
    """Locks a file, which is made if need be: a descriptor to close when done, or None if another one holds it."""
    held = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(held)
            return None
        # Any other error says that this file system has no locks.
    return held
