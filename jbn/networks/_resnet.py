"""The residual network for small images: every convolution followed by its batch norm."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks, _checks_layer
from jbn._core import bn_apply
from jbn._shardings import for_product, parts_along, sharding_of, spec_of, with_spec
from jbn.networks._network import Layer, Network, affine, as_compute_dtype, check_fit, entered, init_layer

__all__ = ["resnet"]


def resnet(
    num_classes: int,
    *,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 3,
    norm: str | None = "z",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    zero_gamma: bool = False,
    remat: bool = False,
    dtype: Any = None,
    bn: Callable[..., Any] = bn_apply,
) -> Network:
    """Makes a residual network for small images, with a batch norm after each convolution.

    A stem, then one stage of ``blocks`` blocks for each of ``widths``. With g the activation and ∗ a
    convolution, a block is

        z = W₂∗g(BN₁(W₁∗a)),   a ← g(shortcut(a) + BN₂(z))

    Kernels are 3×3 with one pixel of padding on each side. The first block of each stage after the first
    halves height and width (stride 2). The shortcut is the identity; where stride or width change, it
    is a projection BN(Wₛ∗a), 1×1 with the same stride (option B of the paper). At the end the mean over
    all positions and a dense layer. The defaults are ResNet-20 for CIFAR, 272,474 params with 10 classes;
    ``blocks=5, 7, 9`` are ResNet-32, 44 and 56.

    Args:
        num_classes: width of the outputs.
        in_channels: channels of the images, 1 for grey ones.
        widths: channels of each stage.
        blocks: blocks in each stage.
        norm: ``"z"`` normalizes what each convolution gives, before the activation; None does not.
        activation: g, elementwise.
        zero_gamma: whether γ of each BN₂ starts at 0, so that each block starts as g(shortcut(a)).
        remat: whether the backward pass computes the inside of each block again instead of keeping it:
            less memory on a GPU or TPU (half of it for ResNet-20), a third more arithmetic, the same
            values. On a CPU the compiler finds the second computation equal to the first and keeps it.
        dtype: of the computation and the outputs, such as ``jnp.bfloat16``; None takes that of x, at
            least float32. W, b, γ, β are float32 all the same, and the batch norms compute in at least
            float32. A ``loss_fn`` of narrow outputs casts them first: ``outputs.astype(jnp.float32)``.
        bn: called as ``bn(params, state, x, train=…, axis_name=…, mask=…)``: `bn_apply`, or a
            `functools.partial` of it with options of your own (an ``eps``, say).

    Returns:
        A `Network`. Its params are ``{"stem": layer, "blocks": [{"conv1": layer, "conv2": layer}, …],
        "head": layer}``, with a ``"shortcut"`` in the blocks that project. A layer is
        ``{"W": (height, width, in, out), "b": None, "bn": BNParams}``: β does the work of b. Without a
        norm it has a ``b`` (out,) and its ``bn`` is None; so has the head, whose W is (in, out). In the
        place of each layer, ``state`` and ``stats`` hold a `BNState` and `BNStats`, or None. W starts He
        normal, N(0, 2/n) with n = height·width·in, the same for the same key whatever ``norm`` is; b, β
        start at 0 and γ at 1. ``apply`` takes x of shape (N, H, W, in_channels), and a bool mask (N, 1),
        True for the images that count; the others are zeroed before the first layer, so that whatever
        they hold (NaN too) does no harm.

    Raises:
        TypeError: a size that is no int, a flag that is no bool, ``activation`` or ``bn`` no function,
            ``dtype`` or x not floating.
        ValueError: a size below 1, ``norm`` of another kind, ``zero_gamma`` without a norm, x not of rank
            4 with ``in_channels`` last, params or state not those of this network.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn import bn_update_stats
        >>> from jbn.networks import resnet
        >>> network = resnet(10, in_channels=1, widths=(4, 8), blocks=1)
        >>> params, state = network.init(jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
        >>> outputs, stats = network.apply(params, state, x, train=True)
        >>> state = bn_update_stats(state, stats)
        >>> [stats["blocks"][1]["shortcut"].mean.shape, stats["head"]], outputs.shape
        ([(8,), None], (16, 10))

    PyTorch pads strided convolutions alike; the "SAME" of Flax and Keras pads them on the far side only.

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning", sections 3.3 and 4.2 (there with option A,
        shortcuts without params, on CIFAR); Goyal et al. 2017, section 5.1 (γ = 0); Chen et al. 2016,
        "Training Deep Nets with Sublinear Memory Cost" (remat).
    """
    classes = _checks.as_size("num_classes", num_classes, "pass the number of classes, as in resnet(10)")
    channels = _checks.as_size("in_channels", in_channels, "pass 3 for colour images, 1 for grey ones")
    stages = _as_widths(widths)
    depth = _checks.as_size("blocks", blocks, "pass the blocks in each stage, as in blocks=3")
    normed = _as_normed(norm)
    _checks.as_function("activation", activation)
    _checks.as_function("bn", bn)
    compute = as_compute_dtype(dtype)
    remat = _checks.as_flag("remat", remat)
    if _checks.as_flag("zero_gamma", zero_gamma) and not normed:
        raise ValueError('zero_gamma: got True without a norm; expected False; there is no γ, pass norm="z".')
    layers, strides = _layout(channels, stages, depth, classes, normed, zero_gamma)
    leaves, structure = jax.tree.flatten(layers, is_leaf=lambda node: isinstance(node, Layer))
    sizes = [math.prod(layer.shape) for layer in leaves]

    def init(key):
        # One draw, cut up: drawn one by one, each new shape would be compiled, a quarter of a second each.
        noise = jax.random.normal(key, (sum(sizes),), jnp.float32)
        cuts = pairwise(accumulate(sizes, initial=0))
        made = [init_layer(noise[i:j], layer) for (i, j), layer in zip(cuts, leaves, strict=True)]
        params, state = (jax.tree.unflatten(structure, column) for column in zip(*made, strict=True))
        return params, state

    def apply(params, state, x, *, train, axis_name=None, mask=None):
        check_fit(params, state, layers)
        x = _as_images(x, channels)
        if mask is not None:
            mask = _checks_layer.as_mask(mask, (len(x), 1))[:, :, None, None]

        def normalized_conv(layer, running, a, mask, stride=1):
            z = _conv(a, layer["W"], stride)
            if not normed:
                return z + lax.expand_dims(layer["b"].astype(z.dtype), range(3)), None
            return bn(layer["bn"], running, z, train=train, axis_name=axis_name, mask=mask)

        def block(layer, running, a, mask, stride):
            seen = {}
            z, seen["conv1"] = normalized_conv(layer["conv1"], _at(running, "conv1"), a, mask, stride)
            z, seen["conv2"] = normalized_conv(layer["conv2"], _at(running, "conv2"), activation(z), mask)
            if "shortcut" in layer:
                shortcut, running = layer["shortcut"], _at(running, "shortcut")
                a, seen["shortcut"] = normalized_conv(shortcut, running, a, mask, stride)
            return activation(a + z), seen

        if remat:
            block = jax.checkpoint(block, static_argnums=4)

        a = entered(x, mask, compute)
        a, stem = normalized_conv(params["stem"], _at(state, "stem"), a, mask)
        a = activation(a)
        stats: list[Any] = []
        for i, stride in enumerate(strides):
            a, seen = block(params["blocks"][i], _at(_at(state, "blocks"), i), a, mask, stride)
            stats.append(seen)
        pooled = jnp.mean(a, (1, 2))
        outputs = affine(pooled, params["head"]["W"], params["head"]["b"])
        return outputs, {"stem": stem, "blocks": stats, "head": None}

    return Network(init, apply)


def _layout(
    channels: int, stages: tuple[int, ...], depth: int, classes: int, normed: bool, zero_gamma: bool
) -> tuple[dict[str, Any], list[int]]:
    """Every layer at the place of its params, and the stride of each block."""

    def conv(size, n_in, n_out, *, last=False):
        return Layer((size, size, n_in, n_out), normed, biased=not normed, zero_gamma=last and zero_gamma)

    n_in, blocks, strides = stages[0], [], []
    for stage, n_out in enumerate(stages):
        for i in range(depth):
            strides.append(2 if stage > 0 and i == 0 else 1)
            block = {"conv1": conv(3, n_in, n_out), "conv2": conv(3, n_out, n_out, last=True)}
            if strides[-1] > 1 or n_in != n_out:
                block["shortcut"] = conv(1, n_in, n_out)
            blocks.append(block)
            n_in = n_out
    head = Layer((n_in, classes), normed=False)
    return {"stem": conv(3, channels, stages[0]), "blocks": blocks, "head": head}, strides


def _conv(a: jax.Array, W: jax.Array, stride: int) -> jax.Array:
    """a∗W, NHWC and HWIO, padded so that a stride of 1 keeps the size."""
    a, W, (batch, *places, outputs) = for_product(a, W.astype(a.dtype))
    # On an explicit mesh height and width stay split where what is left of them can be.
    places = [e if -(-a.shape[i] // stride) % parts_along(a, i) == 0 else None for i, e in enumerate(places, 1)]
    out_sharding = sharding_of(a, (batch, *places, outputs))
    a = with_spec(a, (batch, *places, spec_of(a)[-1]))
    padding = [(size // 2, size // 2) for size in W.shape[:2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        a, W, (stride, stride), padding, dimension_numbers=numbers, out_sharding=out_sharding
    )


def _at(tree: Any, key: Any) -> Any:
    """An entry of the state, or None where there is none."""
    return None if tree is None else tree[key]


def _as_images(x: Any, channels: int) -> jax.Array:
    """x of shape (N, H, W, channels)."""
    x = _checks.as_array("x", x)
    if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape[1:3]:
        raise ValueError(
            f"x: got shape {x.shape}; expected (N, H, W, {channels}), channels last; "
            f"move the channels with jnp.moveaxis(x, 1, -1), add missing ones with x[..., None], "
            f"or change in_channels."
        )
    return x


def _as_widths(widths: Any) -> tuple[int, ...]:
    """The channels of each stage as a tuple of ints."""
    advice = "pass the channels of each stage, as in widths=(16, 32, 64)"
    if not isinstance(widths, (list, tuple)):
        raise TypeError(f"widths: got {widths!r}; expected a sequence of ints; {advice}.")
    if not widths:
        raise ValueError(f"widths: got {widths!r}; expected at least one stage; {advice}.")
    return tuple(_checks.as_size("widths", width, advice) for width in widths)


def _as_normed(norm: Any) -> bool:
    """Whether there are norms."""
    if norm is not None and not (isinstance(norm, str) and norm == "z"):
        raise ValueError(
            f'norm: got {norm!r}; expected "z" or None; '
            f'pass "z" to normalize before the activation, None not to normalize.'
        )
    return norm is not None
