"""How kernels lie in memory: output features first, as PyTorch and Equinox have them, or last, as all others do."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Layout", "as_layout", "layout_of"]

_SPATIAL = "DHW"


class Layout(NamedTuple):
    """How one array is laid out here and there; equal patterns, or none, where it is as it is."""

    theirs: str = ""
    ours: str = ""
    functions: Any = None  # a pair, (to ours, to theirs), in the place of patterns

    def __str__(self) -> str:
        if self.functions:
            return "function"
        return self.theirs if self.theirs == self.ours else f"{self.theirs} → {self.ours}"

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return self._moved(array, self.theirs, self.ours, 0)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return self._moved(array, self.ours, self.theirs, 1)

    def _moved(self, array, source, target, function):
        if self.functions:
            return np.asarray(self.functions[function](array))
        return array if source == target else array.transpose([source.index(letter) for letter in target])


def pattern(rank: int, first: bool) -> str:
    """OI, OIHW and the like, or IO, HWIO."""
    spatial = _SPATIAL[5 - rank :] if rank <= 5 else "".join(chr(ord("a") + i) for i in range(rank - 2))
    return f"OI{spatial}" if first else f"{spatial}IO"


def as_layout(layout: Any) -> dict[str, Any]:
    """Answers by the name of a foreign array or module, and under "" for all others."""
    answers = {"": layout} if layout is None or isinstance(layout, str) else layout
    if not isinstance(answers, Mapping):
        raise TypeError(
            f'layout: got {type(layout).__name__}; expected "HWIO", "OIHW", or a dict of them by name; '
            f"say how your kernels lie."
        )
    for name, answer in answers.items():
        where = f"layout[{name!r}]" if answers is layout else "layout"
        pair = isinstance(answer, tuple) and len(answer) == 2 and all(callable(f) for f in answer)
        if not (pair or answer is None or _is_pattern(answer)):
            raise ValueError(
                f'{where}: got {answer!r}; expected "HWIO" or "OIHW", a pattern such as \'IOHW -> HWIO\', or two '
                f"functions (to ours, to theirs); say how the kernel lies."
            )
    return dict(answers)


def _is_pattern(answer: Any) -> bool:
    if answer in ("HWIO", "OIHW"):
        return True
    sides = [side.strip() for side in answer.split("->")] if isinstance(answer, str) else []
    return len(sides) == 2 and sorted(sides[0]) == sorted(sides[1]) and len(set(sides[0])) == len(sides[0]) > 0


def layout_of(
    answer: Any, kernels_first: bool, theirs: tuple[int, ...] | None, ours: tuple[int, ...], names: tuple[str, str]
) -> Layout:
    """The layout of the kernel of shape ``theirs``, None where it is to be made, at our place of shape ``ours``."""
    rank = len(ours)
    if isinstance(answer, tuple):
        return Layout(functions=answer)
    if isinstance(answer, str) and "->" in answer:
        source, target = (side.strip() for side in answer.split("->"))
        if len(source) != rank:
            raise ValueError(
                f"layout: got {answer!r} for {names[0]}; expected {rank} letters on either side, for {names[1]} has "
                f"shape {ours}; write one letter for each axis."
            )
        return _fitting([Layout(source, target)], theirs, ours, names)[0]
    foreign = pattern(rank, kernels_first)
    candidates = [Layout(foreign, pattern(rank, first)) for first in (False, True)]
    if answer is not None:
        candidates = [candidates[answer == "OIHW"]]
    elif not kernels_first or theirs is None:
        candidates = candidates[:1]  # as jbn has them; also where nothing says otherwise
    fitting = _fitting(candidates, theirs, ours, names)
    if len(fitting) > 1 and ours:
        raise ValueError(
            f"layout: got None, and {names[0]} of shape {theirs} fits {names[1]} transposed ({fitting[0]}) and as it "
            f'is ({fitting[1]}); expected to be told how your kernels lie; pass layout="HWIO" for outputs last '
            f'(in, out), or layout="OIHW".'
        )
    return fitting[0]


def _fitting(candidates, theirs, ours, names):
    fits = [c for c in candidates if theirs is None or _shape(c, theirs) == ours]
    if not fits:
        raise ValueError(
            f"{names[0]}: got shape {theirs}; expected one that fits {names[1]} of shape {ours} as "
            f"{' or '.join(map(str, candidates))}; map the layer elsewhere, or name another layout."
        )
    return fits


def _shape(layout, theirs):
    if len(theirs) != len(layout.theirs):
        return None
    return tuple(theirs[layout.theirs.index(letter)] for letter in layout.ours)
