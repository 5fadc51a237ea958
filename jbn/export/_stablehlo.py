"""Networks as serialized StableHLO, the format of ``jax.export``, and what such a file says of itself."""

import struct
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax import export

from jbn._doors import missing
from jbn._pytrees import BNStats
from jbn.export._forward import forward

__all__ = ["Array", "Description", "describe", "to_stablehlo"]

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Array(NamedTuple):
    """Shape and dtype of an array; an open size stands as its name.

    Attributes:
        shape: ints, and names of sizes that are open, such as ``"n"``.
        dtype: its name.

    Example:
        >>> from jbn.export import Array
        >>> Array(("n", 64), "float32").shape[1]
        64
    """

    shape: tuple[int | str, ...]
    dtype: str


class Description(NamedTuple):
    """What an exported network says of itself.

    Attributes:
        name: given when it was exported.
        x: the `Array` that it is called with.
        outputs: what it returns, in the structure that it returns, an `Array` in place of each array. The
            classes of a classifier are ``outputs.shape[-1]``.
        platforms: where it runs, such as ``("cpu", "cuda", "tpu")``.

    Example:
        >>> from jbn.export import Array, Description
        >>> said = Description("net", Array(("n", 64), "float32"), Array(("n", 10), "float32"), ("cpu",))
        >>> said.outputs.shape[-1]
        10
    """

    name: str
    x: Array
    outputs: Any
    platforms: tuple[str, ...]


def to_stablehlo(
    apply_fn: Callable[..., Any],
    params: Any,
    state: Any,
    x: Any,
    *,
    inputs: BNStats | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    name: str = "network",
) -> bytes:
    """Exports a network, weights inside, as bytes that JAX runs on any of the platforms without the source.

    ``jax.export.deserialize(data).call(x)`` gives ``apply_fn(params, state, z)`` with z = (x−μ)/σ, or z = x
    without ``inputs``. That takes JAX and flatbuffers, as the export itself does, and neither jbn nor what
    ``apply_fn`` was written with.

    Args:
        apply_fn: pure; ``apply_fn(params, state, z)`` gives arrays, or tuples, lists and dicts of them.
        params, state: any pytrees of arrays, on however many devices: they become constants of the program.
        x: an example batch or ``jax.ShapeDtypeStruct``; its shape and dtype count, its leading size stays open.
            With sizes of ``jax.export.symbolic_shape`` those alone are open (height and width, say).
        inputs: the statistics of the training set, that `normalize_inputs` gave, along the last axis of x; None
            for x that comes standardized. μ keeps its float64 digits whatever the dtype of x. z has the dtype of x,
            or float32 for integers.
        platforms: of "cpu", "cuda", "rocm" and "tpu".
        name: what the function is called in messages and in `describe`.

    Returns:
        The serialized program. JAX promises to read it for 6 months of later releases at least. For x of float64
        it is traced in 64 bit, and whoever calls it has ``jax_enable_x64`` on.

    Raises:
        ModuleNotFoundError: flatbuffers is not installed.
        TypeError: ``apply_fn`` no function, x no array, ``inputs`` no `BNStats`, outputs that hold nodes of other
            types, whose reader would have to import them.
        ValueError: ``inputs`` of another shape or not those of data, a float32 or integer x whose ``inputs``
            have |μ|/σ above 10⁴ (float32 would lose the data), an unknown platform, params above 2 GiB.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn import normalize_inputs
        >>> from jbn.export import describe, to_stablehlo
        >>> from jbn.networks import mlp
        >>> x = 5 + jax.random.normal(jax.random.key(1), (32, 4))
        >>> z, inputs = normalize_inputs(x)
        >>> network = mlp((4, 8, 3))
        >>> params, state = network.init(jax.random.key(0))  # and train
        >>> def logits(params, state, z):
        ...     return network.apply(params, state, z, train=False)[0]
        >>> data = to_stablehlo(logits, params, state, x, inputs=inputs)  # and write it into a file
        >>> y = jax.export.deserialize(data).call(x[:7])  # anywhere, any batch size
        >>> bool(jnp.allclose(y, logits(params, state, z[:7]), atol=1e-5))
        True
        >>> describe(data).x
        Array(shape=('n', 4), dtype='float32')

    PyTorch: ``torch.export``; TensorFlow: a SavedModel. Outputs with `BNStats` in them, and training steps, are
    exported with ``jax.export`` itself, and read where jbn is installed.

    References:
        JAX's documentation, "Exporting and serializing staged-out computations".
    """
    _check_flatbuffers()
    targets = _as_platforms(platforms)
    made = forward(apply_fn, params, state, x, inputs, name)
    with made.width():
        exported = export.export(jax.jit(made.function), platforms=targets)(made.x)
    _check_plain(exported.out_tree)
    return bytes(exported.serialize())


def describe(data: bytes) -> Description:
    """Reads what an exported network says of itself: what it takes, what it gives, where it runs.

    Args:
        data: the bytes of `to_stablehlo` or of ``jbn export``, or of any function of one array that was
            exported with ``jax.export``.

    Returns:
        A `Description`.

    Raises:
        ModuleNotFoundError: flatbuffers is not installed.
        TypeError: ``data`` no bytes.
        ValueError: ``data`` that hold no such function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn.export import describe, to_stablehlo
        >>> data = to_stablehlo(lambda W, _, x: jnp.tanh(x @ W), jnp.ones((4, 3)), None, jnp.ones((1, 4)))
        >>> describe(data)
        Description(name='network',
                    x=Array(shape=('n', 4), dtype='float32'),
                    outputs=Array(shape=('n', 3), dtype='float32'),
                    platforms=('cpu', 'cuda', 'tpu'))
    """
    if not isinstance(data, (bytes, bytearray)):
        raise TypeError(f"data: got {type(data).__name__}; expected bytes; read them with open(file, 'rb').read().")
    _check_flatbuffers()
    expected = "expected those of jbn.export.to_stablehlo or jbn export; read the whole file"
    try:
        exported = export.deserialize(bytearray(data))
        (x,) = map(_array, exported.in_avals)
        outputs = jax.tree.unflatten(exported.out_tree, map(_array, exported.out_avals))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error):
        raise ValueError(f"data: got {len(data)} bytes that hold no exported network; {expected}.") from None
    return Description(exported.fun_name, x, outputs, tuple(exported.platforms))


def _check_flatbuffers() -> None:
    """JAX does not ask for it when it is installed."""
    if find_spec("flatbuffers") is None:
        raise missing("export", "flatbuffers", "demo")


def _array(aval: Any) -> Array:
    return Array(tuple(size if isinstance(size, int) else str(size) for size in aval.shape), str(aval.dtype))


def _as_platforms(platforms: Any) -> tuple[str, ...]:
    advice = 'pass names, as in platforms=("cpu", "cuda", "tpu")'
    names = tuple(platforms) if isinstance(platforms, (list, tuple)) else ()
    if not names or any(name not in _PLATFORMS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"platforms: got {platforms!r}; expected some of {', '.join(_PLATFORMS)}; {advice}.")
    return names


def _check_plain(tree: Any) -> None:
    """Raises unless the outputs are in structures that every JAX knows."""
    node = tree.node_data()
    if node is not None and node[0] not in (dict, list, tuple, type(None)):
        raise TypeError(
            f"apply_fn: got a {node[0].__name__} in its outputs; expected arrays in tuples, lists and dicts, "
            f"which need no import to be read; return the arrays alone, as in apply(…, train=False)[0]."
        )
    for child in tree.children():
        _check_plain(child)
