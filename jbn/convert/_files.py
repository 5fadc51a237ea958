"""Files of named arrays, ``.safetensors`` and ``.npz``: read with the header checked first, written whole and once."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from jbn._doors import missing
from jbn.convert._arrays import as_numpy
from jbn.convert._headers import METADATA, check_npz, check_safetensors, damaged

__all__ = ["read_file", "write_file"]


def read_file(file: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a file of named arrays: a ``.safetensors``, or an ``.npz`` of NumPy.

    The header is held against the size of the file before anything is made of it, and nothing is ever unpickled. A
    damaged or hostile file is an error within a second, and takes no more memory than its own size (a compressed
    ``.npz`` a thousand times that, at most a GiB).

    Args:
        file: its path; the suffix says which it is.

    Returns:
        ``(arrays, metadata)``: NumPy arrays by name, in the order of the file, and its texts by name (none in most
        files; in an ``.npz`` those that `write_file` kept). Nest the arrays of a Flax file with
        ``flax.traverse_util.unflatten_dict(arrays, sep="/")``, and make tensors of a PyTorch one with
        ``torch.from_numpy``.

    Raises:
        ModuleNotFoundError: a ``.safetensors`` without the package safetensors.
        OSError: a file that cannot be read.
        ValueError: another suffix, damage, an object array, a name that stands twice, a dtype that NumPy and JAX do
            not have in common with the format.

    Example:
        >>> import tempfile, os, numpy as np
        >>> from jbn.convert import read_file, write_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "weights.npz")
        ...     write_file(file, {"fc.bias": np.arange(3.0)}, {"epoch": "7"})
        ...     arrays, metadata = read_file(file)
        >>> arrays, metadata
        ({'fc.bias': array([0., 1., 2.])}, {'epoch': '7'})

    References:
        The safetensors format, github.com/huggingface/safetensors; NumPy, ``numpy.lib.format``.
    """
    path = Path(file)
    return _read_npz(path) if _suffix("file", path) == ".npz" else _read_safetensors(path)


def write_file(
    file: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named arrays into a new file: a ``.safetensors``, or an ``.npz`` of NumPy.

    The file appears whole or not at all, and never in the place of one that is there. Equal arrays give equal bytes
    (in a ``.safetensors`` with several texts, up to their order).

    Args:
        file: its path; the suffix says which it is to be.
        arrays: by name; NumPy's, JAX's, or tensors of PyTorch.
        metadata: texts by name, to stand beside the arrays. An ``.npz`` has no place for them and gets one more array,
            ``__metadata__``.

    Returns:
        None.

    Raises:
        FileExistsError: there is such a file already.
        ModuleNotFoundError: a ``.safetensors`` without the package safetensors.
        OSError: a place that cannot be written to.
        TypeError: what is no array, a name or a text that is no str.
        ValueError: another suffix, a dtype that the format does not have (bfloat16 in an ``.npz``).

    Example:
        >>> import tempfile, os, numpy as np
        >>> from jbn.convert import write_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(os.path.join(folder, "weights.safetensors"), {"fc.bias": np.zeros(3, np.float32)})
        ...     os.listdir(folder)
        ['weights.safetensors']

    PyTorch: ``safetensors.torch.save_file(module.state_dict(), file)`` writes what `read_file` reads.
    """
    path = Path(file)
    for kind, names in (("arrays", arrays), ("metadata", metadata or {})):
        if not isinstance(names, Mapping):
            raise TypeError(f"{kind}: got {type(names).__name__}; expected a mapping from names; pass a dict.")
        for name in names:
            if not isinstance(name, str) or name == METADATA:
                raise TypeError(f"{kind}: got {name!r} as a name; expected text, not {METADATA}; rename it.")
    for name, text in (metadata or {}).items():
        if not isinstance(text, str):
            raise TypeError(f"metadata[{name!r}]: got {type(text).__name__}; expected text; pass json.dumps of it.")
    held = {name: np.asarray(as_numpy(f"arrays[{name!r}]", array), order="C") for name, array in arrays.items()}
    encoded = (_npz if _suffix("file", path) == ".npz" else _safetensors)(held, dict(metadata or {}))
    _write_new(path, encoded)


def _suffix(name: str, path: Path) -> str:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"{name}: got {path}; expected a name that ends in .safetensors or .npz; choose one of them (what PyTorch "
            f"pickles is written as one by safetensors.torch.save_file)."
        )
    return path.suffix


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise missing("convert", "safetensors", "demo") from None
    with path.open("rb") as opened:
        check_safetensors(path, opened, os.fstat(opened.fileno()).st_size)
    try:
        with safe_open(path, framework="numpy") as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except SafetensorError as error:
        raise damaged(path, str(error)) from None


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays = {}
    with path.open("rb") as opened:
        for name, read in check_npz(path, opened, os.fstat(opened.fileno()).st_size):
            arrays[name] = read()
    texts = arrays.pop(METADATA, None)
    return arrays, {} if texts is None else _texts(path, texts)


def _texts(path: Path, encoded: np.ndarray) -> dict[str, str]:
    try:
        texts = json.loads(encoded.tobytes())
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise damaged(path, f"{METADATA} is not JSON of texts by name")
    return texts


def _safetensors(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save
    except ModuleNotFoundError:
        raise missing("convert", "safetensors", "demo") from None
    try:
        return save(arrays, metadata or None)
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"arrays: got a dtype that safetensors does not have ({' '.join(str(error).split())}); expected numbers; "
            f"convert it."
        ) from None


def _npz(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """As numpy.savez writes it, but for the times."""
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc":
            raise ValueError(
                f"arrays[{name!r}]: got dtype {array.dtype}; expected one of NumPy's own, which an .npz can hold; "
                f"write a .safetensors, or convert it to float32."
            )
    if metadata:
        encoded = json.dumps(metadata, sort_keys=True).encode()
        arrays = {**arrays, METADATA: np.frombuffer(encoded, np.uint8)}
    content = io.BytesIO()
    with ZipFile(content, "w", ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return content.getvalue()


def _write_new(path: Path, encoded: bytes) -> None:
    """Written beside its place first; the link fails where there is something."""
    if os.path.lexists(path):
        raise FileExistsError(f"file: got {path}, which exists already; expected a new file; choose another name.")
    handle, beside = tempfile.mkstemp(prefix=".jbn-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(encoded)
        os.chmod(beside, 0o666 & ~_umask())
        try:
            os.link(beside, path)
        except FileExistsError:
            raise FileExistsError(
                f"file: got {path}, which exists already; expected a new file; choose another name."
            ) from None
        except OSError:  # a file system without links
            os.rename(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
