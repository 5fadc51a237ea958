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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|opt-barrier|.*-(done|update)"
)
_SLICES = {"slice", "dynamic-slice", "gather"}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_LINE = re.compile(
    r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)"
    r"\((?P<operands>.*?)\)(?P<attributes>(, \w+=.*)?)$"
)
_CALLED = re.compile(
    r"(?:to_apply|calls|body|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?\s*:\s*\{"?n"?\s*:\s*"?(\d+)')


class Instruction(NamedTuple):
    """One line of a computation."""

    type: str
    op: str
    operands: tuple[str, ...]  # their names; of a parameter, its number
    called: list[str]  # computations, without the condition of a loop
    trips: int  # how often a loop runs; 1 where the compiler does not know


class Program:
    """The computations of a compiled module, each with its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header["name"], {})
                if header["entry"]:
                    self.entry = header["name"]
            elif found := _LINE.match(line):
                trips = _TRIPS.search(found["attributes"])
                current[found["name"]] = Instruction(
                    found["type"],
                    found["op"],
                    tuple(re.findall(r"^\d+$|(?<=%)[\w.\-]+", found["operands"])),
                    re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(found["attributes"]))),
                    int(trips[1]) if trips else 1,
                )

    def kernels(self, name: str = "") -> Iterator[tuple[Instruction, float]]:
        """What runs of a computation, the entry unless named, and the bytes that each of it touches."""
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            op, called = instruction.op, instruction.called
            if op == "conditional":
                yield from min((list(self.kernels(branch)) for branch in called), key=cost)
            elif op == "while":
                yield from instruction.trips * list(self.kernels(called[-1]))
            elif op in ("call", "async-start"):
                yield from self.kernels(called[0])
            else:
                yield instruction, self._touched(instruction, computation)

    def received(self, chips: int) -> tuple[dict[str, int], float]:
        """Collectives by kind, and the bytes that each chip receives; an asynchronous one is counted where it ends."""
        kinds, total = Counter[str](), 0.0
        for instruction, _ in self.kernels():
            op = instruction.op.removesuffix("-done")
            if op in COLLECTIVES:
                kinds[op] += 1
                # An all-reduce is a reduce-scatter and an all-gather; a reduce-scatter leaves each chip its share.
                passes = {"all-reduce": 2, "reduce-scatter": chips}.get(op, 1)
                total += passes * bytes_of(instruction.type, everywhere=True) * (chips - 1) / chips
        return dict(kinds), total

    def _touched(self, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes of the results, and of the operands, each once however often it is named."""
        if _FREE.fullmatch(instruction.op):
            return 0
        # The start of a copy is a tuple of the target, the source again, and a token.
        result = _ARRAY.search(instruction.type)[0] if instruction.op == "copy-start" else instruction.type
        total = bytes_of(result)
        for operand in dict.fromkeys(instruction.operands):
            if operand not in computation:
                continue
            size = bytes_of(computation[operand].type)
            if instruction.op in _SLICES:
                size = min(size, bytes_of(instruction.type, everywhere=True))
            if instruction.op == "fusion":
                size = min(size, self._sliced(instruction, operand, size))
            total += size
        return total

    def _sliced(self, fusion: Instruction, operand: str, size: float) -> float:
        """What a fusion reads of an operand: slices of it, if it takes nothing else."""
        body, place = self.computations[fusion.called[0]], str(fusion.operands.index(operand))
        parameter = next((n for n, i in body.items() if i.op == "parameter" and i.operands == (place,)), None)
        users = [i for i in body.values() if parameter in i.operands]
        if users and all(i.op in _SLICES and i.operands[0] == parameter for i in users):
            return sum(bytes_of(i.type, everywhere=True) for i in users)
        return size


def cost(ran: Iterable[tuple[Instruction, float]]) -> tuple[float, int]:
    """Bytes touched, and kernels, of what `Program.kernels` gives."""
    touched = [size for instruction, size in ran if not _FREE.fullmatch(instruction.op)]
    return sum(touched), len(touched)


def facts(compiled: Any, dump: Path | None, name: str) -> tuple[dict[str, Any], Program]:
    """What is known of a compiled program; its text goes to a file of that name, if there is a folder to dump it in."""
    text, reported = compiled.as_text(), compiled.cost_analysis() or {}
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{name}.txt").write_text(text)
    program = Program(text)
    touched, kernels = cost(program.kernels())
    known = {
        "bytes": touched,  # of all kernels' operands and results
        "reported": reported.get("bytes accessed"),  # the compiler's own, of a TPU
        "kernels": kernels,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "flops": reported.get("flops"),
    }
    return known, program


def bytes_of(type_: str, everywhere: bool = False) -> float:
    """Bytes of an array type, or of all arrays of a tuple type: in main memory, or in any memory."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(type_):
        if dtype not in ("token", "opaque", "u8") and (everywhere or not re.search(r"S\([1-9]", layout)):
            bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
            total += math.prod(int(n) for n in sizes.split(",") if n) * bits / 8
    return total
