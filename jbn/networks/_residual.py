"""How a residual network is laid out: its stem, its blocks, the layers in them, and which of them halve the image."""

from typing import Any, NamedTuple

from jbn import _checks
from jbn.networks._network import Layer

__all__ = ["Layout", "as_blocks", "as_choice", "as_widths", "imagenet", "layout"]

# Blocks in each stage, and of which kind: table 1 of the paper.
_DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def imagenet(depth: int) -> dict[str, Any]:
    """The arguments of `resnet` for the network of He et al. for ImageNet with this many layers.

    Args:
        depth: 18, 34, 50, 101 or 152.

    Returns:
        ``{"stem": "imagenet", "block": …, "widths": (64, 128, 256, 512), "blocks": …}``, as keywords.

    Raises:
        TypeError: ``depth`` no int.
        ValueError: another depth than these.

    Example:
        >>> import jax
        >>> from jbn.networks import imagenet, resnet
        >>> imagenet(50)
        {'stem': 'imagenet', 'block': 'bottleneck', 'widths': (64, 128, 256, 512), 'blocks': (3, 4, 6, 3)}
        >>> params, state = jax.eval_shape(resnet(1000, **imagenet(50)).init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        25557032

    torchvision: ``resnet18`` to ``resnet152`` (there "v1.5", as here: the 3×3 of a bottleneck has the stride).

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning", table 1.
    """
    advice = "pass stem, block, widths and blocks to resnet yourself for a network of another depth"
    wanted = f"expected {', '.join(map(str, list(_DEPTHS)[:-1]))} or {max(_DEPTHS)}; {advice}."
    if _checks.as_int("depth", depth, wanted) not in _DEPTHS:
        raise ValueError(f"depth: got {depth}; {wanted}")
    block, blocks = _DEPTHS[depth]
    return {"stem": "imagenet", "block": block, "widths": (64, 128, 256, 512), "blocks": blocks}


class Layout(NamedTuple):
    """Where the layers of a residual network are, and what its convolutions stride over."""

    layers: dict[str, Any]  # a `Layer` at the place of its params
    stem_stride: int
    strides: list[int]  # of each block
    convs: tuple[str, ...]  # of a block, in order
    strided: str  # the one of them that has the block's stride


def layout(
    channels: int,
    classes: int,
    *,
    stem: str,
    block: str,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    normed: bool,
    zero_gamma: bool,
) -> Layout:
    """The layout for arguments that were checked."""

    def conv(size, n_in, n_out, *, last=False):
        return Layer((size, size, n_in, n_out), normed, biased=not normed, zero_gamma=last and zero_gamma)

    def block_of(n_in, n, n_out):
        if block == "basic":
            return {"conv1": conv(3, n_in, n), "conv2": conv(3, n, n, last=True)}
        return {"conv1": conv(1, n_in, n), "conv2": conv(3, n, n), "conv3": conv(1, n, n_out, last=True)}

    size, stem_stride = (3, 1) if stem == "cifar" else (7, 2)
    expansion, strided = (1, "conv1") if block == "basic" else (4, "conv2")
    n_in, made, strides = widths[0], [], []
    for stage, (n, depth) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(depth):
            strides.append(2 if stage > 0 and i == 0 else 1)
            made.append(block_of(n_in, n, expansion * n))
            if strides[-1] > 1 or n_in != expansion * n:
                made[-1]["shortcut"] = conv(1, n_in, expansion * n)
            n_in = expansion * n
    layers = {"stem": conv(size, channels, widths[0]), "blocks": made, "head": Layer((n_in, classes), normed=False)}
    convs = ("conv1", "conv2") if block == "basic" else ("conv1", "conv2", "conv3")
    return Layout(layers, stem_stride, strides, convs, strided)


def as_widths(widths: Any) -> tuple[int, ...]:
    """The channels of each stage as a tuple of ints."""
    advice = "pass the channels of each stage, as in widths=(16, 32, 64)"
    if not isinstance(widths, (list, tuple)):
        raise TypeError(f"widths: got {widths!r}; expected a sequence of ints; {advice}.")
    if not widths:
        raise ValueError(f"widths: got {widths!r}; expected at least one stage; {advice}.")
    return tuple(_checks.as_size("widths", width, advice) for width in widths)


def as_blocks(blocks: Any, stages: int) -> tuple[int, ...]:
    """The number of blocks in each stage, from one for all of them or one for each."""
    if not isinstance(blocks, (list, tuple)):
        return (_checks.as_size("blocks", blocks, "pass the blocks in each stage, as in blocks=3"),) * stages
    advice = "pass one number for each stage, as in widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3)"
    if len(blocks) != stages:
        raise ValueError(f"blocks: got {blocks!r}; expected {stages} numbers, one for each of widths; {advice}.")
    return tuple(_checks.as_size("blocks", n, advice) for n in blocks)


def as_choice(name: str, value: Any, choices: tuple[str, ...], advice: str) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}: got {value!r}; expected {listed}; {advice}.")
    return value
