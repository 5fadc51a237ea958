"""The options of ``jbn train`` beside those of its network. Each is declared once."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jbn.cli.bad_input import BadInput
from jbn.cli.network import NetworkOptions
from jbn.cli.parsers import address, choice, dashed, integer, option, path, real

__all__ = ["TrainOptions"]

OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")
STATS = ("global", "local")


@dataclass(frozen=True)
class TrainOptions(NetworkOptions):
    """What ``jbn train`` was asked for, in the words of its options; None for what its network does not have."""

    data: Path | None = option(
        path, "FILE.npz", "Arrays x, y, and optionally x_test, y_test.  [default: handwritten digits]", own=True
    )
    compare: bool = option(None, "", "Train the same network without batch norm too.", True, free=True)
    optimizer: str = option(choice(OPTIMIZERS), "|".join(OPTIMIZERS), "How to descend.", "sgd")
    lr: float = option(real(1.0, open_=True), "FLOAT", "Learning rate.", mlp=1.0, resnet=0.3)
    weight_decay: float = option(real(1e-4), "FLOAT", "Decoupled; not of γ, β and b.", 0.0)
    epochs: int = option(integer(1, 30), "INT", "Passes over the training set.", free=True, mlp=30, resnet=15)
    batch_size: int = option(integer(1, 64), "INT", "Examples a step.", 64)
    accumulate: int = option(integer(1, 1), "INT", "Microbatches that a batch is split into.", 1)
    bn_momentum: float = option(real(0.9, most=1.0), "FLOAT", "Share of running statistics kept.", 0.9)
    target_loss: float = option(real(0.1, open_=True), "FLOAT", "Loss to count the steps to.", 0.1, free=True)
    seed: int = option(integer(0, 0, 2**32 - 1), "INT", "Of the split, the initial W and the order.", 0)
    devices: int = option(integer(1, 4), "INT", "Devices of each process, over which a batch is split.", 1, free=True)
    stats: str = option(
        choice(STATS), "global|local", "Normalize with the whole batch, or each device with its own share.", "global"
    )
    coordinator: str | None = option(
        address, "HOST:PORT", "Where process 0 waits for the others, if there are several.", free=True
    )
    num_processes: int | None = option(integer(1, 2), "INT", "How many take part; with --coordinator.", free=True)
    process_id: int | None = option(
        integer(0, 0), "INT", "Which of them this is; 0 shows and writes.", free=True, own=True
    )
    timeout: int = option(
        integer(1, 60), "SECONDS", "How long processes wait for each other to start.", 60, free=True, own=True
    )
    checkpoint_dir: Path | None = option(
        path,
        "DIR",
        "Folder to save the run in, and to go on from if it was cut short. More --epochs train on.",
        free=True,
    )
    checkpoint_every: int | None = option(
        integer(1, 100), "INT", "Steps between checkpoints.  [default: an epoch]", free=True
    )
    out: Path | None = option(
        path, "DIR", "New folder for the results.  [default: runs/train-<date>-<time>]", free=True, own=True
    )

    @classmethod
    def of(cls, **given: Any) -> "TrainOptions":
        """The options that were given, and for the others the defaults of the network."""
        network, filled = given["network"], {}
        declared = {each.name: each.metadata["by_network"] for each in fields(cls) if each.metadata["by_network"]}
        for name, defaults in declared.items():
            if network not in defaults and given[name] is not None:
                (owner,) = defaults
                instead = [dashed(other) for other, values in declared.items() if set(values) == {network}]
                raise BadInput(
                    f"{dashed(name)}: got it with --network {network}; expected --network {owner}; leave it out, "
                    f"or pass {' and '.join(instead)}."
                )
            filled[name] = defaults.get(network) if given[name] is None else given[name]
        return cls(**{**given, **filled})

    @property
    def shards(self) -> int:
        """The devices of all processes together, each of which has its share of a batch."""
        return self.devices * (self.num_processes or 1)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        given = [dashed(name) for name, value in together.items() if value is not None]
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
