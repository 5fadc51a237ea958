"""What the headers of files claim, held against the files: before anything is allocated, in one line what is wrong."""

import json
import math
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

__all__ = ["METADATA", "check_npz", "check_safetensors", "damaged"]

METADATA = "__metadata__"  # where safetensors keeps its texts; no array can have this name

# Some 100 bytes an array are usual; parsed, they become many times as many.
_LONGEST_HEADER = 2**22
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# Deflate cannot do better than this; what stays below so many bytes may.
_BEST_RATIO, _LARGE = 1032, 2**30
_NPY_HEADERS: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def damaged(path: Path, reason: str) -> ValueError:
    """The one error of all files that cannot be what they say."""
    reason = " ".join(reason.split()).rstrip(".")
    return ValueError(
        f"file: got {path}, which is damaged or no {path.suffix} file ({reason[:200]}); expected one that was written "
        f"whole; write or download it again."
    )


def check_safetensors(path: Path, opened: IO[bytes], size: int) -> None:
    """Raises unless the header describes, exactly, the bytes that follow it."""
    start = opened.read(8)
    if len(start) < 8:
        raise damaged(path, f"{size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, _LONGEST_HEADER):
        raise damaged(path, f"a header of {length} bytes in a file of {size}")
    header = _as_header(path, opened.read(length))
    claims = []
    for name, entry in header.items():
        if name == METADATA:
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise damaged(path, "metadata that are not texts by name")
        else:
            claims.append((*_as_claim(path, name, entry), name))
    end = 0
    for begin, stop, name in sorted(claims):
        if begin != end:
            raise damaged(path, f"{_shown(name)} does not begin where the array before it ends")
        end = stop
    if end != size - 8 - length:
        raise damaged(path, f"arrays of {end} bytes where {size - 8 - length} follow the header")


def _as_header(path: Path, encoded: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise damaged(path, f"{_shown(name)} stands twice")
        return table

    try:
        header = json.loads(encoded.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise damaged(path, "a header nested too deeply") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise damaged(path, "a header that is not JSON") from None
    except ValueError as error:  # digits without end, or what `unique` found
        raise error if str(error).startswith("file: ") else damaged(path, "a header with too large a number") from None
    if not isinstance(header, dict):
        raise damaged(path, "a header that is no table")
    return header


def _as_claim(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where the bytes of one array begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{_shown(name)} has not just a dtype, a shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(
            f"file: got {_shown(name)} of dtype {_shown(dtype)} in {path}; expected one of {', '.join(_BYTES)}; "
            f"convert it where it was written."
        )
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise damaged(path, f"{_shown(name)} has a shape or offsets that are not whole numbers")
    if len(offsets) != 2 or len(shape) > 32 or _product(shape) * _BYTES[dtype] != offsets[1] - offsets[0]:
        raise damaged(path, f"{_shown(name)} of shape {_shown(shape)} does not fit its offsets {_shown(offsets)}")
    return offsets[0], offsets[1]


def check_npz(path: Path, opened: IO[bytes], size: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(name, what reads it) of each array; raises for any before the first is given."""
    try:
        archive = ZipFile(opened)
        members = archive.infolist()
    except (BadZipFile, NotImplementedError, ValueError, OSError, struct.error, LookupError) as error:
        raise damaged(path, str(error)) from None
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(set(names)) < len(names):
        name, _ = Counter(names).most_common(1)[0]
        raise damaged(path, f"{_shown(name)} stands twice")
    if sum(member.compress_size for member in members) > size:
        raise damaged(path, "arrays that overlap")
    claimed = 0
    for member in members:
        if not member.filename.endswith(".npy") or member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise damaged(path, f"{_shown(member.filename)} is no array")
        if member.file_size > _BEST_RATIO * (member.compress_size + 1):
            raise damaged(path, f"{_shown(member.filename)} claims {member.file_size} bytes")
        claimed += member.file_size
    if claimed > max(_LARGE, size):
        raise damaged(path, f"{size} bytes claim to hold {claimed}")
    for name, member in zip(names, members, strict=True):
        _checked(path, archive, member, name, _check_array)
    for name, member in zip(names, members, strict=True):
        yield name, partial(_checked, path, archive, member, name, _array)


def _checked(path: Path, archive: ZipFile, member: ZipInfo, name: str, read: Callable[..., Any]) -> Any:
    try:
        with archive.open(member) as content:
            return read(path, name, content, member.file_size)
    except (BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, struct.error, OSError) as error:
        raise damaged(path, f"{_shown(name)}: {error}") from None


def _check_array(path: Path, name: str, content: IO[bytes], size: int) -> None:
    """Raises unless a member is one array of numbers, of as many bytes as it says."""
    try:
        version = np.lib.format.read_magic(content)
        shape, _, dtype = _NPY_HEADERS[version](content)
    except Exception as error:  # NumPy parses the header as Python, in two ways, and fails in many
        raise damaged(path, f"{_shown(name)}: {error}") from None
    if dtype.hasobject:
        raise ValueError(
            f"file: got {_shown(name)} in {path}, which holds pickled objects; expected an array of numbers; such a "
            f"file can run any code when it is read: save its numbers as they are."
        )
    if dtype.kind not in "biufc":
        raise ValueError(
            f"file: got {_shown(name)} of dtype {dtype} in {path}; expected numbers; write what NumPy has no dtype "
            f"for as a .safetensors."
        )
    if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
        raise damaged(path, f"{_shown(name)} has a shape of {_shown(shape)}")
    if len(shape) > 32 or _product(shape) * dtype.itemsize != size - content.tell():
        raise damaged(path, f"{_shown(name)} of shape {_shown(shape)} and dtype {dtype} is not {size} bytes long")


def _array(path: Path, name: str, content: IO[bytes], size: int) -> np.ndarray:
    try:
        return np.lib.format.read_array(content, allow_pickle=False)
    except ValueError as error:
        raise damaged(path, f"{_shown(name)}: {error}") from None


def _product(shape: Any) -> int:
    """Of sizes from a file: 0 wins over any others, and more than a file can hold needs no digits."""
    if 0 in shape:
        return 0
    return math.prod(shape) if len(shape) <= 32 else 2**64


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, (list, tuple)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
