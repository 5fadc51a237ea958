"""Data for a run: real examples in, standardized float32 arrays out, or one line about what is wrong."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jbn
from jbn.cli.bad_input import BadInput

__all__ = ["Data", "Fitted", "load_data"]

_TEST_SHARE = 0.2
_VALUES_AT_A_TIME = 2**22


class Data(NamedTuple):
    """A training and a test set, standardized with the statistics of the training set; kept by the host.

    Attributes:
        x, x_test: (N, …, C) float32.
        y, y_test: (N,) int32 labels, 0 to classes − 1.
        classes: how many.
        inputs: the statistics that standardized x and x_test, of features or channels (C,), in float64.
        source: where the data came from.
        digest: what tells the examples from others, the same on machines that round differently.
        names: what the labels were called, where they were words.
        understood: how many of what, in words.
        doubts: what is odd about the examples, a line each.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    inputs: jbn.BNStats
    source: str
    digest: str
    names: tuple[str, ...]
    understood: str
    doubts: tuple[str, ...]


class Fitted(NamedTuple):
    """What a trained network expects of data: the statistics that standardized its inputs, and its classes."""

    inputs: jbn.BNStats
    classes: int
    width: int  # of the inputs, as the first layer takes them
    names: tuple[str, ...] = ()  # of the classes, where they have any


def load_data(file: Path | None, seed: int, *, flat: bool, fitted: Fitted | None = None) -> Data:
    """Reads a file, or scikit-learn's digits, splits off a test set if there is none, and standardizes.

    Args:
        file: an npz with x, y and optionally x_test, y_test; None for the digits.
        seed: of the split.
        flat: whether images (N, H, W, C) become vectors (N, H·W·C), once they are standardized.
        fitted: a trained network that has to take the data; they are standardized as its own were.

    Vectors are standardized feature by feature; images channel by channel, since a pixel at the border
    that is almost never set would be blown up otherwise.
    """
    arrays = _digits() if file is None else _read(file)
    source = "handwritten digits (scikit-learn)" if file is None else str(file)
    names = _names(arrays["y"]) if fitted is None else fitted.names
    x, y = _examples(arrays, "x"), _labels(arrays, "y", names)
    _check_pair("x", x, "y", y)
    classes = _check_classes(y) if fitted is None else fitted.classes
    if fitted is not None:
        _check_fitted(x, y, fitted, flat)
    if "x_test" in arrays:
        x_test, y_test = _examples(arrays, "x_test"), _labels(arrays, "y_test", names)
        _check_pair("x_test", x_test, "y_test", y_test)
        _check_test(x, x_test, y_test, classes)
    else:
        x, x_test, y, y_test = _split(x, y, seed)
    inputs = _measured(x) if fitted is None else fitted.inputs
    z, z_test = _standardized(x, inputs), _standardized(x_test, inputs)
    for name, values in (("x", z), ("x_test", z_test), ("x", inputs.var)):
        if not np.isfinite(values).all():
            raise BadInput(
                f"--data: got values in {name} too large or too far apart to be standardized; "
                f"expected values below 1e150 or so; rescale them."
            )
    kind = f"{'×'.join(map(str, x.shape[1:]))} images" if x.ndim == 4 else f"{x.shape[1]} features"
    understood = f"{len(x)} train, {len(x_test)} test, {kind}, {classes} classes"
    digest, doubts = _digest(inputs, x, y, x_test, y_test), tuple(_doubts(x, inputs))
    if flat:
        z, z_test = z.reshape(len(z), -1), z_test.reshape(len(z_test), -1)
    y, y_test = y.astype(np.int32), y_test.astype(np.int32)
    return Data(z, y, z_test, y_test, classes, inputs, source, digest, names, understood, doubts)


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    """In float64, a part at a time, so that the whole never takes twice its room."""
    step = max(1, _VALUES_AT_A_TIME // x[0].size)
    return (x[i : i + step].astype(np.float64) for i in range(0, len(x), step))


def _measured(x: np.ndarray) -> jbn.BNStats:
    """The statistics of features or channels in float64: float32 would round away what a large mean hides."""
    axes, m = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
    with np.errstate(over="ignore", invalid="ignore"):
        mean = sum(part.sum(axes) for part in _chunks(x)) / m
        low = x.min(axes)
        mean = np.where(low == x.max(axes), low, mean)  # exactly, so that the variance of a constant is 0
        var = sum(np.square(part - mean).sum(axes) for part in _chunks(x)) / m
    return jbn.BNStats(mean, var, np.full(mean.shape, m, np.float64))  # type: ignore[arg-type]


def _standardized(x: np.ndarray, inputs: jbn.BNStats) -> np.ndarray:
    """(x − μ)/σ in float32; a constant feature gives 0."""
    mean, var = (np.asarray(each, np.float64) for each in inputs[:2])
    scale = np.where(var > 0, np.sqrt(var), np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([((part - mean) / scale).astype(np.float32) for part in _chunks(x)])


def _doubts(x: np.ndarray, inputs: jbn.BNStats) -> Iterator[str]:
    what = "channel" if x.ndim == 4 else "feature"
    constant = np.flatnonzero(inputs.var == 0)
    if len(constant):
        yield (
            f"--data: got {len(constant)} of {x.shape[-1]} {what}s in x that are constant, {what} {constant[0]} first; "
            f"they become 0 and tell the network nothing."
        )
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        height, width, channels = x.shape[1:]
        yield (
            f"--data: got images of shape {x.shape[1:]} in x, taken as {height} high, {width} wide, of {channels} "
            f"channels; if the channels come first, pass numpy.moveaxis(x, 1, -1)."
        )


def _digest(inputs: jbn.BNStats, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> str:
    """Of the values in float32, and in float64 where that is too coarse to tell examples from each other."""
    content = hashlib.sha256()
    for array in (x.astype(np.float32), y, x_test.astype(np.float32), y_test):
        content.update(f"{array.shape} {array.dtype}".encode())
        content.update(np.ascontiguousarray(array).data)
    coarse = 1e-4 * np.sqrt(np.asarray(inputs.var, np.float64))
    for array in (x, x_test):
        for part in _chunks(array):
            if (np.abs(part - part.astype(np.float32)) > coarse).any():
                content.update(part.data)
    return content.hexdigest()[:16]


def _digits() -> dict[str, Any]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"x": digits.images, "y": digits.target}


def _read(file: Path) -> dict[str, Any]:
    """All arrays of an npz that a run looks at, without pickle."""
    wanted = "an .npz file with arrays x and y"
    advice = "make one with numpy.savez(FILE, x=…, y=…)"
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise BadInput(f"--data: got a single array in {file}; expected {wanted}; {advice}.")
        with archive:
            names = archive.files
            arrays: dict[str, Any] = {name: archive[name] for name in ("x", "y", "x_test", "y_test") if name in names}
    except FileNotFoundError:
        raise BadInput(f"--data: got no file at {file}; expected {wanted}; check the path.") from None
    except OSError as error:
        reason = error.strerror or "not readable"
        raise BadInput(f"--data: got {file} ({reason}); expected {wanted}; check the path.") from None
    except BadInput:
        raise
    except Exception:  # a damaged file can fail in any way: zip, zlib, a header without an end, a size beyond memory
        raise BadInput(
            f"--data: got {file}, which is no .npz file, is damaged or holds pickled objects; "
            f"expected {wanted}; {advice}."
        ) from None
    needed = {"x", "y"} | ({"x_test", "y_test"} if {"x_test", "y_test"} & set(names) else set())
    for name in sorted(needed - set(names)):
        held = ", ".join(sorted(names)) or "nothing"
        raise BadInput(f"--data: got no array {name} in {file}, which holds {held}; expected {wanted}; {advice}.")
    return arrays


def _examples(arrays: dict[str, Any], name: str) -> np.ndarray:
    """(N, features) or (N, H, W, C) real numbers, all finite."""
    x = arrays[name]
    if x.dtype.kind not in "biuf":
        raise BadInput(f"--data: got dtype {x.dtype} in {name}; expected real numbers; convert it.")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise BadInput(
            f"--data: got {name} of shape {x.shape}; expected (N, features), (N, H, W) or (N, H, W, C), "
            f"not empty; "
            f"reshape it."
        )
    wrong = np.argwhere(~np.isfinite(x))
    if len(wrong):
        raise BadInput(
            f"--data: got {len(wrong)} of {x.size} values in {name} that are NaN or infinite, "
            f"the first in {name}[{wrong[0][0]}]; expected finite numbers; clean the data first."
        )
    return x[..., None] if x.ndim == 3 else x


def _names(y: np.ndarray) -> tuple[str, ...]:
    """The labels that are words, in the order in which they are numbered."""
    return tuple(np.unique(_words(y)).tolist()) if y.dtype.kind in "SU" else ()


def _words(y: np.ndarray) -> np.ndarray:
    return np.char.decode(y, "utf-8", "replace") if y.dtype.kind == "S" else y


def _labels(arrays: dict[str, Any], name: str, names: tuple[str, ...]) -> np.ndarray:
    """(N,) integers: words are numbered, and True, False and whole numbers of any kind are taken."""
    y = arrays[name]
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf" and ((y == 0).sum(1) == y.shape[1] - 1).all():
        raise BadInput(
            f"--data: got one-hot rows of shape {y.shape} in {name}; expected (N,), a label for each example; "
            f"pass numpy.argmax({name}, axis=1)."
        )
    if y.ndim != 1:
        raise BadInput(f"--data: got {name} of shape {y.shape}; expected (N,), a label for each example; reshape it.")
    if y.dtype.kind in "SU":
        unknown = sorted(set(_words(y).tolist()) - set(names))
        if unknown:
            raise BadInput(
                f"--data: got label {unknown[0]!r} in {name}; expected labels of the training set, "
                f"{', '.join(names) or 'which are numbers'}; name both alike."
            )
        return np.searchsorted(np.asarray(names), _words(y))
    if y.dtype.kind == "f" and not ((y == np.floor(y)) & (np.abs(y.astype(np.float64)) < 2**31)).all():
        raise BadInput(
            f"--data: got {name} with numbers that are not whole; expected a class for each example, since this is "
            f"classification only; make classes of them, say with numpy.digitize."
        )
    if y.dtype.kind not in "biuf":
        raise BadInput(f"--data: got dtype {y.dtype} in {name}; expected labels; make them integers or words.")
    return y if y.dtype.kind in "iu" else y.astype(np.int64)


def _check_pair(x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> None:
    if len(x) != len(y):
        raise BadInput(
            f"--data: got {len(x)} examples in {x_name} and {len(y)} labels in {y_name}; "
            f"expected as many of one as of the other; give each example its label."
        )


def _check_classes(y: np.ndarray) -> int:
    """How many classes; their labels have to be 0, 1, … without a gap."""
    found = np.unique(y)
    if len(found) == 1:
        raise BadInput(
            f"--data: got one class in y, {found[0]} for all {len(y)} examples; expected at least two; add examples of "
            f"another."
        )
    if found[0] != 0 or found[-1] != len(found) - 1:
        raise BadInput(
            f"--data: got {len(found)} different labels in y, from {found[0]} to {found[-1]}; "
            f"expected 0, 1, … without a gap; "
            f"renumber them with numpy.unique(y, return_inverse=True)[1]."
        )
    return len(found)


def _check_fitted(x: np.ndarray, y: np.ndarray, fitted: Fitted, flat: bool) -> None:
    """Whether a trained network takes these examples and knows these labels."""
    channels = fitted.inputs.mean.shape[0]
    width = math.prod(x.shape[1:]) if flat else x.shape[-1]
    if x.shape[-1] != channels or width != fitted.width or (not flat and x.ndim != 4):
        of = f"images with {channels} channels"
        if flat:
            of = f"{of} and {fitted.width} values" if channels != fitted.width else f"{channels} features"
        raise BadInput(
            f"--data: got examples of shape {x.shape[1:]} in x; expected {of}, as the network was trained on; "
            f"pass data of that kind."
        )
    unknown = y[(y < 0) | (y >= fitted.classes)]
    if len(unknown):
        raise BadInput(
            f"--data: got label {unknown[0]} in y; expected 0 to {fitted.classes - 1}, the classes of the network; "
            f"number them as it was trained."
        )


def _check_test(x: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, classes: int) -> None:
    if x_test.shape[1:] != x.shape[1:]:
        raise BadInput(
            f"--data: got examples of shape {x_test.shape[1:]} in x_test; expected {x.shape[1:]}, that of x; "
            f"reshape them."
        )
    unseen = y_test[(y_test < 0) | (y_test >= classes)]
    if len(unseen):
        raise BadInput(
            f"--data: got label {unseen[0]} in y_test; expected labels of the training set, 0 to {classes - 1}; "
            f"number both alike."
        )


def _split(x: np.ndarray, y: np.ndarray, seed: int) -> list[np.ndarray]:
    """Training and test set with the same share of each class."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(y)
    counts = counts[counts > 0]
    rarest, classes = int(counts.min()), len(counts)
    tested = max(math.ceil(_TEST_SHARE * len(x)), classes)
    if rarest < 2 or len(x) - tested < classes:
        raise BadInput(
            f"--data: got {len(x)} examples of {classes} classes, {rarest} of the rarest; "
            f"expected at least 2 of each to split off a test set; add examples, or arrays x_test and y_test."
        )
    return train_test_split(x, y, test_size=tested, stratify=y, random_state=seed)
