"""What a command has found: lines and tables on a terminal, one JSON document elsewhere."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jbn.cli.streams import printing

__all__ = ["show", "to_json"]


def show(document: dict[str, Any], lines: Iterable[str | Table]) -> None:
    """Prints what a command found."""
    with printing():
        if not sys.stdout.isatty():
            print(to_json(document))
            return
        for line in lines:
            print(line) if isinstance(line, str) else Console().print(line)


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
