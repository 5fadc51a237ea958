"""Checkpoints of a run: saved whole or not at all, and the newest good one found again."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jbn.cli.bad_input import BadInput
from jbn.cli.locks import take
from jbn.cli.streams import say

__all__ = ["Checkpoint", "Checkpoints", "alone_in", "checkpoints"]

# The newest, and what is left should it turn out to be damaged.
_KEPT = 3
_OTHER = "or choose another --checkpoint-dir"
_ROOM = f"room for {_KEPT + 1} checkpoints; make room, and start again to go on from the last one that is whole"


class Checkpoint(NamedTuple):
    """Where a run stood: the steps it had made, and its arrays by their names."""

    step: int
    arrays: dict[str, np.ndarray]


@contextmanager
def checkpoints(
    folder: Path, identity: dict[str, Any], defaults: dict[str, Any] | None = None
) -> Iterator["Checkpoints"]:
    """Gives the `Checkpoints` in a folder, which is made if need be.

    Args:
        folder: for the checkpoints of one network.
        identity: every option that changes the result, and its value, as JSON holds it; a checkpoint of
            another identity is refused.
        defaults: the values of options that a checkpoint does not know.
    """
    from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions
    from orbax.checkpoint.options import MultiprocessingOptions

    # What orbax logs, it raises too.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    # Each process reads for itself and the first one writes: none of them waits for another that failed.
    process = jax.process_index()
    alone = MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    options = CheckpointManagerOptions(
        max_to_keep=_KEPT,
        create=False,
        enable_async_checkpointing=False,
        multiprocessing_options=alone,
    )
    try:
        with _reported(folder, f"a folder that can be written to; {_OTHER[3:]}"):
            folder.mkdir(parents=True, exist_ok=True)
            if process == 0:
                _remove_unfinished(folder)
                tempfile.TemporaryFile(dir=folder).close()  # fails now, and not after the first steps
            manager = CheckpointManager(folder.absolute(), options=options)
        try:
            yield Checkpoints(manager, folder, identity, defaults or {})
        finally:
            manager.close()
    finally:
        log.setLevel(level)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder of checkpoints, which is made if need be."""
    with _reported(folder, f"a folder that can be written to; {_OTHER[3:]}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(folder / ".lock")
    if lock is None:
        raise BadInput(
            f"--checkpoint-dir: got {folder}, which another run is using; expected one that no run is writing to; wait "
            f"until it has ended, {_OTHER}."
        )
    try:
        yield
    finally:
        os.close(lock)


class Checkpoints:
    """The checkpoints of one network: ``newest()`` to go on from, and ``save(checkpoint)``."""

    def __init__(self, manager: Any, folder: Path, identity: dict[str, Any], defaults: dict[str, Any]) -> None:
        self._manager = manager
        self._folder = folder
        self._identity, self._defaults = json.loads(json.dumps((identity, defaults)))
        self._damaged: list[int] = []

    def newest(self) -> Checkpoint | None:
        """The last checkpoint that is as it was written, None if there is none at all.

        Raises:
            BadInput: all of them are damaged, or they belong to another run.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found = self._read(step)
            if found is not None:
                self._refuse_other(found[0])
                self._warn(step)
                return Checkpoint(step, found[1])
            self._damaged.append(step)
        if steps:
            raise BadInput(
                f"--checkpoint-dir: got {self._folder}, where every checkpoint is damaged ({self._names()}); expected "
                f"one that is as it was written; remove them to start again, {_OTHER}."
            )
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and lets go of the oldest."""
        from orbax.checkpoint import args
        from safetensors.numpy import save

        if jax.process_index() != 0:
            return
        # As one array: of many that are written or read at a time, each would report its failure once more from
        # a thread of its own; and one digest covers names, shapes and values.
        whole = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
        packed = np.frombuffer(save(whole), np.uint8)
        record = {"step": checkpoint.step, "identity": self._identity}
        record["sha256"] = _digest(record, packed)
        items = args.Composite(arrays=args.ArraySave(packed), record=args.JsonSave(record))
        try:
            with _reported(self._folder, _ROOM):
                while self._damaged:
                    self._manager.delete(self._damaged.pop())
                self._manager.save(checkpoint.step, args=items, force=True)
        except BadInput:
            _remove_unfinished(self._folder)  # gives back the room that it took
            raise

    def _read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Identity and arrays; None if anything is not as it was written."""
        from orbax.checkpoint import args
        from safetensors.numpy import load

        try:
            read = self._manager.restore(
                step, args=args.Composite(arrays=args.ArrayRestore(), record=args.JsonRestore())
            )
            record, packed = read.record, read.arrays
            sound = record.pop("sha256") == _digest(record, packed) and record["step"] == step
            return (record["identity"], load(packed.tobytes())) if sound else None
        except Exception:  # a damaged file can fail in any way: JSON, zarr, a size that memory has no room for
            return None

    def _refuse_other(self, identity: dict[str, Any]) -> None:
        identity = {**{name: value for name, value in self._defaults.items() if name in self._identity}, **identity}
        for name in {**self._identity, **identity}:
            got, expected = (_joined(each.get(name)) for each in (self._identity, identity))
            if got != expected:
                raise BadInput(
                    f"{name}: got {got}; expected {expected}, as in the checkpoints in {self._folder}; "
                    f"pass the same again, {_OTHER}."
                )

    def _warn(self, step: int) -> None:
        if self._damaged and jax.process_index() == 0:
            say(f"--checkpoint-dir: got {self._folder} with damage in {self._names()}; going on from {step}.")

    def _names(self) -> str:
        return ", ".join(map(str, self._damaged))


def _remove_unfinished(folder: Path) -> None:
    """What a run that was killed while it saved has left: Orbax renames it when it is whole."""
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _digest(record: dict[str, Any], packed: np.ndarray) -> str:
    content = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    content.update(packed.data)
    return content.hexdigest()


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def _reported(folder: Path, expected: str) -> Iterator[None]:
    """A folder that cannot be written to, or a disk that is full, is one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        # What the system refused to tensorstore is a ValueError with the number in its text.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(int(code[1])) if code else error.strerror or error  # type: ignore[union-attr]
        raise BadInput(f"--checkpoint-dir: got {folder} ({reason}); expected {expected}.") from error
