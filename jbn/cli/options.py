"""The options of a run: each parser takes one raw value and returns its canonical form, or raises."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jbn.cli.bad_input import BadInput

__all__ = [
    "ACTIVATIONS",
    "DEFAULTS",
    "DTYPES",
    "NETWORKS",
    "NORMS",
    "OPTIMIZERS",
    "STATS",
    "TrainOptions",
    "address",
    "choice",
    "integer",
    "of_network",
    "real",
    "sizes",
]

NETWORKS = ("mlp", "resnet")
NORMS = ("z", "a", "none")
OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")
ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu", "silu")
DTYPES = ("float32", "bfloat16")
STATS = ("global", "local")


# What the options are that were not given. Those of the other network have no meaning.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (128, 128, 128), "activation": "sigmoid", "lr": 1.0, "epochs": 30},
    "resnet": {"widths": (8, 16), "blocks": 1, "activation": "relu", "lr": 0.3, "epochs": 15},
}
# Options that only one network has, and where to look instead.
_OWN = {
    "hidden": ("mlp", "leave it out, or pass --widths and --blocks"),
    "widths": ("resnet", "leave it out, or pass --hidden"),
    "blocks": ("resnet", "leave it out, or pass --hidden"),
}


@dataclass(frozen=True)
class TrainOptions:
    """What ``jbn train`` was asked for, in the words of its options; None for what its network does not have."""

    network: str
    data: Path | None
    out: Path | None
    norm: str
    compare: bool
    optimizer: str
    lr: float
    weight_decay: float
    hidden: tuple[int, ...] | None
    widths: tuple[int, ...] | None
    blocks: int | None
    activation: str
    epochs: int
    batch_size: int
    accumulate: int
    bn_momentum: float
    target_loss: float
    dtype: str
    seed: int
    devices: int
    stats: str
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    timeout: int
    checkpoint_dir: Path | None
    checkpoint_every: int | None

    @property
    def shards(self) -> int:
        """The devices of all processes together, each of which has its share of a batch."""
        return self.devices * (self.num_processes or 1)

    def __post_init__(self) -> None:
        if self.network == "resnet" and self.norm == "a":
            raise BadInput(
                "--norm: got a with --network resnet; expected z or none; a residual network normalizes before "
                "the activation, as in --norm z."
            )
        if self.batch_size % self.accumulate:
            raise BadInput(
                f"--accumulate: got {self.accumulate}; expected a divisor of --batch-size {self.batch_size}; "
                f"pass sizes that divide, as in --batch-size 64 --accumulate 4."
            )
        if self.norm != "none" and self.batch_size == self.accumulate:
            raise BadInput(
                f"--batch-size: got {self.batch_size} with --accumulate {self.accumulate}; expected at least "
                f"2 examples in a microbatch, since the variance of one is 0; use a larger --batch-size."
            )
        self._check_processes()
        self._check_shards()
        self._check_checkpoints()

    def _check_processes(self) -> None:
        together = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        given = [f"--{name.replace('_', '-')}" for name, value in together.items() if value is not None]
        if 0 < len(given) < len(together):
            raise BadInput(
                f"{given[0]}: got {' and '.join(given)} alone; expected --coordinator, --num-processes and "
                f"--process-id together; as in --coordinator localhost:1234 --num-processes 2 --process-id 0."
            )
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            raise BadInput(
                f"--process-id: got {self.process_id} with --num-processes {self.num_processes}; expected 0 to "
                f"{self.num_processes - 1}; give each process a number of its own."
            )

    def _check_shards(self) -> None:
        micro, name = self.batch_size // self.accumulate, f"--batch-size {self.batch_size}"
        if self.accumulate > 1:
            name += f" --accumulate {self.accumulate}"
        got = f"--devices: got {self.devices}"
        if self.num_processes is not None:
            got += f" in each of {self.num_processes} processes"
        if micro % self.shards:
            raise BadInput(
                f"{got} for {name}; expected a number that divides the examples of a microbatch, {micro}; "
                f"pass sizes that divide, as in --batch-size 64 --devices 4."
            )
        if self.stats == "local" and self.norm != "none" and micro == self.shards:
            raise BadInput(
                f"{got} for {name} with --stats local; expected at least 2 examples a device, since the variance of "
                f"one is 0; use fewer devices, or --stats global."
            )

    def _check_checkpoints(self) -> None:
        if self.checkpoint_dir is None:
            if self.checkpoint_every is not None:
                raise BadInput(
                    f"--checkpoint-every: got {self.checkpoint_every} without --checkpoint-dir; expected both; "
                    f"pass --checkpoint-dir DIR."
                )
            return
        name = str(self.checkpoint_dir)
        if name.encode(errors="replace").decode() != name:
            raise BadInput(
                f"--checkpoint-dir: got {name}; expected a name in UTF-8, since Orbax takes no other; choose another "
                f"DIR."
            )
        if self.out is not None and self.checkpoint_dir.resolve().is_relative_to(self.out.resolve()):
            raise BadInput(
                f"--checkpoint-dir: got {self.checkpoint_dir}, which is in --out {self.out}; expected a folder outside "
                f"of it, since it is new and appears at the end; choose another DIR."
            )


def of_network(network: str, **given: Any) -> dict[str, Any]:
    """The options whose default is the network's own: those given, the others filled in."""
    for name, (owner, advice) in _OWN.items():
        if network != owner and given[name] is not None:
            raise BadInput(f"--{name}: got it with --network {network}; expected --network {owner}; {advice}.")
    return {name: DEFAULTS[network].get(name) if value is None else value for name, value in given.items()}


def choice(option: str, allowed: tuple[str, ...]) -> Callable[[Any], str]:
    """A parser for one of a few words."""

    def parse(raw: Any) -> str:
        if raw not in allowed:
            raise BadInput(f"{option}: got {raw!r}; expected one of {', '.join(allowed)}; as in {option} {allowed[0]}.")
        return raw

    return parse


def address(option: str) -> Callable[[Any], str]:
    """A parser for HOST:PORT."""

    def parse(raw: Any) -> str:
        host, _, port = str(raw).rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise BadInput(f"{option}: got {raw!r}; expected HOST:PORT; as in {option} localhost:1234.")
        return raw

    return parse


def integer(option: str, least: int, example: int, most: int | None = None) -> Callable[[Any], int]:
    """A parser for a whole number in a range, both ends included."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(raw: Any) -> int:
        try:
            value = int(str(raw))
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise BadInput(f"{option}: got {raw}; expected a whole number {limits}; as in {option} {example}.")
        return value

    return parse


def real(
    option: str, example: float, *, least: float = 0.0, most: float = math.inf, open_: bool = False
) -> Callable[[Any], float]:
    """A parser for a finite number in a range; ``open_`` leaves out the lower end."""
    limits = f"above {least:g}" if open_ else f"of at least {least:g}" if most == math.inf else ""
    limits = limits or f"from {least:g} to {most:g}"

    def parse(raw: Any) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        inside = least < value if open_ else least <= value
        if not (inside and value <= most and math.isfinite(value)):
            raise BadInput(f"{option}: got {raw}; expected a finite number {limits}; as in {option} {example}.")
        return value

    return parse


def sizes(option: str, example: str, each: str) -> Callable[[Any], tuple[int, ...]]:
    """A parser for widths between commas."""

    def parse(raw: Any) -> tuple[int, ...]:
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
