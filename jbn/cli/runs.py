"""A saved run, read again: its options, one of its networks, and data for it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.data import Data, Fitted, load_data
from jbn.cli.fit import evaluate, scorer
from jbn.cli.models import load_model
from jbn.cli.network import NetworkSpec
from jbn.networks import Network

__all__ = ["Run", "accuracy", "load_run", "refusing"]

_RANGES = {"seed": (0, 2**32 - 1), "batch_size": (2, 2**63 - 1)}
_NO_NORM = "expected a network with batch norm; train one with jbn train --norm z"


class Run(NamedTuple):
    """A trained network with batch norm, out of the folder of a run.

    Attributes:
        folder, file: of the run, and of the model in it.
        spec, params, state, inputs: as `load_model` gives them.
        options: of ``jbn train``, as metrics.json has them.
        names: of the classes, where they have any.
    """

    folder: Path
    file: Path
    spec: NetworkSpec
    params: Any
    state: Any
    inputs: jbn.BNStats
    options: dict[str, Any]
    names: tuple[str, ...]

    def data(self, file: Path | None) -> Data:
        """Data that fit the network: those of the run, or those of another file."""
        seed, flat = self.options["seed"], self.spec.network == "mlp"
        if file is not None:
            fitted = Fitted(self.inputs, self.spec.classes, self.spec.inputs, self.names)
            return load_data(file, seed, flat=flat, fitted=fitted)
        own = self.options["data"]
        with _not_given("--data"):
            data = load_data(None if own is None else Path(own), seed, flat=flat)
            _check_unchanged(data, self)
        return data


def load_run(folder: Path, model: str | None = None, *, normed: bool = True) -> Run:
    """Reads the network with batch norm of a run, or the one in another file of its folder.

    Without ``normed`` one without batch norm will do: one that was folded, or that of a run with no other.
    """
    expected = "expected the folder of a run, as jbn train makes it"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise BadInput(f"RUN_DIR: got {folder}, {found}; {expected}; check the path.")
    try:
        document = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        options = {name: document["options"][name] for name in ("data", "seed", "batch_size")}
        sound = isinstance(options["data"], (str, type(None)))
        sound &= all(type(options[name]) is int and low <= options[name] <= top for name, (low, top) in _RANGES.items())
        names = tuple(document.get("data", {}).get("labels", ()))
        if not sound or not all(isinstance(name, str) for name in names):
            raise TypeError
    except FileNotFoundError:
        raise BadInput(f"RUN_DIR: got {folder} without a metrics.json; {expected}; check the path.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"RUN_DIR: got {folder} with a damaged metrics.json; {expected}; train it again.") from None
    name = "with.safetensors" if model is None else model
    file = folder / name
    if not normed and model is None and not file.exists():
        file = folder / "without.safetensors"
    if not file.exists():
        if model is None and (folder / "without.safetensors").exists():
            raise BadInput(f"RUN_DIR: got {folder}, a run without batch norm; {_NO_NORM}.")
        held = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "no model"
        option = "RUN_DIR" if model is None else "--model"
        raise BadInput(f"{option}: got no {name} in {folder}, which holds {held}; {expected}; check the name.")
    with nullcontext() if model else _not_given("--model"):
        spec, params, state, inputs = load_model(file)
        if normed and not jax.tree.leaves(state):
            raise BadInput(f"--model: got {file}, a network without batch norm; {_NO_NORM}.")
    return Run(folder, file, spec, params, state, inputs, options, names)


def accuracy(network: Network, params: Any, state: Any, data: Data) -> float:
    """Share of the test set that the network gets right, with running statistics."""
    return evaluate(scorer(network), params, state, data.x_test, data.y_test)[1]


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """What the library finds wrong about the numbers in a file is the user's to hear in one line."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"{file}: {' '.join(str(error).split())}") from error


@contextmanager
def _not_given(option: str) -> Iterator[None]:
    """Where the user left out an option, what is wrong with it is wrong with the run."""
    try:
        yield
    except BadInput as error:
        advice = "put it back, or pass other data with --data FILE"
        raise BadInput(str(error).replace(f"{option}:", "RUN_DIR:", 1).replace("check the path", advice)) from None


def _check_unchanged(data: Data, run: Run) -> None:
    """Whether this is the training set that standardized the inputs of the run."""
    same = [np.shape(then) == now.shape for now, then in zip(data.inputs, run.inputs, strict=True)]
    if all(same) and data.classes == run.spec.classes:
        same = [np.allclose(now, then, rtol=1e-4, atol=1e-4) for now, then in zip(data.inputs, run.inputs, strict=True)]
        if all(same):
            return
    raise BadInput(
        f"--data: got {data.source}, which has changed since the run in {run.folder}; expected the data of the run; "
        f"put them back, or pass other data with --data FILE."
    )
