"""The residual networks of He et al., for small images and for ImageNet: a batch norm after every convolution."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks, _checks_layer
from jbn._core import bn_apply
from jbn.networks._convolution import conv, max_pool
from jbn.networks._network import Layer, Network, affine, as_compute_dtype, check_fit, entered, init_layer
from jbn.networks._residual import as_blocks, as_choice, as_widths, layout

__all__ = ["resnet"]


def resnet(
    num_classes: int,
    *,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 3,
    block: str = "basic",
    stem: str = "cifar",
    norm: str | None = "z",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    zero_gamma: bool = False,
    remat: bool = False,
    dtype: Any = None,
    bn: Callable[..., Any] = bn_apply,
) -> Network:
    """Makes a residual network for images, with a batch norm after each convolution.

    A stem, then one stage of blocks for each of ``widths``. With g the activation and ∗ a convolution, the
    two kinds of block are

        basic:       z = W₂∗g(BN₁(W₁∗a)),             a ← g(shortcut(a) + BN₂(z))
        bottleneck:  z = W₃∗g(BN₂(W₂∗g(BN₁(W₁∗a)))),  a ← g(shortcut(a) + BN₃(z))

    Kernels are 3×3 with one pixel of padding on each side; W₁ and W₃ of a bottleneck are 1×1, and W₃ has four
    times the outputs. The first block of each stage after the first halves height and width: its first 3×3
    has stride 2 (in a bottleneck this is "v1.5"; the paper strides its first 1×1). The shortcut is the
    identity; where stride or width change, it is a projection BN(Wₛ∗a), 1×1 with the same stride (option B
    of the paper). At the end the mean over all positions and a dense layer.

    The defaults are ResNet-20 for CIFAR, 272,474 params with 10 classes; ``blocks=5, 7, 9`` are ResNet-32, 44
    and 56. ``resnet(1000, **imagenet(50))`` is ResNet-50 for ImageNet, and so for 18, 34, 101 and 152: `imagenet`
    gives the arguments.

    Args:
        num_classes: width of the outputs.
        in_channels: channels of the images, 1 for grey ones.
        widths: channels of each stage; a bottleneck has so many inside.
        blocks: blocks in each stage, one number for all of them or one for each.
        block: ``"basic"`` or ``"bottleneck"``.
        stem: ``"cifar"``, a 3×3 convolution, or ``"imagenet"``: 7×7 with stride 2, and after the activation the
            largest of each 3×3 values, with stride 2 again. Either has as many outputs as the first of ``widths``.
        norm: ``"z"`` normalizes what each convolution gives, before the activation; None does not.
        activation: g, elementwise.
        zero_gamma: whether γ of the last norm of each block starts at 0, so that each block starts as g(shortcut(a)).
        remat: whether the backward pass computes the inside of each block again instead of keeping it:
            less memory on a GPU or TPU (half of it for ResNet-20), a third more arithmetic, the same
            values. On a CPU the compiler finds the second computation equal to the first and keeps it.
            The stem for ImageNet counts as a block.
        dtype: of the computation and the outputs, such as ``jnp.bfloat16``; None takes that of x, at
            least float32. W, b, γ, β are float32 all the same, and the batch norms compute in at least
            float32. A ``loss_fn`` of narrow outputs casts them first: ``outputs.astype(jnp.float32)``.
        bn: called as ``bn(params, state, x, train=…, axis_name=…, mask=…)``: `bn_apply`, or a
            `functools.partial` of it with options of your own (an ``eps``, say).

    Returns:
        A `Network`. Its params are ``{"stem": layer, "blocks": [{"conv1": layer, "conv2": layer}, …],
        "head": layer}``, with a ``"conv3"`` in bottlenecks and a ``"shortcut"`` in the blocks that project. A layer is
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
        ValueError: a size below 1, not one of ``blocks`` for each of ``widths``, ``block``, ``stem`` or ``norm`` of
            another kind, ``zero_gamma`` without a norm, x not of rank
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

    PyTorch pads strided convolutions and pooling alike; the "SAME" of Flax and Keras pads them on the far side
    only. torchvision starts W by its outputs, N(0, 2/(height·width·out)).

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning", section 3.3, table 1 and section 4.2 (there
        with option A, shortcuts without params, on CIFAR); Goyal et al. 2017, section 5.1 (γ = 0); Chen et al. 2016,
        "Training Deep Nets with Sublinear Memory Cost" (remat).
    """
    classes = _checks.as_size("num_classes", num_classes, "pass the number of classes, as in resnet(10)")
    channels = _checks.as_size("in_channels", in_channels, "pass 3 for colour images, 1 for grey ones")
    small_or_large = 'pass "cifar" for images of some 32 pixels, "imagenet" for those of some 224'
    stem = as_choice("stem", stem, ("cifar", "imagenet"), small_or_large)
    block = as_choice("block", block, ("basic", "bottleneck"), 'pass "bottleneck" for 50 layers and more')
    stages = as_widths(widths)
    depths = as_blocks(blocks, len(stages))
    normed = _as_normed(norm)
    _checks.as_function("activation", activation)
    _checks.as_function("bn", bn)
    compute = as_compute_dtype(dtype)
    remat = _checks.as_flag("remat", remat)
    if _checks.as_flag("zero_gamma", zero_gamma) and not normed:
        raise ValueError('zero_gamma: got True without a norm; expected False; there is no γ, pass norm="z".')
    layers, stem_stride, strides, convs, strided = layout(
        channels, classes, stem=stem, block=block, widths=stages, blocks=depths, normed=normed, zero_gamma=zero_gamma
    )

    def apply(params, state, x, *, train, axis_name=None, mask=None):
        check_fit(params, state, layers)
        x = _as_images(x, channels)
        if mask is not None:
            mask = _checks_layer.as_mask(mask, (len(x), 1))[:, :, None, None]

        def normalized_conv(layer, running, a, mask, stride=1):
            z = conv(a, layer["W"], stride)
            if not normed:
                return z + lax.expand_dims(layer["b"].astype(z.dtype), range(3)), None
            return bn(layer["bn"], running, z, train=train, axis_name=axis_name, mask=mask)

        def entry(layer, running, a, mask):
            z, seen = normalized_conv(layer, running, a, mask, stem_stride)
            a = activation(z)
            return max_pool(a) if stem == "imagenet" else a, seen

        def residual(layer, running, a, mask, stride):
            z, seen = a, {}
            for i, name in enumerate(convs):
                z = activation(z) if i > 0 else z
                own_stride = stride if name == strided else 1
                z, seen[name] = normalized_conv(layer[name], _at(running, name), z, mask, own_stride)
            if "shortcut" in layer:
                shortcut, running = layer["shortcut"], _at(running, "shortcut")
                a, seen["shortcut"] = normalized_conv(shortcut, running, a, mask, stride)
            return activation(a + z), seen

        if remat:
            residual = jax.checkpoint(residual, static_argnums=4)
            entry = jax.checkpoint(entry) if stem == "imagenet" else entry

        a = entered(x, mask, compute)
        a, stem_stats = entry(params["stem"], _at(state, "stem"), a, mask)
        stats: list[Any] = []
        for i, stride in enumerate(strides):
            a, seen = residual(params["blocks"][i], _at(_at(state, "blocks"), i), a, mask, stride)
            stats.append(seen)
        pooled = jnp.mean(a, (1, 2))
        outputs = affine(pooled, params["head"]["W"], params["head"]["b"])
        return outputs, {"stem": stem_stats, "blocks": stats, "head": None}

    return Network(partial(_init, layers), apply)


def _init(layers: dict[str, Any], key: jax.Array) -> tuple[Any, Any]:
    """Params and state of a tree of layers."""
    leaves, structure = jax.tree.flatten(layers, is_leaf=lambda node: isinstance(node, Layer))
    # One draw, cut up: drawn one by one, each new shape would be compiled, a quarter of a second each.
    cuts = list(accumulate((math.prod(layer.shape) for layer in leaves), initial=0))
    noise = jax.random.normal(key, (cuts[-1],), jnp.float32)
    made = [init_layer(noise[i:j], layer) for (i, j), layer in zip(pairwise(cuts), leaves, strict=True)]
    params, state = (jax.tree.unflatten(structure, column) for column in zip(*made, strict=True))
    return params, state


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


def _as_normed(norm: Any) -> bool:
    """Whether there are norms."""
    if norm is not None and not (isinstance(norm, str) and norm == "z"):
        raise ValueError(
            f'norm: got {norm!r}; expected "z" or None; '
            f'pass "z" to normalize before the activation, None not to normalize.'
        )
    return norm is not None
