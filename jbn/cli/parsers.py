"""How an option is declared, and what values it takes.

A parser is given an option and a raw value, and returns its canonical form, or raises.
"""

import math
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

from jbn.cli.bad_input import BadInput

__all__ = ["Parser", "address", "choice", "dashed", "integer", "option", "path", "real", "sizes"]

Parser = Callable[[str, Any], Any]


def option(
    parse: Parser | None,
    metavar: str,
    help_: str,
    default: Any = None,
    *,
    free: bool = False,
    own: bool = False,
    **by_network: Any,
) -> Any:
    """Declares an option, as a field of a dataclass.

    Args:
        parse: None for a pair of flags, --name and --no-name.
        metavar: what stands for the value in ``--help``.
        help_: a line for it.
        default: when it is not given; ``by_network`` where that depends on the network, and where only one has it.
        free: whether it leaves the result of a run as it is, so that a run may go on from a checkpoint with another.
        own: whether each of several processes may have its own.
    """
    if by_network:
        shown = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in by_network.items()}
        (network, value), *others = shown.items()
        each = ", ".join(f"{value} ({name})" for name, value in shown.items())
        help_ += f"  [default: {each}]" if others else f"  [{network} only; default: {value}]"
    metadata = {"parse": parse, "metavar": metavar, "help": help_, "free": free, "own": own, "by_network": by_network}
    return field(default=default, metadata=metadata)


def dashed(name: str) -> str:
    """A field as it is typed."""
    return f"--{name.replace('_', '-')}"


def choice(allowed: tuple[str, ...]) -> Parser:
    """For one of a few words."""

    def parse(option: str, raw: Any) -> str:
        if raw not in allowed:
            raise BadInput(f"{option}: got {raw!r}; expected one of {', '.join(allowed)}; as in {option} {allowed[0]}.")
        return raw

    return parse


def address(option: str, raw: Any) -> str:
    """For HOST:PORT."""
    host, _, port = str(raw).rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise BadInput(f"{option}: got {raw!r}; expected HOST:PORT; as in {option} localhost:1234.")
    return raw


def path(option: str, raw: Any) -> Path:
    """For a file or a folder, whether it is there or not."""
    return Path(raw)


def integer(least: int, example: int, most: int | None = None) -> Parser:
    """For a whole number in a range, both ends included."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(option: str, raw: Any) -> int:
        try:
            value = int(str(raw))
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise BadInput(f"{option}: got {raw}; expected a whole number {limits}; as in {option} {example}.")
        return value

    return parse


def real(example: float, *, least: float = 0.0, most: float = math.inf, open_: bool = False) -> Parser:
    """For a finite number in a range; ``open_`` leaves out the lower end."""
    limits = f"above {least:g}" if open_ else f"of at least {least:g}" if most == math.inf else ""
    limits = limits or f"from {least:g} to {most:g}"

    def parse(option: str, raw: Any) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        inside = least < value if open_ else least <= value
        if not (inside and value <= most and math.isfinite(value)):
            raise BadInput(f"{option}: got {raw}; expected a finite number {limits}; as in {option} {example}.")
        return value

    return parse


def sizes(example: str, each: str) -> Parser:
    """For widths between commas."""

    def parse(option: str, raw: Any) -> tuple[int, ...]:
        try:
            widths = tuple(int(width) for width in str(raw).split(","))
        except ValueError:
            widths = ()
        if not widths or min(widths) < 1:
            raise BadInput(
                f"{option}: got {raw!r}; expected widths of at least 1 between commas, one a {each}; "
                f"as in {option} {example}."
            )
        return widths

    return parse
