"""``jbn train``: the same network with and without batch norm, on the same data, side by side."""

import math
import platform
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import jbn
from jbn import report
from jbn.cli import display
from jbn.cli.activations import last_layer, of_one_layer
from jbn.cli.bad_input import BadInput
from jbn.cli.batches import Batches
from jbn.cli.data import Data, load_data
from jbn.cli.devices import axis_of, make_cpu_devices, mesh_of, replicated
from jbn.cli.documents import show, to_json
from jbn.cli.fit import Progress, SoFar, fit, loss_fn
from jbn.cli.interrupt import check
from jbn.cli.models import save_model
from jbn.cli.network import NetworkSpec
from jbn.cli.options import TrainOptions
from jbn.cli.places import Place, alone_in, results
from jbn.cli.processes import agreed, first, joined, same
from jbn.cli.resume import resumed
from jbn.training import TrainState, make_train_step

__all__ = ["run"]


def run(options: TrainOptions) -> None:
    """Trains, compares, and leaves the results in ``options.out``: one of several processes, or the only one."""
    make_cpu_devices(options.devices)
    with joined(options), ExitStack() as stack:
        with agreed():
            mesh = mesh_of(options.devices)
            data = _data(options)
            specs = _specs(options, data)
            place = _reserved(options, stack) if first() else None
        check()
        same("--data", data.digest)
        if first():
            display.tell_data(data)
        batches = Batches(len(data.x), options.batch_size, options.epochs, options.seed, options.accumulate)
        starts, fits = _fits(options, specs, data, batches, mesh)
        document = _document(options, data, batches.total, starts, fits)
        with agreed():
            if place is not None:
                document["options"]["out"] = place.final
                _save(place.work, document, specs, fits, data)
                check()
                stack.close()
                document["options"]["out"] = place.final  # another one, if the name was taken meanwhile
    if place is not None:
        show(document, display.lines_of(document))


def _reserved(options: TrainOptions, stack: ExitStack) -> Place:
    """Where the results are written; what other runs could write to at the same time is locked."""
    default = Path("runs") / f"train-{datetime.now():%Y%m%d-%H%M%S}"
    place = stack.enter_context(results(options.out or default, numbered=options.out is None))
    if options.checkpoint_dir is not None:
        stack.enter_context(alone_in(options.checkpoint_dir))
    return place


def _data(options: TrainOptions) -> Data:
    """The data, if the options suit them."""
    data = load_data(options.data, options.seed, flat=options.network == "mlp")
    if options.network == "resnet" and data.x.ndim != 4:
        raise BadInput(
            f"--network: got resnet with {data.x.shape[1]} features an example; expected images, x of shape "
            f"(N, H, W) or (N, H, W, C); reshape x, or pass --network mlp."
        )
    if options.batch_size > len(data.x):
        raise BadInput(
            f"--batch-size: got {options.batch_size}; expected at most {len(data.x)}, the size of the "
            f"training set; use a smaller batch."
        )
    return data


def _fits(
    options: TrainOptions,
    specs: dict[str, NetworkSpec],
    data: Data,
    batches: Batches,
    mesh: Mesh,
) -> tuple[dict[str, TrainState], dict[str, SoFar]]:
    """Where each network starts, and what its training gives."""
    optimizer = _optimizer(options)
    starts, fits = {}, {}
    with display.progress(list(specs), batches.total, first()) as tell:
        for name, spec in specs.items():

            def report_of(made: Progress, name: str = name) -> None:
                check()
                tell(name, made)

            check()
            tell(name, None)
            network = spec.make()
            params, state = network.init(jax.random.key(options.seed))
            starts[name] = TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
            everywhere = replicated(starts[name], mesh)
            step = make_train_step(
                network.apply,
                loss_fn,
                optimizer,
                momentum=options.bn_momentum,
                accumulate=options.accumulate,
                axis_name=axis_of(mesh),
                sync_stats=options.stats == "global",
            )
            with resumed(options, name, spec, data, everywhere, batches.steps) as (so_far, keeping):
                fits[name] = fit(network, step, so_far, data, batches, mesh, report_of, keeping)
    return starts, fits


def _save(
    folder: Path,
    document: dict[str, Any],
    specs: dict[str, NetworkSpec],
    fits: dict[str, SoFar],
    data: Data,
) -> None:
    """Pictures, metrics and models."""
    curves = {
        f"{name} batch norm": {"loss": done.histories["loss"], "accuracy": done.epochs["test_accuracy"]}
        for name, done in fits.items()
    }
    report.plot_curves(curves).savefig(folder / "curves.png")
    values: dict[str, Any] = {}
    for name, done in fits.items():
        values |= of_one_layer(specs[name], *done.train_state[:2], data.x_test)
    _, _, layer = last_layer(next(iter(specs.values())))
    title = f"{layer}, test examples, after training"
    report.plot_activations(values, title=title).savefig(folder / "activations.png")
    for name, done in fits.items():
        save_model(folder / f"{name}.safetensors", specs[name], *done.train_state[:2], data.inputs)
    histories = {
        name: {"loss": done.histories["loss"], "skipped": np.flatnonzero(done.histories["skipped"]), **done.epochs}
        for name, done in fits.items()
    }
    (folder / "metrics.json").write_text(to_json({**document, "history": histories}), encoding="utf-8")


def _specs(options: TrainOptions, data: Data) -> dict[str, NetworkSpec]:
    """The networks to train, by name: with batch norm and without it."""
    spec = NetworkSpec.of(options, data.x.shape[-1], data.classes)
    plain = {"without": replace(spec, norm="none")}
    if options.norm == "none":
        return plain
    return {"with": spec, **(plain if options.compare else {})}


def _optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """Weight decay is decoupled from it, and leaves γ, β and b alone."""
    rules = {
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(decay=0.9),
        "rmsprop": optax.scale_by_rms,
        "adam": optax.scale_by_adam,
    }
    return optax.chain(
        rules[options.optimizer](),
        optax.add_decayed_weights(options.weight_decay, mask=jbn.weight_decay_mask),
        optax.scale_by_learning_rate(options.lr),
    )


def _document(
    options: TrainOptions, data: Data, steps: int, starts: dict[str, TrainState], fits: dict[str, SoFar]
) -> dict[str, Any]:
    """What is printed, and heads metrics.json."""
    summary = {
        name: {
            **{score: values[-1] for score, values in done.epochs.items()},
            "steps_to_target": done.steps_to(options.target_loss),
            "ms_per_step": done.ms_per_step,
            "compile_s": done.histories["compile_s"].item(),
            "skipped_steps": int(done.histories["skipped"].sum()),
        }
        for name, done in fits.items()
    }
    sizes = {
        "source": data.source,
        "train": len(data.x),
        "test": len(data.x_test),
        "features": math.prod(data.x.shape[1:]),
        "classes": data.classes,
    }
    if data.names:
        sizes["labels"] = data.names
    packages = ("jax", "jaxlib", "optax", "numpy")
    versions = {"jbn": jbn.__version__, "python": platform.python_version()}
    return {
        "options": asdict(options) | {"data": options.data and options.data.absolute()},
        "versions": versions | {package: version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
        "devices": options.shards,
        "processes": jax.process_count(),
        "stats": options.stats,
        "data": sizes,
        "steps": steps,
        "held_equal": _held_equal(list(starts.values())),
        "summary": summary,
    }


def _held_equal(starts: list[TrainState]) -> list[str]:
    """What the runs have in common; the initial weights are looked at, the rest is one object for both."""
    if len(starts) < 2:
        return []
    weights = [_weights(start.params) for start in starts]
    shared = set.intersection(*map(set, weights))
    same = all(bool(jnp.array_equal(own[path], weights[0][path])) for own in weights for path in shared)
    # Where one network has a norm in the place of some b, only W is left to compare.
    initial = ["initial W and b" if all(set(own) == shared for own in weights) else "initial W"] if same else []
    return ["data", "order of batches", *initial, "optimizer", "learning rate", "number of steps"]


def _weights(params: Any) -> dict[str, Any]:
    """Every W and b, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, jbn.BNParams))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if not isinstance(leaf, jbn.BNParams)}
