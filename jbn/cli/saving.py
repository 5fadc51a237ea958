"""What a run leaves behind: a folder that appears whole or not at all, JSON, and models without pickle."""

import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.locks import take
from jbn.cli.network import NetworkSpec, build
from jbn.cli.streams import say

__all__ = ["load_model", "named", "new_file", "new_folder", "replaced_files", "results", "save_model", "to_json"]


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
    try:
        with ExitStack() as stack:
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
    except OSError as error:
        raise BadInput(
            f"--out: got {folder} ({error.strerror or error}); {expected} in a place that can be written to; "
            f"choose another DIR."
        ) from error


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


def to_json(document: Any) -> str:
    """JSON in which what is not finite is null, since JSON has no other word for it.

    It is ASCII, so that any terminal can take it, and a file name in no encoding at all comes back as it was.
    """
    return json.dumps(_plain(document), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(child) for child in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def save_model(file: Path, spec: NetworkSpec, params: Any, state: Any, inputs: jbn.BNStats) -> None:
    """Writes a network as safetensors: params/0/W, params/0/bn/gamma, state/0/mean, inputs/mean, …

    The spec stands in the file's metadata, as JSON under "network", with the version of jbn and the digest of all.
    It is one entry: the order of several would not be the same each time.
    """
    from safetensors.numpy import save

    tree = {"params": params, "state": state, "inputs": inputs}
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named(tree)[0]}
    fields = {**spec._asdict(), "jbn": jbn.__version__}
    fields["sha256"] = _digest(fields, tensors)
    file.write_bytes(save(tensors, {"network": json.dumps(fields)}))


def _digest(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    content = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        content.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return content.hexdigest()


def load_model(file: Path) -> tuple[NetworkSpec, Any, Any, jbn.BNStats]:
    """Reads what `save_model` wrote: ``(spec, params, state, inputs)``; a line about what is wrong otherwise.

    Files of version 0.1.0 have no digest, and their inputs in float32.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise _unreadable(file, error.strerror or "not readable") from None
    except (SafetensorError, TypeError):  # TypeError: a dtype that NumPy does not have
        raise _unreadable(file, "damaged, or no safetensors file") from None
    try:
        fields = json.loads(metadata["network"])
        digest = fields.pop("sha256", None)
        if digest not in (None, _digest(fields, tensors)):
            raise _unreadable(file, "damaged: it is not as it was written")
        fields.pop("jbn", None)
        spec = NetworkSpec.parsed(fields)
        params, state = jax.eval_shape(build(spec).init, jax.random.key(0))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _unreadable(file, "it does not say which network it holds") from None
    mean = tensors.get("inputs/mean", np.zeros(()))
    dtype = np.float64 if mean.dtype == np.float64 else np.float32
    inputs = jbn.BNStats(*(jax.ShapeDtypeStruct(mean.shape, dtype) for _ in range(3)))  # type: ignore[arg-type]
    leaves, treedef = named({"params": params, "state": state, "inputs": inputs})
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves}
    got = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    differ = [name for name in sorted({*wanted, *got}) if wanted.get(name) != got.get(name)]
    if differ or mean.ndim != 1:
        raise _unreadable(file, f"not the arrays of its network: {', '.join(differ[:3] or ['inputs/mean'])}")
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise _unreadable(file, f"values in {name} are not finite")
        if name.endswith(("/var", "/count")) and (array < 0).any():
            raise _unreadable(file, f"values in {name} are negative")
    tree = jax.tree.unflatten(treedef, [tensors[name] for name in wanted])
    params, state = jax.tree.map(jnp.asarray, (tree["params"], tree["state"]))
    return spec, params, state, tree["inputs"]


def _unreadable(file: Path, reason: str) -> BadInput:
    return BadInput(f"--model: got {file} ({reason}); expected a model file that jbn saved; train it again.")


def named(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with their names, such as params/0/bn/gamma, and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], treedef
