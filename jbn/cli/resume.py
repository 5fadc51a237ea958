"""A run that goes on from its last checkpoint: what of it is kept, and which options have to be the same."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields
from typing import Any

from jbn.cli.bad_input import BadInput
from jbn.cli.checkpoints import checkpoints
from jbn.cli.data import Data
from jbn.cli.fit import Keeping, SoFar
from jbn.cli.network import NetworkSpec
from jbn.cli.options import TrainOptions
from jbn.cli.parsers import dashed
from jbn.cli.processes import agreed, same
from jbn.training import TrainState

__all__ = ["resumed"]


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
            so_far = kept.newest(SoFar.at(start))
            if so_far.steps > options.epochs * epoch:
                raise BadInput(
                    f"--epochs: got {options.epochs}; expected at least {-(-so_far.steps // epoch)}, since the "
                    f"checkpoints in {folder} are {so_far.steps} steps on; pass more, or choose another "
                    f"--checkpoint-dir."
                )
        same("--checkpoint-dir", so_far.steps)
        yield so_far, Keeping(options.checkpoint_every or epoch, kept.save)


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
