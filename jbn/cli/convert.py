"""``jbn convert``: a file of arrays with the names and layouts of another framework."""

import os
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from jbn.cli.bad_input import BadInput
from jbn.cli.documents import show
from jbn.convert import Renaming, read_file, rename_arrays, write_file

__all__ = ["run"]

# What a file says in its metadata, where it says so: transformers looks for it.
_FORMATS = {"torch": "pt", "flax": "flax", "jbn": "jbn"}
_KINDS = ("batch norm", "norm", "convolution", "dense", "other")
_SHOWN = ("kind", "layout", "shape")


def run(source: Path, target: Path, source_pattern: str | None, target_pattern: str | None) -> None:
    """Reads a file, renames and lays out its arrays, writes a new one and says what went where."""
    for name, path in (("SRC", source), ("DST", target)):
        if path.suffix not in (".safetensors", ".npz"):
            raise BadInput(
                f"{name}: got {path}; expected a name that ends in .safetensors or .npz; pass one of them (what "
                f"PyTorch pickles becomes one by safetensors.torch.save_file)."
            )
    if os.path.lexists(target):
        raise _taken(target)
    try:
        arrays, metadata = read_file(source)
        renaming = rename_arrays(arrays, target_pattern, source=source_pattern)
    except OSError as error:
        raise BadInput(
            f"SRC: got {source} ({error.strerror or error}); expected a file that can be read; check the path."
        ) from None
    except (TypeError, ValueError) as error:
        raise _refused(source, error) from None
    if "format" in metadata:
        metadata = {**metadata, "format": _FORMATS[renaming.target]}
    try:
        write_file(target, renaming.arrays, metadata)
    except FileExistsError:
        raise _taken(target) from None
    except OSError as error:
        raise BadInput(
            f"DST: got {target} ({error.strerror or error}); expected a new file in a place that can be written to; "
            f"choose another."
        ) from None
    except (TypeError, ValueError) as error:
        raise _refused(target, error) from None
    _show(source, target, renaming)


def _refused(file: Path, error: Exception) -> BadInput:
    """The library's line with the words of the command in the place of its arguments."""
    argument, _, rest = str(error).partition(": ")
    option = {"file": "SRC", "source": "--from", "target": "--to"}.get(argument)
    return BadInput(f"{file}: {error}" if option is None else f"{option}: {rest}")


def _taken(file: Path) -> BadInput:
    return BadInput(
        f"DST: got {file}, which exists already; expected a new file, so that nothing is lost; choose another."
    )


def _show(source: Path, target: Path, renaming: Renaming) -> None:
    layers: dict[str, set[str]] = {kind: set() for kind in _KINDS}
    for move in renaming.moves:
        layers[move.kind].add(move.theirs if move.kind == "other" else move.layer)
    document: dict[str, Any] = {
        "source": {"file": source, "pattern": renaming.source},
        "target": {"file": target, "pattern": renaming.target},
        "found": {kind: len(names) for kind, names in layers.items() if names},
        "arrays": [
            {"from": move.theirs, "to": move.ours, **{name: getattr(move, name) for name in _SHOWN}}
            for move in renaming.moves
        ],
    }
    table = Table(title=f"{escape(str(source))} ({renaming.source}) → {escape(str(target))} ({renaming.target})")
    for name in (renaming.source, renaming.target, *_SHOWN):
        table.add_column(name, overflow="fold")
    for move in renaming.moves:
        table.add_row(*map(escape, (move.theirs, move.ours, move.kind, move.layout, str(move.shape))))
    found = ", ".join(f"{count} {kind}" for kind, count in document["found"].items())
    show(document, [table, f"{len(renaming.moves)} arrays ({found}) written to {target}"])
