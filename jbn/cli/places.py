"""Where results appear: folders and files that are there whole or not at all, and that no two runs share."""

import errno
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jbn.cli.bad_input import BadInput
from jbn.cli.streams import say

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is kept out
    fcntl = None  # type: ignore[assignment]

__all__ = ["Place", "alone_in", "new_file", "new_folder", "replaced_files", "results", "take"]

_STALE = 60.0  # s


@dataclass
class Place:
    """Where results are written, and the folder that this becomes at the end."""

    work: Path
    final: Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes ``folder`` at the end, or vanishes when anything fails."""
    with results(folder) as place:
        yield place.work


@contextmanager
def results(folder: Path, *, numbered: bool = False) -> Iterator[Place]:
    """Gives the `Place` of a new folder, which appears whole at the end, or vanishes when anything fails.

    It is made beside its future place and reserved, so that what cannot be written fails before the work and not
    after it. An empty ``folder`` may exist. Where something else takes its name all the same, or where the name is
    ``numbered`` and not free to begin with, it is the next of folder-2, folder-3, …
    """
    expected = "expected a new or empty folder"
    anchor = folder.absolute().parent
    while not os.path.lexists(anchor):
        anchor = anchor.parent
    with _reported(f"--out: got {folder}", expected, "choose another DIR"), ExitStack() as stack:
        for final in _names(folder):
            try:
                _refuse_full(final, expected)
                hidden = stack.enter_context(_hidden(anchor, final, expected))
                break
            except BadInput:
                if not numbered:
                    raise
        place = Place(hidden / "work" / final.name, final)
        place.work.mkdir(parents=True)
        yield place
        final.parent.mkdir(parents=True, exist_ok=True)
        for place.final in _names(final):
            with suppress(OSError):
                place.final.rmdir()  # if it is empty
            try:
                os.rename(place.work, place.final)
                break
            except OSError:
                if not os.path.lexists(place.final):
                    raise
        if place.final != final:
            say(f"--out: got {final}, taken meanwhile; the results are in {place.final}.")


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Gives a file to write, which becomes ``file`` at the end, or vanishes when anything fails.

    As with `new_folder`, what cannot be written fails before the work. What is there already stays.
    """
    expected = "expected a new file"
    with (
        _reported(f"--out: got {file}", expected, "choose another FILE"),
        _hidden(file.absolute().parent, file, expected) as hidden,
    ):
        _refuse_taken(file)
        yield hidden / file.name
        _refuse_taken(file)
        os.rename(hidden / file.name, file)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into; its files move to ``folder`` at the end, over older ones of their names."""
    name = folder / f"files of process {os.getpid()}"
    with (
        _reported(f"RUN_DIR: got {folder}", "expected a folder", "pass --out DIR"),
        _hidden(folder, name, "expected a folder") as hidden,
    ):
        (work := hidden / "work").mkdir()
        yield work
        for made in sorted(work.iterdir()):
            os.replace(made, folder / made.name)


@contextmanager
def _reported(got: str, expected: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{got} ({error.strerror or error}); {expected} in a place that can be written to; {advice}."
        ) from error


@contextmanager
def _hidden(anchor: Path, final: Path, expected: str) -> Iterator[Path]:
    """A hidden folder in ``anchor``, gone afterwards; its lock reserves ``final``, whoever else may want it.

    Those that processes left when they were killed, whose locks are free, are swept away; not at once, since one that
    has just been made is not locked yet.
    """
    for leftover in anchor.glob(".jbn-*/"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE:
                _remove(leftover, take(leftover / "lock"))
    name = hashlib.sha256(os.fsencode(final.absolute())).hexdigest()[:16]
    hidden, lock = anchor / f".jbn-{name}", None
    while lock is None:
        hidden.mkdir(exist_ok=True)
        try:
            lock = take(hidden / "lock")
        except FileNotFoundError:  # the sweep of another process came between
            continue
        if lock is None:
            raise BadInput(
                f"--out: got {final}, which another run is about to write; {expected}, so that two runs never mix; "
                f"choose another one."
            )
        if not os.fstat(lock).st_nlink:  # or came just then
            os.close(lock)
            lock = None
    try:
        shutil.rmtree(hidden / "work", ignore_errors=True)  # of a process that was killed
        yield hidden
    finally:
        _remove(hidden, lock)


def _remove(hidden: Path, lock: int | None) -> None:
    """Removes a folder whose lock is held, and gives that back."""
    if lock is not None:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def _names(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))


def _refuse_full(folder: Path, expected: str) -> None:
    if folder.name in ("", ".."):
        raise BadInput(f"--out: got {folder}; {expected} with a name of its own; choose another DIR.")
    if os.path.lexists(folder) and not folder.is_dir():
        raise BadInput(f"--out: got {folder}, a file; {expected}; choose another DIR.")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(
            f"--out: got {folder}, which is not empty; {expected}, so that two runs never mix; "
            f"choose another DIR or remove this one."
        )


def _refuse_taken(file: Path) -> None:
    if os.path.lexists(file):
        raise BadInput(
            f"--out: got {file}, which exists already; expected a new file, so that nothing is lost; "
            f"choose another FILE."
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder of checkpoints, which is made if need be."""
    other = "choose another --checkpoint-dir"
    with _reported(f"--checkpoint-dir: got {folder}", "expected a folder", other):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(folder / ".lock")
    if lock is None:
        raise BadInput(
            f"--checkpoint-dir: got {folder}, which another run is using; expected one that no run is writing to; wait "
            f"until it has ended, or {other}."
        )
    try:
        yield
    finally:
        os.close(lock)


def take(file: Path) -> int | None:
    """Locks a file, which is made if need be: a descriptor to close when done, or None if another one holds it.

    The operating system gives the lock back when the process that holds it ends, however it ends.
    """
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
