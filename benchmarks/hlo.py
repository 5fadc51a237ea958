"""Reads optimized HLO: how many bytes of memory its kernels touch, and how many kernels there are.

A kernel touches its operands and its results. What is free: parameters, constants, tuples, bitcasts.
An operand of which only slices are read counts as those slices. Called computations are
followed: a loop counts its body as often as it runs, a conditional its cheapest branch (the
ordinary one, where the other is there for data that needs more). Buffers in on-chip memory (a layout
with S(n), n > 0) and workspaces (u8) count nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?\s*:\s*\{"?n"?\s*:\s*"?(\d+)')


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str


class Cost(NamedTuple):
    bytes: float
    kernels: int

    def __add__(self, other):
        return Cost(self.bytes + other.bytes, self.kernels + other.kernels)


class Program:
    """The computations of a compiled module, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header["name"], {})
                self.entry = header["name"] if header["entry"] else self.entry
            elif (found := _LINE.match(line)) and (instruction := _instruction(found["name"], found["rest"])):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("text: got no ENTRY computation; expected optimized HLO; pass compiled.as_text().")

    def cost(self) -> Cost:
        return self._cost(self.entry)

    def on_the_way(self, name: str = "") -> Iterator[Instruction]:
        """All instructions, those of loops and calls included, and of a conditional those of its cheapest branch."""
        for instruction in self.computations[name or self.entry].values():
            yield instruction
            if instruction.op == "conditional":
                yield from self.on_the_way(min(_branches(instruction), key=self._cost))
            elif instruction.op in ("call", "while"):
                yield from self.on_the_way(_CALLED.findall(instruction.attributes)[-1])

    def received(self, chips: int) -> tuple[dict[str, int], float]:
        """Collectives by kind, and the bytes that each chip receives; an asynchronous one is counted where it ends."""
        kinds, total = Counter[str](), 0.0
        for instruction in self.on_the_way():
            op = instruction.op.removesuffix("-done")
            if op in COLLECTIVES:
                kinds[op] += 1
                passes = 2 if op == "all-reduce" else 1  # a reduce-scatter and an all-gather
                total += passes * bytes_of(instruction.type, everywhere=True) * (chips - 1) / chips
            elif op == "reduce-scatter":
                raise ValueError(
                    f"text: got {op}; expected one of {', '.join(COLLECTIVES)}; say here what it delivers."
                )
        return dict(kinds), total

    def _cost(self, name: str) -> Cost:
        computation = self.computations[name]
        return sum((self._of(i, computation) for i in computation.values()), Cost(0, 0))

    def _of(self, instruction: Instruction, computation: dict[str, Instruction]) -> Cost:
        op = instruction.op
        if op in _FREE or op.endswith(("-done", "-update")):
            return Cost(0, 0)
        called = _CALLED.findall(instruction.attributes)
        if op == "while":
            trips = _TRIPS.search(instruction.attributes)
            body = self._cost(called[-1])
            times = int(trips[1]) if trips else 1
            return Cost(times * body.bytes, times * body.kernels)
        if op == "conditional":
            return min(self._cost(n) for n in _branches(instruction))
        if op in ("call", "async-start"):
            return self._cost(called[0])
        if op == "copy-start":  # a tuple of the target, the source again, and a token
            target = _ARRAY.search(instruction.type)[0]
            return Cost(bytes_of(target) + self._read(instruction, computation, []), 1)
        return Cost(bytes_of(instruction.type) + self._read(instruction, computation, called), 1)

    def _read(self, instruction: Instruction, computation: dict[str, Instruction], called: list[str]) -> float:
        """Bytes of the operands; each buffer once, however often it is named."""
        total = 0.0
        for place, operand in enumerate(instruction.operands):
            if operand in instruction.operands[:place] or operand not in computation:
                continue
            size = bytes_of(computation[operand].type)
            if instruction.op in _SLICES:
                size = min(size, bytes_of(instruction.type, everywhere=True))
            if instruction.op == "fusion" and called:
                size = min(size, self._sliced(called[0], place, size))
            total += size
        return total

    def _sliced(self, name: str, place: int, size: float) -> float:
        """What a fusion reads of its operand number ``place``: slices of it, if it takes nothing else."""
        body = self.computations[name]
        parameter = next((i.name for i in body.values() if i.op == "parameter" and i.operands == (str(place),)), None)
        users = [i for i in body.values() if parameter in i.operands and i.op != "parameter"]
        if users and all(i.op in _SLICES and i.operands[0] == parameter for i in users):
            return sum(bytes_of(i.type, everywhere=True) for i in users)
        return size


def facts(compiled: Any, dump: Path | None, name: str) -> tuple[dict[str, Any], Program]:
    """What is known of a compiled program; its text goes to a file of that name, if there is a folder to dump it in."""
    text, reported = compiled.as_text(), compiled.cost_analysis() or {}
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{name}.txt").write_text(text)
    program = Program(text)
    touched, kernels = program.cost()
    known = {
        "bytes": touched,  # of all kernels' operands and results
        "reported": reported.get("bytes accessed"),  # the compiler's own, of a TPU
        "kernels": kernels,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "flops": reported.get("flops"),
    }
    return known, program


def _branches(conditional: Instruction) -> list[str]:
    listed = _BRANCHES.search(conditional.attributes)
    return re.findall(r"[\w.\-]+", listed[1]) if listed else _CALLED.findall(conditional.attributes)


def _instruction(name: str, rest: str) -> Instruction | None:
    """From ``TYPE op(operands), attributes``."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    found = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not found:
        return None
    opening = end + found.end() - 1
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing]
    operands = (inner,) if found[1] == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inner))
    return Instruction(name, rest[:end], found[1], operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at ``opening`` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"text: got {text[:60]!r}; expected balanced parentheses; pass compiled.as_text().")


def bytes_of(type_: str, everywhere: bool = False) -> float:
    """Bytes of an array type, or of all arrays of a tuple type: in main memory, or in any memory."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(type_):
        off_chip = everywhere or not re.search(r"S\([1-9]", layout or "")
        if not off_chip or dtype in ("token", "opaque", "u8"):
            continue
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits / 8
    return total
