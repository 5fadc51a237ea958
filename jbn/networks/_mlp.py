"""The multilayer perceptron: one batch norm in each hidden layer, before or after its activation."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks, _checks_layer
from jbn._core import bn_apply
from jbn.networks._network import Layer, Network, affine, as_compute_dtype, check_fit, entered, init_layer

__all__ = ["mlp"]

_NORMS = ("z", "a", None)


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
    _checks.as_function("activation", activation)
    _checks.as_function("bn", bn)
    compute = as_compute_dtype(dtype)
    last = len(widths) - 2
    layers = [Layer(shape, normed=norm is not None and i < last) for i, shape in enumerate(pairwise(widths))]

    def init(key):
        keys = jax.random.split(key, len(layers))
        noise = [jax.random.normal(keys[i], layer.shape, jnp.float32) for i, layer in enumerate(layers)]
        made = list(map(init_layer, noise, layers))
        return [params for params, _ in made], [state for _, state in made]

    def apply(params, state, x, *, train, axis_name=None, mask=None):
        check_fit(params, state, layers)
        x = _as_rows(x, widths[0])
        mask = None if mask is None else _checks_layer.as_mask(mask, (*x.shape[:-1], 1))
        a = entered(x, mask, compute)
        stats: list[Any] = []
        for i, (layer, normed) in enumerate(zip(params, (layer.normed for layer in layers), strict=True)):
            b = lax.stop_gradient(layer["b"]) if normed and norm == "z" else layer["b"]
            z = affine(a, layer["W"], b)
            if i == last:
                return z, [*stats, None]
            running, seen = None if state is None else state[i], None
            if norm == "z":
                z, seen = bn(layer["bn"], running, z, train=train, axis_name=axis_name, mask=mask)
            a = activation(z)
            if norm == "a":
                a, seen = bn(layer["bn"], running, a, train=train, axis_name=axis_name, mask=mask)
            stats.append(seen)

    return Network(init, apply)


def _as_rows(x: Any, width: int) -> jax.Array:
    """x of shape (N, in)."""
    x = _checks.as_array("x", x)
    if x.shape[-1] != width:
        raise ValueError(
            f"x: got shape {x.shape}; expected (N, {width}), the first of sizes; "
            f"flatten images with x.reshape(len(x), -1), or change sizes."
        )
    return x


def _as_sizes(sizes: Any) -> tuple[int, ...]:
    """(in, hidden, …, out) as a tuple of ints."""
    advice = "pass (in, hidden, …, out), as in mlp((64, 128, 10))"
    widths = _checks.as_ints("sizes", sizes, f"expected a sequence of ints; {advice}.")
    if len(widths) < 2 or any(n < 1 for n in widths):
        raise ValueError(f"sizes: got {sizes!r}; expected at least two sizes, each at least 1; {advice}.")
    return widths


def _check_norm(norm: Any) -> None:
    if not any(norm is known or norm == known for known in _NORMS):
        raise ValueError(
            f'norm: got {norm!r}; expected "z", "a" or None; '
            f'pass "z" to normalize before the activation, "a" after it, None not at all.'
        )
