"""A folded network gives the outputs of the one that was not, without any state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.closeness import assert_close, bits

from jbn import BNState, bn_apply
from jbn.networks import fold, mlp, resnet


@partial(jax.jit, static_argnums=0)
def trained(network, key):
    """Params and state as after training: nothing is 0 or 1, b included."""
    params, state = network.init(key)

    def moved(leaf, positive=False):
        noise = jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape) / 3, leaf.dtype)
        return leaf * jnp.exp(noise) if positive else leaf + noise

    def running(node):
        return BNState(moved(node.mean), moved(node.var, True), node.count + 1)

    is_state = lambda node: isinstance(node, BNState)  # noqa: E731
    return jax.tree.map(moved, params), jax.tree.map(running, state, is_leaf=is_state)


WIDE = partial(bn_apply, eps=0.1)
NETWORKS = {
    "mlp": (partial(mlp, (5, 8, 7, 3)), (4, 5)),
    "mlp, norm after the activation": (partial(mlp, (5, 8, 7, 3), norm="a", activation=jnp.tanh), (4, 5)),
    "mlp, another eps": (partial(mlp, (5, 8, 3), bn=WIDE), (4, 5)),
    "mlp, another eps, after": (partial(mlp, (5, 8, 3), norm="a", bn=WIDE), (4, 5)),
    "mlp without hidden layers": (partial(mlp, (5, 3)), (4, 5)),
    "mlp without norm": (partial(mlp, (5, 8, 3), norm=None), (4, 5)),
    "resnet": (
        partial(resnet, 3, in_channels=2, widths=(4, 6), blocks=1, zero_gamma=True, bn=WIDE),
        (2, 6, 6, 2),
    ),
    "resnet for ImageNet": (partial(resnet, 3, stem="imagenet", widths=(2, 4), blocks=(1, 2), bn=WIDE), (2, 14, 9, 3)),
    "resnet of bottlenecks": (
        partial(resnet, 3, stem="imagenet", block="bottleneck", widths=(2, 4), blocks=(2, 1), zero_gamma=True),
        (2, 14, 9, 3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_gives_the_outputs_of_the_network_without_any_state(name):
    make, shape = NETWORKS[name]
    network = make()
    params, state = trained(network, jax.random.key(0))
    folded, folded_params = fold(make, params, state)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    want, _ = jax.jit(partial(network.apply, train=False))(params, state, x)
    got, stats = jax.jit(partial(folded.apply, train=False))(folded_params, None, x)
    want = oracle.float64(want)
    assert np.max(np.abs(oracle.float64(got) - want)) <= 1e-5 * np.max(np.abs(want))
    assert jax.tree.leaves(stats) == []
    same = jax.tree.map(jnp.shape, folded_params) == jax.tree.map(
        jnp.shape, jax.eval_shape(folded.init, jax.random.key(0))[0]
    )
    assert same, "the folded params have the structure of the folded network's own"


def test_a_network_is_folded_under_jit_and_leaves_its_params_alone():
    make, _ = NETWORKS["mlp, norm after the activation"]
    params, state = trained(make(), jax.random.key(0))
    before = jax.tree.map(bits, params)
    compiled = jax.jit(lambda params, state: fold(make, params, state)[1])(params, state)
    _, folded = fold(make, params, state)
    assert_close(compiled, folded)
    assert jax.tree.map(bits, params) == before


def test_what_does_not_fit_is_refused_with_its_path():
    make, _ = NETWORKS["mlp"]
    params, state = make().init(jax.random.key(0))
    hint = "pass make with the arguments of the network that was trained."
    cases = [
        (make, params[:2], state, f"params[2]['W']: got nothing; expected shape (7, 3); {hint}"),
        (make, params, None, f"state[0].mean: got nothing; expected shape (8,); {hint}"),
        (partial(mlp, (5, 9, 7, 3)), params, state, f"params[0]['W']: got shape (5, 8); expected shape (5, 9); {hint}"),
        (partial(make, norm=None), params, state, f"params[0]['bn'].gamma: got shape (8,); expected nothing; {hint}"),
    ]
    for made, given, running, text in cases:
        with pytest.raises(ValueError, match="expected") as caught:
            fold(made, given, running)
        assert str(caught.value) == text


def test_what_made_the_network_has_to_be_known():
    make, _ = NETWORKS["mlp"]
    params, state = make().init(jax.random.key(0))
    lent = "expected functools.partial of mlp or resnet; pass what made the network, as in"
    for made, shown in ((make(), "Network"), (mlp, "mlp"), (partial(int), "functools.partial of int")):
        with pytest.raises(TypeError) as caught:
            fold(made, params, state)
        assert str(caught.value).startswith(f"make: got {shown}; {lent} ")
    other = (
        "expected bn_apply, or functools.partial of it with keywords; fold the layers of another norm yourself, with"
    )
    bound = "functools.partial of bn_apply with 1 positional"
    for bn, shown in ((np.mean, "mean"), (partial(WIDE, params), bound)):
        with pytest.raises(TypeError) as caught:
            fold(partial(make, bn=bn), params, state)
        assert str(caught.value) == f"bn: got {shown}; {other} bn_fold."
