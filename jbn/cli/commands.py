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


def _command(options: dict[str, tuple[Any, Any]], job: Callable[..., Any]) -> Callable[[Callable[[], None]], None]:
    """Makes a command of a function without a body, for its name and its text.

    Args:
        options: the type of each, for typer, and its default.
        job: what is done, ``job(name, **options)``.
    """

    def decorate(function: Callable[[], None]) -> None:
        def command(**given: Any) -> Callable[[], int | None]:
            return partial(job, function.__name__, **given)

        command.__annotations__ = {name: type_ for name, (type_, _) in options.items()}
        command.__signature__ = Signature(  # type: ignore[attr-defined]
            [
                Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=type_)
                for name, (type_, default) in options.items()
            ]
        )
        _app.command(function.__name__, help=function.__doc__)(command)

    return decorate


def _options(declared: Any) -> dict[str, tuple[Any, Any]]:
    """The fields of a dataclass."""
    return {each.name: (_annotated(each), each.default) for each in fields(declared)}


def _of_run(out: str, metavar: str = "FILE", *, data: bool = True) -> dict[str, tuple[Any, Any]]:
    """What a command for a saved run is given; ``out`` says what it writes."""
    folder = typer.Argument(metavar="RUN_DIR", help="Folder that jbn train made.", show_default=False)
    model = typer.Option("--model", metavar="NAME", help="Model file in RUN_DIR.  [default: with.safetensors]")
    file = typer.Option("--data", metavar="FILE.npz", help="Arrays as for jbn train.  [default: the data of the run]")
    return {
        "folder": (Annotated[Path, folder], Parameter.empty),
        "model": (Annotated[str | None, model], None),
        **({"file": (Annotated[Path | None, file], None)} if data else {}),
        "out": (Annotated[Path | None, typer.Option("--out", metavar=metavar, help=out)], None),
    }


def _file(metavar: str, help_: str) -> tuple[Any, Any]:
    return Annotated[Path, typer.Argument(metavar=metavar, help=help_, show_default=False)], Parameter.empty


def _pattern(name: str, help_: str) -> tuple[Any, Any]:
    return Annotated[str | None, typer.Option(name, metavar="torch|flax|jbn", help=help_)], None


def _run(command: str, **given: Any) -> int | None:
    # Imported when the options are known to be good, and where an interrupt is not typer's.
    return import_module(f"jbn.cli.{command}").run(**given)


def _train(command: str, **given: Any) -> int | None:
    chosen = TrainOptions.of(**given)
    if chosen.coordinator is not None:
        from jbn.cli.supervision import is_child, watched

        if not is_child():
            return watched(chosen)
    return _run(command, options=chosen)


def _bench(command: str, **given: Any) -> None:
    _run("bench.compare", options=BenchOptions(**given))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jbn {jbn.__version__}")
        raise typer.Exit


@_app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Batch normalization for JAX."""


@_command(_options(TrainOptions), _train)
def train() -> None:
    """Train a network with and without batch norm, side by side, and show the difference.

    The defaults are the network of the paper's figure 1: three hidden layers of sigmoids, trained with
    plain gradient descent. With --network resnet it is a small residual network, for images.
    """


@_command(_of_run("New folder for the pictures.  [default: RUN_DIR]", "DIR"), _run)
def inspect() -> None:
    """Show the batch norm layers of a run, in a table and pictures.

    Ranges of γ, β and the running statistics, dead channels, drift between running and batch statistics.
    """


@_command(_of_run("New model file.  [default: RUN_DIR/calibrated.safetensors]"), _run)
def calibrate() -> None:
    """Recompute the running statistics of a run, weights frozen.

    They become the exact ones of the training set, in a new model file.
    """


@_command(_of_run("New model file.  [default: RUN_DIR/folded.safetensors]"), _run)
def fold() -> None:
    """Fold the batch norms of a run into its other layers.

    The same outputs from fewer operations, for inference, in a new model file.
    """


@_command(_of_run("New file, ONNX if it ends in .onnx.  [default: RUN_DIR/exported.jax]", data=False), _run)
def export() -> None:
    """Export a network of a run to one file that runs without jbn.

    For cpu, cuda and tpu and any batch size, weights and input normalization inside, called with an array alone:
    jax.export.deserialize(open(FILE, "rb").read()).call(x). With --model folded.safetensors without batch norms.
    """


@_command(
    {
        "source": _file("SRC", "A .safetensors or .npz file."),
        "target": _file("DST", "New file, of either kind."),
        "source_pattern": _pattern("--from", "Whose names the arrays have.  [default: found out]"),
        "target_pattern": _pattern("--to", "Whose they are to have.  [default: flax from torch, else torch]"),
    },
    _run,
)
def convert() -> None:
    """Convert a file of weights to the names and layouts of another framework.

    Batch norms, convolutions and dense layers are known by their names in a PyTorch state_dict, Flax's variables, or
    a model file of jbn. Nothing is unpickled, nothing is overwritten, and converted back it is the same bit for bit.
    """


@_command(_options(BenchOptions), _bench)
def bench() -> None:
    """Time batch norm on this device, beside flax.linen, torch (where installed) and bare copies of x.

    Forward, forward+backward and evaluation, in under a minute.
    """
