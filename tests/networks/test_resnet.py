"""`resnet` against the plain formula: its values in NumPy float64, its gradients by autodiff of it."""

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.closeness import CHAIN, assert_close, assert_same_bits
from support.masked_images import assert_mask_selects
from support.small_resnet import CLASSES, EPS, NORMS, SHAPE, N, by_name, in_float64, made, plain, small

from jbn import BNParams, BNState, BNStats, bn_apply, bn_labels, bn_update_stats, weight_decay_mask
from jbn.networks import resnet


@NORMS
def test_outputs_stats_and_gradients_are_those_of_the_plain_formula(norm):
    network, params, state, x = made(norm)
    want, moments = plain(np, in_float64(params), np.asarray(x, np.float64))
    cotangent = np.random.default_rng(3).normal(size=want.shape)
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.asarray, in_float64(params))
        x = jnp.asarray(x, jnp.float64)

        @jax.jit
        def both(params, wide, cotangent):
            forward = partial(network.apply, train=True)
            outputs, vjp, stats = jax.vjp(lambda p: forward(p, state, x), params, has_aux=True)
            _, plain_vjp, _ = jax.vjp(lambda p: plain(jnp, p, x), wide, has_aux=True)
            return outputs, stats, *vjp(cotangent), *plain_vjp(cotangent)

        outputs, stats, grads, want_grads = jax.tree.map(np.asarray, both(params, wide, cotangent))
    np.testing.assert_allclose(outputs, want, rtol=1e-10, atol=1e-10)
    for name, node in by_name(stats).items():
        if norm is None:
            assert node is None
            continue
        np.testing.assert_allclose(node.mean, moments[name][0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(node.var, moments[name][1], rtol=1e-10)
        np.testing.assert_array_equal(node.count, N * (7 * 5 if name in ("stem", "0 conv1", "0 conv2") else 4 * 3))
    assert_close(grads, want_grads, roundings=64)  # float32, as the params are


def test_evaluation_uses_the_running_statistics_and_changes_none():
    network, params, state, x = made()
    _, stats = network.apply(params, state, x, train=True)
    state = bn_update_stats(state, stats)
    outputs, nothing = network.apply(params, state, x[:1] - 3, train=False)
    moments = {name: in_float64((node.mean, node.var)) for name, node in by_name(state).items()}
    want, _ = plain(np, in_float64(params), np.asarray(x[:1] - 3, np.float64), moments)
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-4)
    again = bn_update_stats(state, nothing)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, again))


@NORMS
def test_each_layer_holds_W_b_bn_and_only_blocks_that_change_the_shape_project(norm):
    params, state = jax.eval_shape(resnet(10, widths=(4, 4, 6), blocks=2, norm=norm).init, jax.random.key(0))
    assert list(map(list, params["blocks"])) == [
        ["conv1", "conv2"],
        ["conv1", "conv2"],
        ["conv1", "conv2", "shortcut"],  # the stride alone changes
        ["conv1", "conv2"],
        ["conv1", "conv2", "shortcut"],
        ["conv1", "conv2"],
    ]
    assert params["stem"]["W"].shape == (3, 3, 3, 4)
    assert params["blocks"][4]["shortcut"]["W"].shape == (1, 1, 4, 6)
    assert (params["head"]["W"].shape, params["head"]["bn"], state["head"]) == ((6, 10), None, None)
    pairs = [(params["stem"], state["stem"])]
    for block, running in zip(params["blocks"], state["blocks"], strict=True):
        assert list(block) == list(running)
        pairs += [(block[name], running[name]) for name in block]
    for layer, running in pairs:
        assert set(layer) == {"W", "b", "bn"}
        if norm is None:
            assert (layer["bn"], running) == (None, None)
            assert layer["b"].shape == layer["W"].shape[-1:]
        else:
            assert layer["b"] is None
            assert isinstance(layer["bn"], BNParams)
            assert isinstance(running, BNState)
            assert layer["bn"].gamma.shape == running.mean.shape == layer["W"].shape[-1:]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("blocks", "count"), [(3, 0.27e6), (5, 0.46e6), (7, 0.66e6), (9, 0.85e6)])
def test_the_number_of_params_is_that_of_the_paper(blocks, count):
    params, _ = jax.eval_shape(resnet(10, blocks=blocks).init, jax.random.key(0))
    leaves = jax.tree.leaves(params)
    assert sum(leaf.ndim == 4 and leaf.shape[0] == 3 for leaf in leaves) + 1 == 6 * blocks + 2
    projections = (16 + 2) * 32 + (32 + 2) * 64  # which option A of the paper does without
    total = sum(leaf.size for leaf in leaves)
    assert abs(total - projections - count) < 0.005e6
    assert blocks != 3 or total == 272_474


def test_W_is_the_same_for_the_same_key_whatever_the_norm_and_he_normal():
    shape = partial(resnet, 10, in_channels=16, widths=(64, 64), blocks=1)
    networks = (shape(), shape(norm=None), shape(zero_gamma=True, remat=True))
    (first, _), *others = (network.init(jax.random.key(7)) for network in networks)
    another, _ = shape().init(jax.random.key(8))

    def kernels(params):
        return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]

    for params, _ in others:
        assert_same_bits(kernels(params), kernels(first))
    for W, different in zip(kernels(first), kernels(another), strict=True):
        assert abs(float(W.std()) / np.sqrt(2 / np.prod(W.shape[:-1])) - 1) < 0.1
        assert abs(np.corrcoef(W.ravel(), different.ravel())[0, 1]) < 0.1
    for one, other in combinations(kernels(first), 2):
        assert abs(np.corrcoef(one.ravel()[:512], other.ravel()[:512])[0, 1]) < 0.2


def test_no_two_leaves_share_a_buffer():
    leaves = jax.tree.leaves(small(zero_gamma=True).init(jax.random.key(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("train", [True, False])
def test_with_zero_gamma_each_block_starts_as_its_shortcut(train):
    network = resnet(5, in_channels=2, widths=(4, 4), blocks=2, zero_gamma=True)
    params, state = network.init(jax.random.key(0))
    x = made()[3]
    outputs, _ = network.apply(params, state, x, train=train)

    def norm(z):
        mean, var = (z.mean((0, 1, 2)), z.var((0, 1, 2))) if train else (0.0, 1.0)
        return (z - mean) / np.sqrt(var + EPS)

    stem, shortcut = (np.asarray(layer["W"], np.float64) for layer in (params["stem"], params["blocks"][2]["shortcut"]))
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    a = np.maximum(norm(np.einsum("nhwcij,ijcd->nhwd", patches.astype(np.float64), stem)), 0)  # through two blocks
    a = np.maximum(norm(a[:, ::2, ::2] @ shortcut[0, 0]), 0)  # and two more
    np.testing.assert_allclose(outputs, a.mean((1, 2)) @ np.asarray(params["head"]["W"]), rtol=1e-4, atol=1e-5)
    for block in params["blocks"]:
        ones = {name: float(layer["bn"].gamma.min()) for name, layer in block.items()}
        assert ones == {name: float(name != "conv2") for name in block}


def test_with_zero_gamma_the_branches_learn_to_differ():
    network = small(zero_gamma=True)
    params, state = network.init(jax.random.key(0))
    x = made()[3]
    grads = jax.jit(jax.grad(lambda p: jnp.square(network.apply(p, state, x, train=True)[0]).mean()))(params)
    for block in grads["blocks"]:
        assert block["conv2"]["bn"].gamma.any()
        assert not block["conv2"]["W"].any()


def loss_and_grads(network, state, **options):
    """A jitted function of (params, x)."""

    def loss(params, x):
        outputs, stats = network.apply(params, state, x, train=True, **options)
        return jnp.mean(jnp.square(outputs.astype(jnp.float32))), (outputs, stats)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_remat_keeps_less_for_the_backward_pass_and_changes_no_value():
    network, params, state, x = made()
    again = small(remat=True)
    mask = jnp.arange(N)[:, None] != 2
    kept = []
    for net in (network, again):
        forward = partial(net.apply, train=True, mask=mask)
        _, vjp, _ = jax.eval_shape(lambda p: jax.vjp(lambda p: forward(p, state, x), p, has_aux=True), params)  # noqa: B023
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(vjp) if leaf.ndim == 4 and len(leaf) == N))
    assert kept[1] < 0.6 * kept[0]
    assert_close(
        loss_and_grads(again, state, mask=mask)(params, x),
        loss_and_grads(network, state, mask=mask)(params, x),
        roundings=CHAIN,
    )
    for net in (network, again):
        eager, _ = net.apply(params, state, x, train=False)
        np.testing.assert_allclose(eager, network.apply(params, state, x, train=False)[0], rtol=1e-5, atol=1e-6)


@NORMS
@pytest.mark.parametrize("train", [True, False])
def test_a_mask_is_the_same_as_computing_on_the_selected_images(norm, train):
    network, params, state, x = made(norm)
    assert_mask_selects(network, params, state, x, train=train, roundings=1024)


def test_an_empty_mask_moves_no_statistic_and_gives_finite_outputs():
    network, params, state, x = made()
    outputs, stats = network.apply(params, state, x * jnp.nan, train=True, mask=jnp.zeros((1, 1), bool))
    assert jnp.isfinite(outputs).all()
    assert_same_bits(bn_update_stats(state, stats), state)


@NORMS
def test_bfloat16_is_the_dtype_of_the_computation_alone(norm):
    network, params, state, x = made(norm, dtype=jnp.bfloat16)
    (_, (outputs, stats)), grads = loss_and_grads(network, state)(params, x)
    exact, _ = small(norm=norm).apply(params, state, x, train=True)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, stats))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(outputs.astype(jnp.float32), exact, rtol=0.1, atol=0.1)
    assert (outputs.astype(jnp.float32) != exact).any()


def test_narrow_inputs_are_computed_in_float32_unless_dtype_says_otherwise():
    network, params, state, x = made()
    outputs, _ = network.apply(params, state, x.astype(jnp.bfloat16), train=False)
    assert outputs.dtype == jnp.float32


def test_bn_is_called_once_for_each_convolution_with_all_it_needs():
    calls = []

    def recording(params, state, x, **options):
        calls.append((x.shape, options.pop("mask").shape, options))
        return bn_apply(params, state, x, eps=0.5, **options)

    network, params, state, x = made(bn=recording)
    outputs, _ = network.apply(params, state, x, train=True, mask=jnp.ones((N, 1), bool))
    whole, half = (N, 7, 5, 4), (N, 4, 3, 6)
    assert [shape for shape, *_ in calls] == [whole] * 3 + [half] * 3
    for _, mask, options in calls:
        assert mask == (N, 1, 1, 1)
        assert options == {"train": True, "axis_name": None}
    bound = small(bn=partial(bn_apply, eps=0.5)).apply(params, state, x, train=True)[0]
    np.testing.assert_allclose(outputs, bound, rtol=1e-5, atol=1e-5)


def test_axis_name_synchronizes_the_statistics():
    network, params, state, x = made()
    want = network.apply(params, state, x, train=True)
    apply = partial(network.apply, params, state, train=True, axis_name="parts")
    outputs, stats = jax.jit(jax.vmap(apply, axis_name="parts", out_axes=(0, None)))(x.reshape(4, 2, *SHAPE))
    assert_close((outputs.reshape(N, CLASSES), stats), want, roundings=1024)


def test_an_ensemble_is_a_vmap_of_init_and_apply():
    network, _, _, x = made()
    keys = jax.random.split(jax.random.key(5), 3)
    params, states = jax.jit(jax.vmap(network.init))(keys)
    apply = jax.jit(jax.vmap(partial(network.apply, train=True), in_axes=(0, 0, None)))
    outputs, stats = apply(params, states, x)
    states = bn_update_stats(states, stats)
    member, state = network.init(keys[1])
    want, want_stats = network.apply(member, state, x, train=True)
    np.testing.assert_allclose(outputs[1], want, rtol=1e-3, atol=1e-4)
    own = jax.tree.map(lambda leaf: leaf[1], states)
    assert_close(own, bn_update_stats(state, want_stats), roundings=2048)


def test_optax_masks_and_labels_tell_the_parameters_apart():
    params, _ = jax.eval_shape(small().init, jax.random.key(0))
    conv = {"W": True, "b": None, "bn": BNParams(gamma=False, beta=False)}
    block = {"conv1": conv, "conv2": conv}
    assert weight_decay_mask(params) == {
        "stem": conv,
        "blocks": [block, {**block, "shortcut": conv}],
        "head": {"W": True, "b": False, "bn": None},
    }
    labels = bn_labels(params)
    assert labels["blocks"][1]["shortcut"] == {"W": "other", "b": None, "bn": BNParams("bn", "bn")}
    assert labels["head"] == {"W": "other", "b": "other", "bn": None}


@pytest.mark.parametrize("missing", ["all", "the blocks", "the norms"])
def test_stats_may_be_taken_without_running_statistics(missing):
    network, params, state, x = made()
    state = {
        "all": None,
        "the blocks": {**state, "blocks": None},
        "the norms": jax.tree.map(lambda _: None, state, is_leaf=lambda node: isinstance(node, BNState)),
    }[missing]
    _, stats = network.apply(params, state, x, train=True)
    assert all(isinstance(node, BNStats) for node in by_name(stats).values())
    if missing != "the blocks":
        with pytest.raises(TypeError, match="state: got NoneType; expected BNState"):
            network.apply(params, state, x, train=False)
