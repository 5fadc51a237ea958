"""Deterministic costs: what a jaxpr or an optimized HLO module does at full size, and what compiles.

A conditional costs what one of its branches costs. ``branch=min`` is the path that ordinary data takes,
``branch=max`` the worst case.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.monitoring

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_REDUCES = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce",
    "argmax",
    "argmin",
    "dot_general",
)
_COMPILED = "/jax/core/compile/backend_compile_duration"


def jaxpr_reductions(fn: Callable[..., Any], *args: Any, size: int, branch: Any = min) -> int:
    """How many reductions of at least ``size`` values ``fn`` makes, by its jaxpr."""
    return _jaxpr_reductions(jax.make_jaxpr(fn)(*args).jaxpr, size, branch)


def _jaxpr_reductions(jaxpr: Any, size: int, branch: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _REDUCES:
            total += any(math.prod(v.aval.shape) >= size for v in eqn.invars)
            continue
        subs = [_jaxpr_reductions(sub, size, branch) for v in eqn.params.values() for sub in _jaxprs(v)]
        if subs:
            total += branch(subs) if eqn.primitive.name == "cond" else sum(subs)
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr


class Instruction(NamedTuple):
    """One line of HLO text."""

    name: str
    sizes: tuple[int, ...]  # elements of each array of the result
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]  # computations


_LINE = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$")
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Hlo:
    """The optimized HLO module of a compiled function, read from its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._computations: dict[str, list[Instruction]] = {}
        body: list[Instruction] = []
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := _HEAD.match(line):
                body = self._computations.setdefault(head["name"], [])
                if head["entry"]:
                    self._entry = head["name"]
            elif found := _LINE.match(line):
                body.append(_instruction(found))

    def reductions(self, size: int, branch: Any = min) -> int:
        """How many reductions over at least ``size`` values lie on the way from the entry."""

        def is_one(instruction: Instruction, size_of: dict[str, int]) -> bool:
            wide = any(size_of.get(name, 0) >= size for name in instruction.operands)
            return instruction.opcode in ("reduce", "dot") and wide

        return self._count(self._entry, is_one, branch, into_fusions=True)

    def full_size_results(self, size: int, branch: Any = min) -> int:
        """How many arrays of at least ``size`` values are written: results of fusions, and of all else."""
        free = (
            "parameter",
            "get-tuple-element",
            "tuple",
            "bitcast",
            "conditional",
            "while",
            "call",
            "constant",
        )

        def is_one(instruction: Instruction, _: dict[str, int]) -> bool:
            return instruction.opcode not in free and any(n >= size for n in instruction.sizes)

        return self._count(self._entry, is_one, branch, into_fusions=False)

    def reductions_wait(self, size: int) -> bool:
        """Whether, in the entry, no two reductions over at least ``size`` values could run side by side."""
        above: dict[str, set[str]] = {}
        size_of: dict[str, int] = {}
        wide: list[str] = []
        for instruction in self._computations[self._entry]:
            size_of[instruction.name] = max(instruction.sizes, default=0)
            before = {name: above.get(name, set()) for name in instruction.operands}
            above[instruction.name] = set(before).union(*before.values())
            if size_of[instruction.name] < size <= max((size_of.get(name, 0) for name in before), default=0):
                wide.append(instruction.name)
        wide = [name for name in wide if not name.startswith(("get-tuple-element", "conditional", "cond"))]
        return all(first in above[second] for first, second in itertools.pairwise(wide)) and len(wide) > 1

    def collectives(self) -> list[Instruction]:
        """All collectives of the module, asynchronous ones once."""
        return [
            i for body in self._computations.values() for i in body if i.opcode.removesuffix("-start") in COLLECTIVES
        ]

    def collectives_met(self, branch: Any = min) -> int:
        """How many collectives lie on the way from the entry, asynchronous ones once."""

        def is_one(instruction: Instruction, _: dict[str, int]) -> bool:
            return instruction.opcode.removesuffix("-start") in COLLECTIVES

        return self._count(self._entry, is_one, branch, into_fusions=False)

    def _count(self, computation: str, is_one: Any, branch: Any, into_fusions: bool) -> int:
        total = 0
        body = self._computations[computation]
        size_of = {i.name: max(i.sizes, default=0) for i in body}
        for instruction in body:
            if is_one(instruction, size_of):
                total += 1
            if instruction.opcode == "reduce" or (instruction.opcode == "fusion" and not into_fusions):
                continue
            below = [self._count(name, is_one, branch, into_fusions) for name in instruction.called]
            if below:
                total += branch(below) if instruction.opcode == "conditional" else sum(below)
        return total


def _instruction(found: re.Match[str]) -> Instruction:
    sizes = tuple(math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(found["shape"]))
    rest = found["rest"]
    inside = rest[: _closing(rest)]
    operands = tuple(name for name in re.findall(r"%([\w.\-]+)", inside))
    called = tuple(re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(rest[len(inside) :]))))
    return Instruction(found["name"], sizes, found["opcode"], operands, called)


def _closing(rest: str) -> int:
    depth = 1
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if not depth:
            return i
    return len(rest)


def compile_hlo(fn: Callable[..., Any], *args: Any, **jit_options: Any) -> tuple[Hlo, Any]:
    """(module, memory analysis) of ``fn`` compiled for the default backend."""
    compiled = jax.jit(fn, **jit_options).lower(*args).compile()
    return Hlo(compiled.as_text()), compiled.memory_analysis()


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for each module that the backend compiles inside the block."""
    seen: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == _COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
