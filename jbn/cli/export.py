"""``jbn export``: a saved network as one file that runs without jbn, its input normalization inside."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jbn import BNStats
from jbn.cli.bad_input import BadInput
from jbn.cli.documents import show
from jbn.cli.network import NetworkSpec
from jbn.cli.places import new_file
from jbn.cli.runs import Run, load_run, refusing
from jbn.export import describe, needs_float64, to_onnx, to_stablehlo

__all__ = ["run"]

# How far outputs of the runtime for ONNX may be from ours, as a share of the largest.
_CLOSE = 1e-5
# What the file is tried on; the images are square.
_EXAMPLES, _SIDE = 7, 16


def run(folder: Path, model: str | None, out: Path | None) -> None:
    """Exports a network of a run, calls the file as its user will, and holds that against the network."""
    made = load_run(folder, model, normed=False)
    out = folder / "exported.jax" if out is None else out
    onnx = out.suffix == ".onnx"
    inputs = _inputs_of(made)
    dtype = "float64" if needs_float64(inputs) else "float32"
    if onnx:
        _check_onnx(out, made, dtype)
    elif find_spec("flatbuffers") is None:
        raise BadInput(
            "extra 'demo': got no module flatbuffers; expected what jax.export writes with; install it with: "
            "pip install flatbuffers"
        )
    network = made.spec.make()

    def logits(params: Any, state: Any, z: Any) -> Any:
        return network.apply(params, state, z.astype(jnp.float32), train=False)[0]

    arguments = (logits, made.params, made.state, jax.ShapeDtypeStruct(_shape_of(made.spec), dtype))
    name = "_".join([made.spec.network, *map(str, made.spec.sizes)])
    with new_file(out) as work:
        with refusing(made.file):
            data = (to_onnx if onnx else to_stablehlo)(*arguments, inputs=inputs, name=name)
        x, z = _examples(made.spec, inputs, dtype)
        wanted = np.asarray(logits(made.params, made.state, jnp.asarray(z)), np.float64)
        got = (_call_onnx if onnx else _call)(data, x).astype(np.float64)
        difference, largest = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
        if onnx and not difference <= _CLOSE * max(largest, 1):
            raise BadInput(
                f"{made.file}: got outputs from onnxruntime that differ by {difference:.2g}, where the largest is "
                f"{largest:.3g}; expected those of the network to {_CLOSE:g}; export it to another file than .onnx."
            )
        work.write_bytes(data)
    said = None if onnx else describe(data)
    document: dict[str, Any] = {
        "run": folder,
        "model": made.file.name,
        "network": name,
        "format": "onnx" if onnx else "jax.export",
        "platforms": None if said is None else said.platforms,
        "x": {"shape": [size if isinstance(size, int) else str(size) for size in arguments[-1].shape], "dtype": dtype},
        "classes": made.spec.classes,
        "bytes": len(data),
        "largest_difference": difference,
        "largest_output": largest,
        "out": out,
    }
    where = "any runtime for ONNX" if said is None else f"JAX on {', '.join(said.platforms)}"
    shape = ", ".join(map(str, document["x"]["shape"]))
    lines = [
        f"{made.file}: exported for {where}, input normalization inside",
        f"Takes x of shape ({shape}) as {dtype}, as the data were; gives {made.spec.classes} values for each example",
        f"Outputs differ by at most {difference:.2g}, where the largest is {largest:.3g}",
        f"Written: {out}, {len(data):,} bytes",
    ]
    if said is not None:
        needs = ["jax", "flatbuffers", *["jax_enable_x64 on"] * (dtype == "float64")]
        how = f"jax.export.deserialize(open({str(out)!r}, 'rb').read()).call(x)"
        lines.append(f"To run it, with {', '.join(needs)}: {how}")
    show(document, lines)


def _inputs_of(made: Run) -> BNStats:
    """The statistics of each value that the network takes: a dense one takes images in rows, channels last."""
    repeats = made.spec.inputs // len(made.inputs.mean)
    return BNStats(*(np.tile(np.asarray(values), repeats) for values in made.inputs))  # type: ignore[arg-type]


def _shape_of(spec: NetworkSpec) -> tuple[Any, ...]:
    """Of x, with every size open that the weights leave open."""
    return tuple(export.symbolic_shape(f"n{'' if spec.network == 'mlp' else ', h, w'}, {spec.inputs}"))


def _examples(spec: NetworkSpec, inputs: BNStats, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise distributed as the inputs, and the same standardized."""
    mean, var = (np.asarray(values, np.float64) for values in inputs[:2])
    places = () if spec.network == "mlp" else (_SIDE, _SIDE)
    noise = np.random.default_rng(0).normal(size=(_EXAMPLES, *places, len(mean)))
    x = (mean + np.sqrt(var) * noise).astype(dtype)
    spread = np.sqrt(np.where(var > 0, var, 1))
    z = np.where(var > 0, (x.astype(np.float64) - mean) / spread, 0)
    return x, z.astype(np.float32)


def _call(data: bytes, x: np.ndarray) -> np.ndarray:
    with jax.enable_x64(x.dtype == np.float64):
        return np.asarray(export.deserialize(bytearray(data)).call(x))


def _call_onnx(data: bytes, x: np.ndarray) -> np.ndarray:
    from onnxruntime import InferenceSession

    return InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def _check_onnx(out: Path, made: Run, dtype: str) -> None:
    """What cannot become ONNX is said before the work."""
    other = "choose another suffix, as in --out network.jax"
    missing = [name for name in ("jax2onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise BadInput(
            f"--out: got {out} without the package {' and '.join(missing)}; expected what writes and checks ONNX; "
            f"install it with pip install 'jbn[onnx]', or {other}."
        )
    if dtype == "float64":
        raise BadInput(
            f"--out: got {out} for data that float32 cannot tell apart, so far is their mean from 0; expected a "
            f"format that mixes float64 and float32; {other}."
        )
    if made.spec.dtype != "float32":
        raise BadInput(
            f"--out: got {out} for a network that computes in {made.spec.dtype}; expected float32, since runtimes for "
            f"ONNX lack other kernels; {other}."
        )
