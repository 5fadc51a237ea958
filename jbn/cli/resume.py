"""A run that goes on from its last checkpoint: what of it is kept, and which options have to be the same."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields
from typing import Any

import jax
import numpy as np

from jbn.cli.bad_input import BadInput
from jbn.cli.checkpoints import Checkpoint, checkpoints
from jbn.cli.data import Data
from jbn.cli.devices import local
from jbn.cli.fit import Keeping, SoFar
from jbn.cli.network import NetworkSpec
from jbn.cli.options import TrainOptions, dashed
from jbn.cli.processes import agreed, same
from jbn.cli.saving import named
from jbn.training import TrainState

__all__ = ["resumed"]


@contextmanager
def resumed(
    options: TrainOptions, name: str, spec: NetworkSpec, data: Data, start: TrainState, epoch: int
) -> Iterator[tuple[SoFar, Keeping | None]]:
    """Gives where a network stands, and what keeps it from there on; without ``--checkpoint-dir`` the start and None.

    Args:
        name: of the network, and of its folder in ``--checkpoint-dir``.
        start: the network before the first step.
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
            found = kept.newest()
            so_far = SoFar.at(start) if found is None else _restored(found.arrays, start)
            if so_far.steps > options.epochs * epoch:
                raise BadInput(
                    f"--epochs: got {options.epochs}; expected at least {-(-so_far.steps // epoch)}, since the "
                    f"checkpoints in {folder} are {so_far.steps} steps on; pass more, or choose another "
                    f"--checkpoint-dir."
                )
        same("--checkpoint-dir", so_far.steps)

        def save(so_far: SoFar) -> None:
            kept.save(Checkpoint(so_far.steps, _arrays(so_far)))

        yield so_far, Keeping(options.checkpoint_every or epoch, save)


def _identity(options: TrainOptions, spec: NetworkSpec, data: Data) -> dict[str, Any]:
    """Every option that changes the result, and the data themselves."""
    values = {dashed(each.name): getattr(options, each.name) for each in _binding()}
    values |= {"--data": f"examples with the digest {data.digest}", "--norm": spec.norm or "none"}
    if options.stats == "local":
        values["--devices"] = f"{options.shards} in all with --stats local"
    return values


def _binding() -> list[Field]:
    """The options that have to be those of the checkpoint."""
    return [each for each in fields(TrainOptions) if not each.metadata["free"]]


def _arrays(so_far: SoFar) -> dict[str, np.ndarray]:
    """The run as arrays: train_state/params/0/W, …, loss, skipped, epochs/test_accuracy, …, times, compile_s."""
    histories = {f"epochs/{name}": np.asarray(values, np.float64) for name, values in so_far.epochs.items()}
    return {
        **{name: np.asarray(local(leaf)) for name, leaf in named({"train_state": so_far.train_state})[0]},
        "loss": so_far.loss,
        "skipped": so_far.skipped,
        **histories,
        "times": np.asarray(so_far.times, np.float64),
        "compile_s": np.asarray(so_far.compile_s, np.float64),
    }


def _restored(arrays: dict[str, np.ndarray], start: TrainState) -> SoFar:
    """The run that `_arrays` was given, of a network that starts like this."""
    leaves, treedef = named({"train_state": start})
    for name, leaf in leaves:
        got = arrays.get(name)
        if got is None or (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
            raise BadInput(
                f"--checkpoint-dir: got checkpoints without an array {name} {leaf.dtype}{list(leaf.shape)}; expected "
                f"those of this version of jbn; choose another --checkpoint-dir."
            )
    epochs = {name: arrays[f"epochs/{name}"].tolist() for name in SoFar.at(start).epochs}
    return SoFar(
        jax.tree.unflatten(treedef, [arrays[name] for name, _ in leaves])["train_state"],
        arrays["loss"],
        arrays["skipped"],
        epochs,
        arrays["times"].tolist(),
        arrays["compile_s"].item(),
    )
