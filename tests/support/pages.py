"""Pages of documentation whose examples are run: those that need a framework which is not installed are left out."""

import doctest
import importlib.util
import re
from bisect import bisect

_IMPORTED = re.compile(r"^(?:import|from) (?:jbn\.)?(flax|linen|nnx|equinox|haiku|keras)\b", re.MULTILINE)


def needs_what_is_absent(code: str) -> bool:
    """Whether this code imports a framework that is not installed."""
    packages = {{"linen": "flax", "nnx": "flax"}.get(name, name) for name in _IMPORTED.findall(code)}
    return any(importlib.util.find_spec(package) is None for package in packages)


def leave_out_what_is_absent(text: str, examples: list[doctest.Example]) -> None:
    """Skips the examples of each section, from one heading to the next, in which an absent framework is imported."""
    headings = [number for number, line in enumerate(text.splitlines()) if re.match("#+ ", line)]
    sections = [bisect(headings, example.lineno) for example in examples]
    absent = {s for s, example in zip(sections, examples, strict=True) if needs_what_is_absent(example.source)}
    for section, example in zip(sections, examples, strict=True):
        if section in absent:
            example.options[doctest.SKIP] = True
