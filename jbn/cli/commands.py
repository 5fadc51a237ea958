"""The commands as typer sees them: each turns its options into a job, to be run outside of typer."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

import jbn
from jbn.cli import options
from jbn.cli.bad_input import BadInput
from jbn.cli.bench import options as bench_options
from jbn.cli.bench.options import BenchOptions
from jbn.cli.options import TrainOptions, address, choice, integer, of_network, real, sizes

__all__ = ["parse"]

_app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
# click's UsageError, wherever this version of typer takes click from.
_UsageError: Any = typer.BadParameter.__base__


def parse(argv: Sequence[str]) -> Callable[[], int | None] | None:
    """The job that the arguments ask for, which may give an exit code; None where ``--help`` was the answer."""
    try:
        job = typer.main.get_command(_app).main(args=list(argv) or ["--help"], prog_name="jbn", standalone_mode=False)
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


def _defaults(name: str) -> str:
    """What an option is for each network, when it is not given."""
    values = {network: own[name] for network, own in options.DEFAULTS.items() if name in own}
    shown = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in values.items()}
    if len(shown) == 1:
        return "".join(f"[{network} only; default: {value}]" for network, value in shown.items())
    return f"[default: {', '.join(f'{value} ({network})' for network, value in shown.items())}]"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jbn {jbn.__version__}")
        raise typer.Exit


@_app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Batch normalization for JAX."""


@_app.command()
def train(
    network: Annotated[
        str, _words("--network", options.NETWORKS, "Dense layers (mlp), or convolutions with shortcuts (resnet).")
    ] = "mlp",
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
    lr: Annotated[
        float | None, _option(real("--lr", 1.0, open_=True), "FLOAT", f"Learning rate.  {_defaults('lr')}")
    ] = None,
    weight_decay: Annotated[
        float, _option(real("--weight-decay", 1e-4), "FLOAT", "Decoupled; not of γ, β and b.")
    ] = 0.0,
    hidden: Annotated[
        tuple | None,
        _option(
            sizes("--hidden", "128,128,128", "hidden layer"),
            "INT,INT,…",
            f"Widths of the hidden layers.  {_defaults('hidden')}",
        ),
    ] = None,
    widths: Annotated[
        tuple | None,
        _option(sizes("--widths", "8,16", "stage"), "INT,INT,…", f"Channels of each stage.  {_defaults('widths')}"),
    ] = None,
    blocks: Annotated[
        int | None, _option(integer("--blocks", 1, 1), "INT", f"Blocks in each stage.  {_defaults('blocks')}")
    ] = None,
    activation: Annotated[
        str | None,
        _words("--activation", options.ACTIVATIONS, f"Of the hidden layers.  {_defaults('activation')}"),
    ] = None,
    epochs: Annotated[
        int | None,
        _option(integer("--epochs", 1, 30), "INT", f"Passes over the training set.  {_defaults('epochs')}"),
    ] = None,
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
    devices: Annotated[
        int, _option(integer("--devices", 1, 4), "INT", "Devices of each process, over which a batch is split.")
    ] = 1,
    stats: Annotated[
        str, _words("--stats", options.STATS, "Normalize with the whole batch, or each device with its own share.")
    ] = "global",
    coordinator: Annotated[
        str | None,
        _option(address("--coordinator"), "HOST:PORT", "Where process 0 waits for the others, if there are several."),
    ] = None,
    num_processes: Annotated[
        int | None, _option(integer("--num-processes", 1, 2), "INT", "How many take part; with --coordinator.")
    ] = None,
    process_id: Annotated[
        int | None, _option(integer("--process-id", 0, 0), "INT", "Which of them this is; 0 shows and writes.")
    ] = None,
    timeout: Annotated[
        int, _option(integer("--timeout", 1, 60), "SECONDS", "How long processes wait for each other to start.")
    ] = 60,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to save the run in, and to go on from if it was cut short. More --epochs train on.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        _option(integer("--checkpoint-every", 1, 100), "INT", "Steps between checkpoints.  [default: an epoch]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder for the results.  [default: runs/train-<date>-<time>]"),
    ] = None,
) -> Callable[[], int | None]:
    """Train a network with and without batch norm, side by side, and show the difference.

    The defaults are the network of the paper's figure 1: three hidden layers of sigmoids, trained with
    plain gradient descent. With --network resnet it is a small residual network, for images.
    """
    chosen = TrainOptions(
        network=network,
        data=data,
        out=out,
        norm=norm,
        compare=compare,
        optimizer=optimizer,
        weight_decay=weight_decay,
        batch_size=batch_size,
        accumulate=accumulate,
        bn_momentum=bn_momentum,
        target_loss=target_loss,
        dtype=dtype,
        seed=seed,
        devices=devices,
        stats=stats,
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        timeout=timeout,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        **of_network(network, lr=lr, hidden=hidden, widths=widths, blocks=blocks, activation=activation, epochs=epochs),
    )
    return partial(_train, chosen)


_RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder that jbn train made.", show_default=False)]
_Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Model file in RUN_DIR.  [default: with.safetensors]")
]
_RunData = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE.npz", help="Arrays as for jbn train.  [default: the data of the run]"),
]


@_app.command("inspect")
def inspect_(
    run_dir: _RunDir,
    model: _Model = None,
    data: _RunData = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for the pictures.  [default: RUN_DIR]")
    ] = None,
) -> Callable[[], None]:
    """Show the batch norm layers of a run, in a table and pictures.

    Ranges of γ, β and the running statistics, dead channels, drift between running and batch statistics.
    """
    return partial(_on_run, "inspect", run_dir, model, data, out)


@_app.command()
def calibrate(
    run_dir: _RunDir,
    model: _Model = None,
    data: _RunData = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="New model file.  [default: RUN_DIR/calibrated.safetensors]"),
    ] = None,
) -> Callable[[], None]:
    """Recompute the running statistics of a run, weights frozen.

    They become the exact ones of the training set, in a new model file.
    """
    return partial(_on_run, "calibrate", run_dir, model, data, out)


@_app.command()
def fold(
    run_dir: _RunDir,
    model: _Model = None,
    data: _RunData = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New model file.  [default: RUN_DIR/folded.safetensors]")
    ] = None,
) -> Callable[[], None]:
    """Fold the batch norms of a run into its other layers.

    The same outputs from fewer operations, for inference, in a new model file.
    """
    return partial(_on_run, "fold", run_dir, model, data, out)


def _on_run(command: str, *arguments: Path | str | None) -> None:
    import_module(f"jbn.cli.{command}").run(*arguments)


def _train(chosen: TrainOptions) -> int | None:
    # Imported when the options are known to be good, and where an interrupt is not typer's.
    from jbn.cli.processes import supervised
    from jbn.cli.train import run

    return supervised(chosen, partial(run, chosen))


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
