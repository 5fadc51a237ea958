"""Model files: a network and its statistics as safetensors without pickle, known by a digest of all that is in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from jbn.cli.bad_input import BadInput
from jbn.cli.network import NetworkSpec

__all__ = ["load_model", "named", "save_model"]


def save_model(file: Path, spec: NetworkSpec, params: Any, state: Any, inputs: jbn.BNStats) -> None:
    """Writes a network as safetensors: params/0/W, params/0/bn/gamma, state/0/mean, inputs/mean, …

    The spec stands in the file's metadata, as JSON under "network", with the version of jbn and the digest of all.
    It is one entry: the order of several would not be the same each time.
    """
    from safetensors.numpy import save

    tree = {"params": params, "state": state, "inputs": inputs}
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named(tree)[0]}
    fields = {**spec.stored, "jbn": jbn.__version__}
    fields["sha256"] = _digest(fields, tensors)
    file.write_bytes(save(tensors, {"network": json.dumps(fields)}))


def _digest(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    content = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        content.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return content.hexdigest()


def load_model(file: Path) -> tuple[NetworkSpec, Any, Any, jbn.BNStats]:
    """Reads what `save_model` wrote: ``(spec, params, state, inputs)``; a line about what is wrong otherwise.

    Files of version 0.1.0 have no digest, and their inputs in float32.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise _unreadable(file, error.strerror or "not readable") from None
    except (SafetensorError, TypeError):  # TypeError: a dtype that NumPy does not have
        raise _unreadable(file, "damaged, or no safetensors file") from None
    try:
        fields = json.loads(metadata["network"])
        digest = fields.pop("sha256", None)
        if digest not in (None, _digest(fields, tensors)):
            raise _unreadable(file, "damaged: it is not as it was written")
        fields.pop("jbn", None)
        spec = NetworkSpec.read(fields)
        params, state = jax.eval_shape(spec.make().init, jax.random.key(0))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _unreadable(file, "it does not say which network it holds") from None
    mean = tensors.get("inputs/mean", np.zeros(()))
    dtype = np.float64 if mean.dtype == np.float64 else np.float32
    inputs = jbn.BNStats(*(jax.ShapeDtypeStruct(mean.shape, dtype) for _ in range(3)))  # type: ignore[arg-type]
    leaves, treedef = named({"params": params, "state": state, "inputs": inputs})
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves}
    got = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    differ = [name for name in sorted({*wanted, *got}) if wanted.get(name) != got.get(name)]
    if differ or mean.ndim != 1:
        raise _unreadable(file, f"not the arrays of its network: {', '.join(differ[:3] or ['inputs/mean'])}")
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise _unreadable(file, f"values in {name} are not finite")
        if name.endswith(("/var", "/count")) and (array < 0).any():
            raise _unreadable(file, f"values in {name} are negative")
    tree = jax.tree.unflatten(treedef, [tensors[name] for name in wanted])
    params, state = jax.tree.map(jnp.asarray, (tree["params"], tree["state"]))
    return spec, params, state, tree["inputs"]


def _unreadable(file: Path, reason: str) -> BadInput:
    return BadInput(f"--model: got {file} ({reason}); expected a model file that jbn saved; train it again.")


def named(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with their names, such as params/0/bn/gamma, and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], treedef
