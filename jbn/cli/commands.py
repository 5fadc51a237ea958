"""The commands as typer sees them: each turns its options into a job, to be run outside of typer."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from jbn.cli import options
from jbn.cli.bad_input import BadInput
from jbn.cli.bench import options as bench_options
from jbn.cli.bench.options import BenchOptions
from jbn.cli.options import TrainOptions, choice, fresh_folder, integer, real, sizes

__all__ = ["parse"]

_app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
# click's UsageError, wherever this version of typer takes click from.
_UsageError: Any = typer.BadParameter.__base__


def parse(argv: Sequence[str]) -> Callable[[], None] | None:
    """The job that the arguments ask for; None where the answer (``--help``) was given already."""
    try:
        job = typer.main.get_command(_app).main(args=list(argv), prog_name="jbn", standalone_mode=False)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "jbn"
        message = " ".join(error.format_message().split()).rstrip(".")
        raise BadInput(f"{message}; see {command} --help.") from None
    except typer.Abort:  # typer's word for Ctrl-C
        raise KeyboardInterrupt from None
    return job if callable(job) else None


def _option(parser: Callable[[Any], Any], metavar: str, help_: str) -> Any:
    return typer.Option(parser=parser, metavar=metavar, help=help_)


def _words(option: str, allowed: tuple[str, ...], help_: str) -> Any:
    return _option(choice(option, allowed), "|".join(allowed), help_)


@_app.callback()
def _root() -> None:
    """Batch normalization for JAX."""


@_app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Arrays x, y, and optionally x_test, y_test.  [default: handwritten digits]",
        ),
    ] = None,
    norm: Annotated[
        str, _words("--norm", options.NORMS, "Normalize before the activation (z), after it (a), or not.")
    ] = "z",
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Train the same network without batch norm too.")
    ] = True,
    optimizer: Annotated[str, _words("--optimizer", options.OPTIMIZERS, "How to descend.")] = "sgd",
    lr: Annotated[float, _option(real("--lr", 1.0, open_=True), "FLOAT", "Learning rate.")] = 1.0,
    weight_decay: Annotated[
        float, _option(real("--weight-decay", 1e-4), "FLOAT", "Decoupled; not of γ, β and b.")
    ] = 0.0,
    hidden: Annotated[tuple, _option(sizes("--hidden"), "INT,INT,…", "Widths of the hidden layers.")] = "128,128,128",  # type: ignore[assignment]
    activation: Annotated[str, _words("--activation", options.ACTIVATIONS, "Of the hidden layers.")] = "sigmoid",
    epochs: Annotated[int, _option(integer("--epochs", 1, 30), "INT", "Passes over the training set.")] = 30,
    batch_size: Annotated[int, _option(integer("--batch-size", 1, 64), "INT", "Examples a step.")] = 64,
    accumulate: Annotated[
        int, _option(integer("--accumulate", 1, 1), "INT", "Microbatches that a batch is split into.")
    ] = 1,
    bn_momentum: Annotated[
        float, _option(real("--bn-momentum", 0.9, most=1.0), "FLOAT", "Share of running statistics kept.")
    ] = 0.9,
    target_loss: Annotated[
        float, _option(real("--target-loss", 0.1, open_=True), "FLOAT", "Loss to count the steps to.")
    ] = 0.1,
    dtype: Annotated[str, _words("--dtype", options.DTYPES, "Of the computation.")] = "float32",
    seed: Annotated[
        int, _option(integer("--seed", 0, 0, 2**32 - 1), "INT", "Of the split, the initial W and the order.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder for the results.  [default: runs/train-<date>-<time>]"),
    ] = None,
) -> Callable[[], None]:
    """Train a network with and without batch norm, side by side, and show the difference.

    The defaults are the network of the paper's figure 1: three hidden layers of sigmoids, trained with
    plain gradient descent.
    """
    chosen = TrainOptions(
        data=data,
        out=fresh_folder("train") if out is None else out,
        norm=norm,
        compare=compare,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        hidden=hidden,
        activation=activation,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        bn_momentum=bn_momentum,
        target_loss=target_loss,
        dtype=dtype,
        seed=seed,
    )
    return partial(_train, chosen)


def _train(chosen: TrainOptions) -> None:
    # Imported when the options are known to be good, and where an interrupt is not typer's.
    from jbn.cli.train import run

    run(chosen)


@_app.command()
def bench(
    shape: Annotated[tuple, _option(bench_options.shape, "INT,INT,…", "Of x.")] = "32,56,56,64",  # type: ignore[assignment]
    dtype: Annotated[str, _words("--dtype", bench_options.DTYPES, "Of x and y.")] = "float32",
    axis: Annotated[int, _option(bench_options.axis, "INT", "The feature axis; -1 for NHWC, 1 for NCHW.")] = -1,
    rounds: Annotated[
        int, _option(integer("--rounds", 7, 11), "INT", "In which each takes a turn, fewer if time is up.")
    ] = 11,
    json: Annotated[bool, typer.Option("--json", help="JSON on a terminal too.")] = False,
) -> Callable[[], None]:
    """Time batch norm on this device, beside flax.linen, torch (where installed) and bare copies of x.

    Forward, forward+backward and evaluation, in under a minute.
    """
    return partial(_bench, BenchOptions(shape=shape, dtype=dtype, axis=axis, rounds=rounds, json=json))


def _bench(chosen: BenchOptions) -> None:
    from jbn.cli.bench.compare import run

    run(chosen)
