"""Networks as ONNX, for runtimes that know nothing of JAX, by jax2onnx."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from jbn._pytrees import BNStats
from jbn.export._forward import forward

__all__ = ["to_onnx"]


def to_onnx(
    apply_fn: Callable[..., Any],
    params: Any,
    state: Any,
    x: Any,
    *,
    inputs: BNStats | None = None,
    name: str = "network",
) -> bytes:
    """Exports a network, weights inside, as ONNX: ``apply_fn(params, state, z)`` of x, z = (x−μ)/σ.

    The conversion is that of the package jax2onnx (the extra ``onnx``). Its releases 0.12.5 and 0.17.1 were seen to
    work with JAX 0.10.2; with JAX 0.12 they do not, since they use what JAX keeps private, and the error says so.
    (Beside the command line pip chooses an older one: the later ones refuse its release of Orbax.) Outputs of the
    networks in `jbn.networks` agree with JAX to 1e-6 of the largest in onnxruntime 1.31.

    Args:
        apply_fn: pure; ``apply_fn(params, state, z)`` gives one array.
        params, state: any pytrees of arrays; they become initializers of the graph.
        x: an example batch or ``jax.ShapeDtypeStruct``, not float64; its leading size stays open, as in
            `to_stablehlo`.
        inputs: as in `to_stablehlo`; None for x that comes standardized.
        name: of the graph.

    Returns:
        The serialized model, with one input ``x`` and one output ``y``, open sizes by their names.

    Raises:
        ModuleNotFoundError: jax2onnx is not installed.
        TypeError: ``apply_fn`` no function, x no array, ``inputs`` no `BNStats`.
        ValueError: as in `to_stablehlo`; x of float64, which jax2onnx does not mix with float32; a function
            with several outputs; one that this jax2onnx cannot convert.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn.export import to_onnx
        >>> model = to_onnx(lambda W, _, x: jnp.tanh(x @ W), jnp.ones((4, 3)), None, jnp.ones((1, 4)))
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession(model)
        >>> session.run(None, {"x": jnp.zeros((2, 4), "float32").__array__()})[0].shape
        (2, 3)

    PyTorch: ``torch.onnx.export``.
    """
    made = forward(apply_fn, params, state, x, inputs, name)
    if made.x.dtype.itemsize == 8:
        raise ValueError(
            f"x: got dtype {made.x.dtype}; expected at most 32 bits, which the converter to ONNX does not mix with "
            f"64; use to_stablehlo, or subtract a constant from the data first."
        )
    # Traced before the converter replaces functions of jax.numpy by its own, under which the checks of shapes fail.
    closed = jax.make_jaxpr(made.function)(made.x)
    if len(closed.out_avals) != 1:
        raise ValueError(
            f"apply_fn: got {len(closed.out_avals)} outputs; expected one array; return it alone, as in "
            f"apply(…, train=False)[0]."
        )
    try:
        from jax2onnx import to_onnx as convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"jbn.export: got no package {error.name}; expected jax2onnx, which converts to ONNX; "
            f"run pip install 'jbn[onnx]'."
        ) from error
    except Exception as error:
        raise _unconverted(error) from error
    try:
        model = convert(
            lambda x: jaxpr_as_fun(closed)(x)[0], [made.x], model_name=name, input_names=["x"], output_names=["y"]
        )
    except Exception as error:
        raise _unconverted(error) from error
    return model.SerializeToString()


def _unconverted(error: Exception) -> ValueError:
    """What jax2onnx did not manage is of many types, its private use of JAX among them."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
    return ValueError(
        f"apply_fn: got a function that jax2onnx {version('jax2onnx')} does not convert with JAX {jax.__version__} "
        f"({reason}); expected one that it does; use to_stablehlo, or another JAX."
    )
