"""``jbn train``: the same network with and without batch norm, on the same data, side by side."""

import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from jbn import report
from jbn.cli import display
from jbn.cli.bad_input import BadInput
from jbn.cli.data import Data, load_data
from jbn.cli.fit import Fit, Progress, batch_order, fit
from jbn.cli.interrupt import interrupts
from jbn.cli.network import NetworkSpec, activation_of, build, loss_fn, make_optimizer
from jbn.cli.options import TrainOptions
from jbn.cli.saving import new_folder, save_model, to_json
from jbn.networks import mlp
from jbn.training import TrainState, make_train_step

__all__ = ["run"]

# Examples in the picture of the activations.
_PICTURED = 2000


def run(options: TrainOptions) -> None:
    """Trains, compares, and leaves the results in ``options.out``."""
    data = load_data(options.data, options.seed, flat=True)
    if options.batch_size > len(data.x):
        raise BadInput(
            f"--batch-size: got {options.batch_size}; expected at most {len(data.x)}, the size of the "
            f"training set; use a smaller batch."
        )
    specs = _specs(options, data)
    order = batch_order(len(data.x), options.batch_size, options.epochs, options.seed)
    with interrupts() as check, new_folder(options.out) as folder:
        starts, fits = _fits(options, specs, data, order, check)
        document = _document(options, data, order, starts, fits)
        _save(folder, document, specs, fits, data)
        check()
    display.show(document)


def _fits(
    options: TrainOptions,
    specs: dict[str, NetworkSpec],
    data: Data,
    order: np.ndarray,
    check: Callable[[], None],
) -> tuple[dict[str, TrainState], dict[str, Fit]]:
    """Where each network starts, and what its training gives."""
    optimizer = make_optimizer(options)
    starts, fits = {}, {}
    with display.progress(list(specs), order.shape[0] * order.shape[1]) as show:
        for name, spec in specs.items():

            def tell(made: Progress, name: str = name) -> None:
                check()
                show(name, made)

            network = build(spec)
            params, state = network.init(jax.random.key(options.seed))
            starts[name] = TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
            step = make_train_step(
                network.apply,
                loss_fn,
                optimizer,
                momentum=options.bn_momentum,
                accumulate=options.accumulate,
            )
            fits[name] = fit(network, step, starts[name], data, order, tell)
    return starts, fits


def _save(
    folder: Path,
    document: dict[str, Any],
    specs: dict[str, NetworkSpec],
    fits: dict[str, Fit],
    data: Data,
) -> None:
    """Pictures, metrics and models."""
    curves = {
        f"{name} batch norm": {"loss": done.loss, "accuracy": done.epochs["test_accuracy"]}
        for name, done in fits.items()
    }
    report.plot_curves(curves).savefig(folder / "curves.png")
    layers = len(document["options"]["hidden"])
    title = f"hidden layer {layers} of {layers}, test examples, after training"
    values = _activations(specs, fits, data)
    report.plot_activations(values, title=title).savefig(folder / "activations.png")
    for name, done in fits.items():
        save_model(folder / f"{name}.safetensors", specs[name], done.params, done.state, data.inputs)
    histories = {
        name: {"loss": done.loss, "skipped": np.flatnonzero(done.skipped), **done.epochs} for name, done in fits.items()
    }
    (folder / "metrics.json").write_text(to_json({**document, "history": histories}), encoding="utf-8")


def _specs(options: TrainOptions, data: Data) -> dict[str, NetworkSpec]:
    """The networks to train, by name: with batch norm and without it."""
    shape = (data.x.shape[1], *options.hidden, data.classes)
    norms = {"with": options.norm, "without": None}
    if options.norm == "none":
        norms = {"without": None}
    elif not options.compare:
        norms = {"with": options.norm}
    return {name: NetworkSpec("mlp", shape, norm, options.activation, options.dtype) for name, norm in norms.items()}


def _document(
    options: TrainOptions, data: Data, order: np.ndarray, starts: dict[str, TrainState], fits: dict[str, Fit]
) -> dict[str, Any]:
    """What is printed, and heads metrics.json."""
    summary = {
        name: {
            "train_loss": done.epochs["train_loss"][-1],
            "train_accuracy": done.epochs["train_accuracy"][-1],
            "test_loss": done.epochs["test_loss"][-1],
            "test_accuracy": done.epochs["test_accuracy"][-1],
            "steps_to_target": done.steps_to(options.target_loss),
            "ms_per_step": done.ms_per_step,
            "compile_s": done.compile_s,
            "skipped_steps": int(done.skipped.sum()),
        }
        for name, done in fits.items()
    }
    sizes = {
        "source": data.source,
        "train": len(data.x),
        "test": len(data.x_test),
        "features": data.x.shape[1],
        "classes": data.classes,
    }
    packages = ("jax", "jaxlib", "optax", "numpy")
    versions = {"jbn": jbn.__version__, "python": platform.python_version()}
    return {
        "options": asdict(options),
        "versions": versions | {package: version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
        "data": sizes,
        "steps": order.shape[0] * order.shape[1],
        "held_equal": _held_equal(list(starts.values())),
        "summary": summary,
    }


def _held_equal(starts: list[TrainState]) -> list[str]:
    """What the runs have in common; the initial weights are looked at, the rest is one object for both."""
    if len(starts) < 2:
        return []
    weights = [[(layer["W"], layer["b"]) for layer in start.params] for start in starts]
    same = all(
        jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), weights[0], other)) for other in weights[1:]
    )
    initial = ["initial W and b"] if same else []
    return ["data", "order of batches", *initial, "optimizer", "learning rate", "number of steps"]


def _activations(specs: dict[str, NetworkSpec], fits: dict[str, Fit], data: Data) -> dict[str, Any]:
    """What the last hidden layer holds for test examples, after training: name → (N, C)."""
    x = data.x_test[:_PICTURED]
    values: dict[str, Any] = {}
    for name, done in fits.items():
        spec = specs[name]
        depth = len(spec.sizes) - 2
        # A network that ends in this layer gives its z: the last layer has neither norm nor activation.
        head = mlp(
            spec.sizes[: depth + 1],
            norm=spec.norm,
            activation=activation_of(spec.activation),
            dtype=jnp.dtype(spec.dtype),
        )
        z, _ = head.apply(done.params[:depth], done.state[:depth], x, train=False)
        if spec.norm is None:
            values["without batch norm: z"] = z
            continue
        before, symbol = (z, "z") if spec.norm == "z" else (activation_of(spec.activation)(z), "a")
        last = depth - 1
        after, _ = jbn.bn_apply(done.params[last]["bn"], done.state[last], before, train=False)
        values[f"with batch norm: {symbol} before it"] = before
        values[f"with batch norm: {symbol} after it"] = after
    return values
