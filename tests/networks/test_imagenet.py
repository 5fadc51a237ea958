"""`resnet` with the stem for ImageNet, against the plain formula: values in NumPy float64, gradients by autodiff."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.closeness import CHAIN, assert_close
from support.masked_images import assert_mask_selects
from support.nightly import by_day
from support.small_imagenet import BLOCKS, CLASSES, N, in_float64, is_norm, made, plain, small

from jbn import bn_update_stats
from jbn.networks import imagenet, resnet

# Of torchvision's networks with 1000 classes, and of the paper's tables 1 and 6 to the digits there.
COUNTS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize("depth", COUNTS)
def test_the_number_of_params_and_of_layers_is_that_of_the_paper(depth):
    network = resnet(1000, **imagenet(depth))
    params, state = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[depth]
    in_blocks = sum(name != "shortcut" for block in params["blocks"] for name in block)
    assert in_blocks + 2 == depth  # and the stem and the head
    outputs, stats = jax.eval_shape(
        partial(network.apply, train=True), params, state, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    )
    assert outputs.shape == (2, 1000)
    updated = jax.eval_shape(bn_update_stats, state, stats)
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, state)


def test_the_3x3_of_a_bottleneck_has_the_stride_and_the_images_shrink_to_a_32nd():
    seen = []

    def recording(params, state, x, **_):
        seen.append(x.shape[1:])
        return x, None

    network = resnet(10, **imagenet(50), bn=recording)
    params, state = jax.eval_shape(network.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 224, 200, 3), jnp.float32)
    jax.eval_shape(partial(network.apply, train=True), params, state, x)
    assert seen[:5] == [(112, 100, 64), (56, 50, 64), (56, 50, 64), (56, 50, 256), (56, 50, 256)]
    second_stage = seen[1 + 4 + 3 + 3 :]
    assert second_stage[:5] == [(56, 50, 128), (28, 25, 128), (28, 25, 512), (28, 25, 512), (28, 25, 128)]
    assert seen[-1] == (7, 7, 2048)
    assert len(seen) == 53


@pytest.mark.parametrize(
    ("block", "norm"),
    by_day(itertools.product(["basic", "bottleneck"], ["z", None]), [("bottleneck", "z"), ("basic", None)]),
)
def test_outputs_stats_and_gradients_are_those_of_the_plain_formula(block, norm):
    network, params, state, x = made(block, norm=norm)
    want, moments = plain(np, in_float64(params), np.asarray(x, np.float64))
    cotangent = np.random.default_rng(3).normal(size=want.shape)
    with jax.enable_x64(True):
        wide, x = jax.tree.map(jnp.asarray, in_float64(params)), jnp.asarray(x, jnp.float64)

        @jax.jit
        def both(wide, cotangent):
            forward = partial(network.apply, train=True)
            outputs, vjp, stats = jax.vjp(lambda p: forward(p, state, x), wide, has_aux=True)
            _, plain_vjp, _ = jax.vjp(lambda p: plain(jnp, p, x), wide, has_aux=True)
            return outputs, stats, *vjp(cotangent), *plain_vjp(cotangent)

        outputs, stats, grads, want_grads = jax.tree.map(np.asarray, both(wide, cotangent))
    np.testing.assert_allclose(outputs, want, rtol=1e-10, atol=1e-10)
    own = jax.tree.map(lambda node: (node.mean, node.var), stats, is_leaf=is_norm)
    for got, exact in zip(jax.tree.leaves(own), jax.tree.leaves(moments), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-10)
    counts = {int(leaf) for node in jax.tree.leaves(stats, is_leaf=is_norm) for leaf in node.count}
    assert counts == (set() if norm is None else {N * 7 * 5, N * 4 * 3, N * 2 * 2})
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-8, atol=1e-9)


@BLOCKS
def test_evaluation_uses_the_running_statistics(block):
    network, params, state, x = made(block)
    outputs, _ = jax.jit(partial(network.apply, train=False))(params, state, x[:1] - 3)
    want, _ = plain(np, in_float64(params), np.asarray(x[:1] - 3, np.float64), in_float64(state))
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-4)


@BLOCKS
def test_params_and_state_have_a_layer_at_each_place_and_the_last_gamma_of_a_block_may_start_at_0(block):
    params, state = small(block=block, zero_gamma=True).init(jax.random.key(0))
    last = "conv2" if block == "basic" else "conv3"
    convs = ["conv1", "conv2"] if block == "basic" else ["conv1", "conv2", "conv3"]
    shortcuts = [block == "bottleneck", True, False]
    for i, (layers, running) in enumerate(zip(params["blocks"], state["blocks"], strict=True)):
        assert list(layers) == list(running) == convs + ["shortcut"] * shortcuts[i]
        gammas = {name: float(layer["bn"].gamma.max()) for name, layer in layers.items()}
        assert gammas == {name: float(name != last) for name in layers}
    assert params["stem"]["W"].shape == (7, 7, 2, 2)
    assert params["head"]["W"].shape == (3 if block == "basic" else 12, CLASSES)


def test_one_number_of_blocks_stands_for_all_stages_and_a_small_stem_goes_with_bottlenecks():
    wanted = resnet(3, widths=(4, 8), blocks=(2, 2), block="bottleneck")
    network = resnet(3, widths=(4, 8), blocks=2, block="bottleneck")
    (params, state), (of_each, _) = (jax.eval_shape(net.init, jax.random.key(0)) for net in (network, wanted))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, of_each)
    assert params["stem"]["W"].shape == (3, 3, 3, 4)
    forward = partial(network.apply, train=False)
    outputs, _ = jax.eval_shape(forward, params, state, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert outputs.shape == (2, 3)


def loss_and_grads(network, state, **options):
    """A jitted function of (params, x)."""

    def loss(params, x):
        outputs, stats = network.apply(params, state, x, train=True, **options)
        return jnp.mean(jnp.square(outputs.astype(jnp.float32))), (outputs, stats)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("block", ["bottleneck", pytest.param("basic", marks=pytest.mark.nightly)])
def test_remat_keeps_less_for_the_backward_pass_and_changes_no_value(block):
    network, params, state, x = made(block)
    again, mask = small(block=block, remat=True), jnp.arange(N)[:, None] != 2
    kept = []
    for net in (network, again):
        forward = partial(net.apply, train=True, mask=mask)
        _, vjp, _ = jax.eval_shape(lambda p: jax.vjp(lambda p: forward(p, state, x), p, has_aux=True), params)  # noqa: B023
        leaves = jax.tree.leaves(vjp)
        kept.append(sum(leaf.size for leaf in leaves if leaf.ndim == 4 and len(leaf) == N))
        assert not any(leaf.shape == (N, 7, 5, 2) for leaf in leaves) or net is network  # of the stem nothing
    assert kept[1] < 0.6 * kept[0]
    got, want = (loss_and_grads(net, state, mask=mask)(params, x) for net in (again, network))
    assert_close(got, want, roundings=4 * CHAIN)


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_mask_is_the_same_as_computing_on_the_selected_images(train):
    network, params, state, x = made()
    assert_mask_selects(network, params, state, x, train=train, roundings=8 * CHAIN)


def test_bfloat16_is_the_dtype_of_the_computation_alone():
    network, params, state, x = made(dtype=jnp.bfloat16)
    (_, (outputs, stats)), grads = loss_and_grads(network, state)(params, x)
    exact, _ = jax.jit(partial(small(block="bottleneck").apply, train=True))(params, state, x)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, stats))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(outputs.astype(jnp.float32), exact, rtol=0.15, atol=0.15 * float(jnp.abs(exact).max()))
    assert (outputs.astype(jnp.float32) != exact).any()
