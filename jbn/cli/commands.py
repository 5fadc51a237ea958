"""The commands as typer sees them: each turns its options into a job, to be run outside of typer."""

from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from functools import partial
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.bench.options import BenchOptions
from jbn.cli.options import TrainOptions
from jbn.cli.parsers import dashed

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


def _annotated(declared: Field) -> Any:
    """A field of options, as typer takes it."""
    parse, name = declared.metadata["parse"], dashed(declared.name)
    if parse is None:
        negated = f"{name}/{dashed(f'no_{declared.name}')}" if declared.default else name
        return Annotated[bool, typer.Option(negated, help=declared.metadata["help"])]

    def parser(raw: Any) -> Any:
        return parse(name, raw)

    typed = typer.Option(name, parser=parser, metavar=declared.metadata["metavar"], help=declared.metadata["help"])
    return Annotated[str | None, typed]


def _takes(options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a command of ``function(chosen)``, whose options are the fields of a dataclass."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def command(**given: Any) -> Any:
            return function(options.of(**given))

        types = {declared.name: _annotated(declared) for declared in fields(options)}
        parameters = [
            Parameter(declared.name, Parameter.KEYWORD_ONLY, default=declared.default, annotation=types[declared.name])
            for declared in fields(options)
        ]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = types
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


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
@_takes(TrainOptions)
def train(chosen: TrainOptions) -> Callable[[], int | None]:
    """Train a network with and without batch norm, side by side, and show the difference.

    The defaults are the network of the paper's figure 1: three hidden layers of sigmoids, trained with
    plain gradient descent. With --network resnet it is a small residual network, for images.
    """
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


@_app.command()
def export(
    run_dir: _RunDir,
    model: _Model = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="New file, ONNX if it ends in .onnx.  [default: RUN_DIR/exported.jax]"),
    ] = None,
) -> Callable[[], None]:
    """Export a network of a run to one file that runs without jbn.

    For cpu, cuda and tpu and any batch size, weights and input normalization inside, called with an array alone:
    jax.export.deserialize(open(FILE, "rb").read()).call(x). With --model folded.safetensors without batch norms.
    """
    return partial(_on_run, "export", run_dir, model, out)


@_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .safetensors or .npz file.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New file, of either kind.", show_default=False)],
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="torch|flax|jbn", help="Whose names the arrays have.  [default: found out]"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="torch|flax|jbn", help="Whose they are to have.  [default: flax from torch, else torch]"),
    ] = None,
) -> Callable[[], None]:
    """Convert a file of weights to the names and layouts of another framework.

    Batch norms, convolutions and dense layers are known by their names in a PyTorch state_dict, Flax's variables, or
    a model file of jbn. Nothing is unpickled, nothing is overwritten, and converted back it is the same bit for bit.
    """
    return partial(_on_run, "convert", source, target, from_, to)


def _on_run(command: str, *arguments: Path | str | None) -> None:
    import_module(f"jbn.cli.{command}").run(*arguments)


def _train(chosen: TrainOptions) -> int | None:
    # Imported when the options are known to be good, and where an interrupt is not typer's.
    from jbn.cli.processes import supervised
    from jbn.cli.train import run

    return supervised(chosen, partial(run, chosen))


@_app.command()
@_takes(BenchOptions)
def bench(chosen: BenchOptions) -> Callable[[], None]:
    """Time batch norm on this device, beside flax.linen, torch (where installed) and bare copies of x.

    Forward, forward+backward and evaluation, in under a minute.
    """
    return partial(_bench, chosen)


def _bench(chosen: BenchOptions) -> None:
    from jbn.cli.bench.compare import run

    run(chosen)
