"""Checkpoints of a run, as Orbax keeps them: saved while training goes on, and the newest good one found again.

Each is a folder named after the steps made, with three items: ``train_state`` and ``histories``, pytrees of arrays that
Orbax restores by itself, and ``record``, JSON that says which run this is and holds the digest of every array.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbn.cli.bad_input import BadInput
from jbn.cli.fit import SoFar
from jbn.cli.models import named
from jbn.cli.streams import say

__all__ = ["Checkpoints", "checkpoints"]

# The newest, and what is left should it turn out to be damaged.
_KEPT = 3
_OTHER = "or choose another --checkpoint-dir"
_WRITABLE = f"a folder that can be written to; {_OTHER[3:]}"
_ROOM = f"room for {_KEPT + 1} checkpoints; make room, and start again to go on from the last one that is whole"


@contextmanager
def checkpoints(
    folder: Path, identity: dict[str, Any], defaults: dict[str, Any] | None = None
) -> Iterator["Checkpoints"]:
    """Gives the `Checkpoints` in a folder, which is made if need be; the last of them is whole when it ends.

    A process alone goes on while it saves. Several save together, and wait until it is done; each reads by itself, so
    that none waits for another that failed.

    Args:
        folder: for the checkpoints of one network.
        identity: every option that changes the result, and its value, as JSON holds it; a checkpoint of
            another identity is refused.
        defaults: the values of options that a checkpoint does not know.
    """
    from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions
    from orbax.checkpoint.options import MultiprocessingOptions

    process = jax.process_index()
    alone = MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    # Where one of several processes fails in a thread of its own, Orbax lets the others wait for it for ten minutes.
    unwatched = jax.process_count() == 1
    keeping = CheckpointManagerOptions(max_to_keep=_KEPT, create=False, enable_async_checkpointing=unwatched)
    reading = CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    with _reported(folder, _WRITABLE):
        folder.mkdir(parents=True, exist_ok=True)
        if process == 0:
            _remove_unfinished(folder)
            tempfile.TemporaryFile(dir=folder).close()  # fails now, and not after the first steps
        manager, reader = (CheckpointManager(folder.absolute(), options=each) for each in (keeping, reading))
    try:
        yield Checkpoints(manager, reader, folder, identity, defaults or {})
        with _reported(folder, _ROOM):
            manager.close()
    except BaseException:
        if unwatched:  # of several processes, one that is gone would be waited for
            own = [each for each in threading.enumerate() if type(each).__module__.startswith("orbax.")]
            for end in (manager.close, *(thread.join for thread in own)):
                with suppress(Exception):
                    end()
        if process == 0:
            _remove_unfinished(folder)  # gives back the room that it took
        raise
    finally:
        reader.close()


class Checkpoints:
    """The checkpoints of one network: ``newest(start)`` to go on from, and ``save(so_far)``."""

    def __init__(self, manager: Any, reader: Any, folder: Path, identity: dict[str, Any], defaults: dict[str, Any]):
        self._manager, self._reader = manager, reader
        self._folder = folder
        self._identity, self._defaults = json.loads(json.dumps((identity, defaults)))
        self._damaged: list[int] = []

    def newest(self, start: SoFar) -> SoFar:
        """The last checkpoint that is as it was written, on the devices of ``start``; that itself if there is none.

        Raises:
            BadInput: all of them are damaged, or they belong to another run.
        """
        steps = sorted(self._reader.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self._read(step, start)
            except BadInput:
                raise
            except Exception:  # a damaged file can fail in any way: JSON, zarr, a size that memory has no room for
                found = None
            if found is not None:
                if self._damaged and jax.process_index() == 0:
                    say(f"--checkpoint-dir: got {self._folder} with damage in {self._names()}; going on from {step}.")
                return found
            self._damaged.append(step)
        if steps:
            raise BadInput(
                f"--checkpoint-dir: got {self._folder}, where every checkpoint is damaged ({self._names()}); expected "
                f"one that is as it was written; remove them to start again, {_OTHER}."
            )
        return start

    def save(self, so_far: SoFar) -> None:
        """Begins to write a checkpoint, and lets go of the oldest; a failure of the one before is raised here."""
        from orbax.checkpoint import args

        kept = so_far._replace(histories={name: array for name, array in so_far.histories.items() if array.size})
        record = {"step": kept.steps, "identity": self._identity, "arrays": _manifest(kept)}
        items = args.Composite(
            train_state=args.StandardSave(kept.train_state),
            histories=args.StandardSave(kept.histories),  # none of them empty, which Orbax does not take
            record=args.JsonSave({**record, "sha256": _digest(record)}),
        )
        with _reported(self._folder, _ROOM):
            while self._damaged:
                self._manager.delete(self._damaged.pop())
            self._manager.save(kept.steps, args=items, force=True)

    def _read(self, step: int, start: SoFar) -> SoFar | None:
        """A checkpoint; None, or any exception, where it is not as it was written."""
        from orbax.checkpoint import args

        def items(**wanted: Any) -> Any:
            return self._reader.restore(step, args=args.Composite(**wanted))

        record = items(record=args.JsonRestore()).record
        packed = None
        if (self._folder / str(step) / "arrays").exists():  # as version 0.1.0 has saved them
            packed = items(arrays=args.ArrayRestore()).arrays
        if record.pop("sha256") != _digest(record, packed) or record["step"] != step:
            return None
        self._refuse_other(record["identity"])
        if packed is not None:
            found = _unpacked(packed, start)
        else:
            _refuse_unlike(start, {name: (dtype, shape) for name, (dtype, shape, _) in record["arrays"].items()})
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), start.train_state
            )
            found = SoFar(**items(train_state=args.StandardRestore(like), histories=args.StandardRestore()))
            if _manifest(found) != record["arrays"]:
                return None
        return found._replace(histories={**start.histories, **found.histories})

    def _refuse_other(self, identity: dict[str, Any]) -> None:
        identity = {**{name: value for name, value in self._defaults.items() if name in self._identity}, **identity}
        for name in {**self._identity, **identity}:
            got, expected = (_joined(each.get(name)) for each in (self._identity, identity))
            if got != expected:
                raise BadInput(
                    f"{name}: got {got}; expected {expected}, as in the checkpoints in {self._folder}; "
                    f"pass the same again, {_OTHER}."
                )

    def _names(self) -> str:
        return ", ".join(map(str, self._damaged))


def _unpacked(packed: np.ndarray, start: SoFar) -> SoFar:
    """A checkpoint of version 0.1.0: all arrays, with their names, as the bytes of one safetensors file."""
    from safetensors.numpy import load

    arrays = load(packed.tobytes())
    _refuse_unlike(start, {name: (str(array.dtype), list(array.shape)) for name, array in arrays.items()})
    leaves, treedef = named({"train_state": start.train_state})

    def placed(name: str, leaf: jax.Array) -> jax.Array:
        array = arrays.pop(name)
        return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])

    train_state = jax.tree.unflatten(treedef, [placed(*each) for each in leaves])["train_state"]
    return SoFar(train_state, {name.removeprefix("epochs/"): array for name, array in arrays.items()})


def _refuse_unlike(start: SoFar, found: dict[str, tuple[str, list[int]]]) -> None:
    """Whether a checkpoint holds every array of a train state."""
    for name, leaf in named({"train_state": start.train_state})[0]:
        if found.get(name) != (str(leaf.dtype), list(leaf.shape)):
            raise BadInput(
                f"--checkpoint-dir: got checkpoints without an array {name} {leaf.dtype}{list(leaf.shape)}; expected "
                f"those of this version of jbn; choose another --checkpoint-dir."
            )


def _manifest(so_far: SoFar) -> dict[str, list[Any]]:
    """Dtype, shape and digest of each array, by its name; every process can read all of them."""
    found = {}
    for name, leaf in named(so_far._asdict())[0]:
        found[name] = [str(leaf.dtype), list(leaf.shape), hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()]
    return found


def _digest(record: dict[str, Any], packed: np.ndarray | None = None) -> str:
    content = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    if packed is not None:
        content.update(packed.data)
    return content.hexdigest()


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _remove_unfinished(folder: Path) -> None:
    """What a run that was killed while it saved has left: Orbax renames it when it is whole."""
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


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
