"""Reference networks as pairs of pure functions over plain dicts: W, b, γ and β of each layer in sight."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks
from jbn._core import bn_apply, bn_init

__all__ = ["Network", "mlp"]

_NORMS = ("z", "a", None)


class Network(NamedTuple):
    """A network as a pair of pure functions, as optax's transformations are.

    Attributes:
        init: ``init(key) -> (params, state)``, what is learned and the running statistics.
        apply: ``apply(params, state, x, *, train, axis_name=None, mask=None) -> (outputs, stats)``;
            ``stats`` are for ``bn_update_stats(state, stats)``. ``train`` and ``axis_name`` are static.

    Example:
        >>> import jax
        >>> from jbn.networks import mlp
        >>> init, apply = mlp((4, 8, 3))
        >>> params, state = init(jax.random.key(0))
        >>> outputs, stats = apply(params, state, jax.numpy.ones((2, 4)), train=True)
        >>> outputs.shape
        (2, 3)
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]


def mlp(
    sizes: Sequence[int],
    *,
    norm: str | None = "z",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    dtype: Any = None,
    bn: Callable[..., Any] = bn_apply,
) -> Network:
    """Makes a multilayer perceptron with batch norm in each hidden layer.

    Per hidden layer, with a₀ = x and g the activation:

        norm="z":   z = a·W + b,   z̃ = BN(z; γ, β),   a = g(z̃)
        norm="a":   z = a·W + b,   a = BN(g(z); γ, β)
        norm=None:  z = a·W + b,   a = g(z)

    The last layer is a·W + b alone. With ``norm="z"`` the mean takes b away and β does its work: b is
    there, so that all variants have the same params, but detached. Its gradient is exactly 0, and
    every optimizer leaves it where it is (Adam would amplify the rounding noise of a true gradient).

    Args:
        sizes: (in, hidden, …, out), at least two.
        norm: ``"z"`` normalizes before the activation, ``"a"`` after it, None not at all.
        activation: g, elementwise.
        dtype: of the computation and the outputs, such as ``jnp.bfloat16``; None takes that of x, at
            least float32. W, b, γ, β are float32 all the same, and the batch norms compute in at least
            float32. A ``loss_fn`` of narrow outputs casts them first: ``outputs.astype(jnp.float32)``.
        bn: called as ``bn(params, state, x, train=…, axis_name=…, mask=…)``: `bn_apply`, or a
            `functools.partial` of it with options of your own (an ``eps``, say).

    Returns:
        A `Network`. Its params and state are lists, one entry a layer. ``params[i]`` is
        ``{"W": (in, out), "b": (out,), "bn": BNParams}`` and ``state[i]``, ``stats[i]`` are a `BNState`
        and `BNStats`; without a norm (in the last layer, say) all three are None. W starts He normal,
        N(0, 2/in), the same for the same key whatever ``norm`` is; b, β start at 0 and γ at 1.
        ``apply`` takes x of shape (N, in), and a bool mask (N, 1), True for the rows that count; the
        others are zeroed before the first layer, so that whatever they hold (NaN too) does no harm.

    Raises:
        TypeError: ``sizes`` not integers, ``norm`` or ``activation`` of another kind, x not floating.
        ValueError: fewer than two sizes, one below 1, x not of width ``sizes[0]``, params or state
            not of as many layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn import bn_update_stats
        >>> from jbn.networks import mlp
        >>> network = mlp((64, 128, 10))
        >>> params, state = network.init(jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (32, 64))
        >>> outputs, stats = network.apply(params, state, x, train=True)
        >>> state = bn_update_stats(state, stats)
        >>> [stats[0].mean.shape, stats[1]], outputs.shape
        ([(128,), None], (32, 10))

    Flax, PyTorch and Keras build this from layer objects, where ``use_bias=False`` drops b before a norm.

    References:
        Ioffe & Szegedy 2015, section 3.2 ("z"); He et al. 2015, "Delving Deep into Rectifiers" (W).
    """
    widths = _as_sizes(sizes)
    _check_norm(norm)
    for name, function in (("activation", activation), ("bn", bn)):
        if not callable(function):
            raise TypeError(f"{name}: got {function!r}; expected a function; pass it, not its name.")
    compute = None if dtype is None else _checks.as_float_dtype(dtype)
    layers = len(widths) - 1
    normed = [norm is not None and i < layers - 1 for i in range(layers)]

    def init(key):
        params, state = [], []
        keys = jax.random.split(key, layers)
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            bn_params, bn_state = bn_init(n_out) if normed[i] else (None, None)
            W = math.sqrt(2 / n_in) * jax.random.normal(keys[i], (n_in, n_out), jnp.float32)
            params.append({"W": W, "b": jnp.zeros(n_out, jnp.float32), "bn": bn_params})
            state.append(bn_state)
        return params, state

    def apply(params, state, x, *, train, axis_name=None, mask=None):
        a, mask = _entered(params, state, x, mask, widths[0], layers)
        a = a.astype(_checks.compute_dtype(a.dtype) if compute is None else compute)
        stats: list[Any] = []
        for i, (layer, running) in enumerate(zip(params, state, strict=True)):
            W, b = layer["W"].astype(a.dtype), layer["b"].astype(a.dtype)
            b = lax.stop_gradient(b) if normed[i] and norm == "z" else b
            z = a @ W + lax.expand_dims(b, range(a.ndim - 1))
            if i == layers - 1:
                return z, [*stats, None]
            seen = None
            if norm == "z":
                z, seen = bn(layer["bn"], running, z, train=train, axis_name=axis_name, mask=mask)
            a = activation(z)
            if norm == "a":
                a, seen = bn(layer["bn"], running, a, train=train, axis_name=axis_name, mask=mask)
            stats.append(seen)

    return Network(init, apply)


def _entered(params: Any, state: Any, x: Any, mask: Any, width: int, layers: int) -> tuple[Any, Any]:
    """x with its masked-out rows zeroed, and the mask; or an error about what does not fit the network."""
    for name, entries in (("params", params), ("state", state)):
        if not isinstance(entries, (list, tuple)) or len(entries) != layers:
            got = f"{len(entries)} entries" if isinstance(entries, (list, tuple)) else type(entries).__name__
            raise ValueError(
                f"{name}: got {got}; expected a list with one entry for each of {layers} layers; "
                f"pass what the network's init returned: params, state = init(key)."
            )
    x = _checks.as_batch("x", x)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"x: got shape {x.shape}; expected (N, {width}), the first of sizes; "
            f"flatten images with x.reshape(len(x), -1), or change sizes."
        )
    if mask is not None:
        mask = _checks.as_mask(mask, (*x.shape[:-1], 1))
        x = jnp.where(mask, x, jnp.zeros_like(x))
    return x, mask


def _as_sizes(sizes: Any) -> tuple[int, ...]:
    """(in, hidden, …, out) as a tuple of ints."""
    advice = "pass (in, hidden, …, out), as in mlp((64, 128, 10))"
    try:
        if any(isinstance(n, bool) for n in sizes):
            raise TypeError
        widths = tuple(operator.index(n) for n in sizes)
    except TypeError:
        raise TypeError(f"sizes: got {sizes!r}; expected a sequence of ints; {advice}.") from None
    if len(widths) < 2 or any(n < 1 for n in widths):
        raise ValueError(f"sizes: got {sizes!r}; expected at least two sizes, each at least 1; {advice}.")
    return widths


def _check_norm(norm: Any) -> None:
    if not any(norm is known or norm == known for known in _NORMS):
        raise ValueError(
            f'norm: got {norm!r}; expected "z", "a" or None; '
            f'pass "z" to normalize before the activation, "a" after it, None not at all.'
        )
