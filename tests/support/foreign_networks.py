"""Numbers for the networks of other frameworks, and the parts of networks written down as functions of our params."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jbn


def filled(tree, seed=0):
    """Positive numbers in each float array; what sums over n inputs is about 1/n, so that nothing grows or cancels."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    arrays = []
    for leaf in leaves:
        if leaf.dtype == np.float32:
            fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
            leaf = jnp.asarray(rng.uniform(0.5, 2, leaf.shape) / fan_in, leaf.dtype)
        arrays.append(leaf)
    return jax.tree.unflatten(structure, arrays)


def images(count=3, size=8, channels=3):
    return np.random.default_rng(5).uniform(size=(count, size, size, channels)).astype(np.float32)


def conv(x, W, stride=1, padding="SAME", groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, W, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def norm(params, state, x, eps=1e-5):
    """In evaluation."""
    return jbn.bn_apply(params, state, x, train=False, eps=eps)[0]


def layer(shape, biased=False, normed=True):
    """Params and state of a layer, to be filled: {"W", "b", "bn"} as `jbn.networks` have it."""
    bn, state = jbn.bn_init(shape[-1])
    params = {"W": jnp.zeros(shape), "b": jnp.zeros(shape[-1]) if biased else None, "bn": bn if normed else None}
    return params, state if normed else None


def layers(table):
    """(params, state), dicts of layers by name from {name: arguments of `layer`}."""
    made = {name: layer(*arguments) for name, arguments in table.items()}
    return {name: p for name, (p, _) in made.items()}, {name: s for name, (_, s) in made.items()}


def small_resnet():
    """The CIFAR network of He et al. with a block in each of two stages: (network, params, state)."""
    network = jbn.networks.resnet(3, widths=(4, 8), blocks=1)
    return network, *jax.eval_shape(network.init, jax.random.key(0))
