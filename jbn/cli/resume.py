"""A run that goes on from its last checkpoint: what of it is kept, and which options have to be the same."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields
from typing import Any

import numpy as np

from jbn.cli.bad_input import BadInput
from jbn.cli.checkpoints import Checkpoint, checkpoints
from jbn.cli.data import Data
from jbn.cli.fit import Keeping, SoFar
from jbn.cli.network import NetworkSpec
from jbn.cli.options import TrainOptions
from jbn.cli.parsers import dashed
from jbn.cli.processes import agreed, same
from jbn.training import TrainState

__all__ = ["resumed"]

_HISTORIES = ("loss", "skipped", "times", "compile_s")


@contextmanager
def resumed(
    options: TrainOptions, name: str, spec: NetworkSpec, data: Data, start: TrainState, epoch: int
) -> Iterator[tuple[SoFar, Keeping | None]]:
    """Gives where a network stands, and what keeps it from there on; without ``--checkpoint-dir`` the start and None.

    Args:
        name: of the network, and of its folder in ``--checkpoint-dir``.
        start: the network before the first step, on the devices of the run.
        epoch: how many steps it has.
    """
    if options.checkpoint_dir is None:
        yield SoFar.at(start), None
        return
    folder = options.checkpoint_dir / name
    with ExitStack() as stack:
        with agreed():
            # A checkpoint that does not know an option was made before there was one.
            defaults = {dashed(each.name): each.default for each in _binding()}
            kept = stack.enter_context(checkpoints(folder, _identity(options, spec, data), defaults))
            found = kept.newest(start)
            so_far = SoFar.at(start) if found is None else _so_far(found)
            if so_far.steps > options.epochs * epoch:
                raise BadInput(
                    f"--epochs: got {options.epochs}; expected at least {-(-so_far.steps // epoch)}, since the "
                    f"checkpoints in {folder} are {so_far.steps} steps on; pass more, or choose another "
                    f"--checkpoint-dir."
                )
        same("--checkpoint-dir", so_far.steps)
        yield so_far, Keeping(options.checkpoint_every or epoch, lambda so_far: kept.save(_checkpoint(so_far)))


def _identity(options: TrainOptions, spec: NetworkSpec, data: Data) -> dict[str, Any]:
    """Every option that changes the result, and the data themselves."""
    values = {dashed(each.name): getattr(options, each.name) for each in _binding()}
    values |= {"--data": f"examples with the digest {data.digest}", "--norm": spec.norm}
    if options.stats == "local":
        values["--devices"] = f"{options.shards} in all with --stats local"
    return values


def _binding() -> list[Field]:
    """The options that have to be those of the checkpoint."""
    return [each for each in fields(TrainOptions) if not each.metadata["free"]]


def _checkpoint(so_far: SoFar) -> Checkpoint:
    """The run as it is kept; what it has not seen yet is left out, since Orbax takes no empty array."""
    histories = so_far.epochs | {name: getattr(so_far, name) for name in _HISTORIES}
    kept = {name: np.asarray(values) for name, values in histories.items()}
    return Checkpoint(so_far.steps, so_far.train_state, {name: values for name, values in kept.items() if values.size})


def _so_far(found: Checkpoint) -> SoFar:
    """The run that `_checkpoint` was given."""
    empty = SoFar.at(found.train_state)
    epochs = {name: found.histories[name].tolist() if name in found.histories else [] for name in empty.epochs}
    loss, skipped, times, compile_s = (found.histories[name] for name in _HISTORIES)
    return SoFar(found.train_state, loss, skipped, epochs, times.tolist(), compile_s.item())
