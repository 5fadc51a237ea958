"""One published architecture for each format: loaded it computes the same, and it goes back bit for bit."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
from flax import nnx
from support.beside_stock import assert_near, bits
from support.equinox_models import ResNet
from support.foreign_networks import conv, filled, images, layers, norm, small_resnet

from jbn import convert


class LinenBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def normed(z, kernel, stride, name):
            padding = [(kernel // 2,) * 2] * 2
            z = nn.Conv(self.channels, (kernel,) * 2, stride, padding, use_bias=False, name=f"{name}_conv")(z)
            return nn.BatchNorm(not train, name=f"{name}_bn")(z)

        z = normed(nn.relu(normed(x, 3, self.stride, "first")), 3, 1, "second")
        x = normed(x, 1, self.stride, "proj") if self.stride > 1 else x
        return nn.relu(x + z)


class LinenResNet(nn.Module):
    """The CIFAR network of He et al. 2016, section 4.2."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="bn")(nn.Conv(4, (3, 3), padding=1, use_bias=False, name="conv")(x))
        for i, (channels, stride) in enumerate([(4, 1), (8, 2)]):
            x = LinenBlock(channels, stride, name=f"block{i}")(nn.relu(x) if i == 0 else x, train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def block_mapping(theirs, names, ours, projects):
    """{their convolution: our layer, their norm: its norm} for a block, from {our layer: (conv, norm)}."""
    mapping = {}
    for name, (kernel, norm_) in names.items():
        if name != "shortcut" or projects:
            mapping |= {theirs + kernel: f"{ours}/{name}", theirs + norm_: f"{ours}/{name}/bn"}
    return mapping


def test_flax():
    model, x = LinenResNet(), images()
    variables = filled(jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x))
    names = {ours: (f"{theirs}_conv", f"{theirs}_bn") for ours, theirs in LINEN_NAMES.items()}
    mapping = {"conv": "stem", "bn": "stem/bn", "head": "head"}
    for i in range(2):
        mapping |= block_mapping(f"block{i}/", names, f"blocks/{i}", i == 1)
    network, params, state = small_resnet()
    params, state = convert.load_network(params, state, variables, mapping, format="flax")
    for train in (False, True):
        expected = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))(variables, x)[0]
        y, _ = jax.jit(partial(network.apply, train=train))(params, state, x)
        assert_near(y, expected, 1e-5 if train else 1e-6)
    for like in (None, variables):
        assert bits(convert.dump_network(params, state, mapping, format="flax", like=like)) == bits(variables)


LINEN_NAMES = {"conv1": "first", "conv2": "second", "shortcut": "proj"}


class LeNet(nnx.Module):
    """LeCun et al. 1998, with rectifiers, batch norm and one bias-free layer; ``tail`` is used twice."""

    def __init__(self, rngs):
        self.features = nnx.List(
            [
                nnx.Conv(1, 6, (5, 5), use_bias=False, rngs=rngs),
                nnx.BatchNorm(6, rngs=rngs),
                nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs),
            ]
        )
        self.dense = nnx.Linear(256, 84, rngs=rngs)
        self.tail = nnx.Linear(84, 84, rngs=rngs)
        self.norm = nnx.BatchNorm(84, rngs=rngs)
        self.head = nnx.Linear(84, 10, rngs=rngs)

    def __call__(self, x):
        first, bn, second = self.features
        x = nnx.avg_pool(nnx.relu(bn(first(x))), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(second(x)), (2, 2), (2, 2))
        x = self.dense(x.reshape(len(x), -1))
        for _ in range(2):
            x = nnx.relu(self.norm(self.tail(x)))
        return self.head(x)


def test_nnx_with_a_layer_that_is_used_twice():
    model = LeNet(nnx.Rngs(0))
    model.eval()
    nnx.update(model, filled(nnx.state(model)))
    tails = [{"W": jnp.zeros((84, 84)), "b": jnp.zeros(84)} for _ in range(2)]
    table = {
        "c1": ((5, 5, 1, 6),),
        "c2": ((5, 5, 6, 16), True, False),
        "d": ((256, 84), True, False),
        "norm1": ((1, 84),),
        "norm2": ((1, 84),),
        "head": ((84, 10), True, False),
    }
    params, state = layers(table)
    params = {k: p["bn"] if "norm" in k else p for k, p in params.items()} | {"tails": tails}
    mapping = {
        "features/0": "c1",
        "features/1": "c1/bn",
        "features/2": "c2",
        "dense": "d",
        "tail": ["tails/0", "tails/1"],
        "norm": ["norm1", "norm2"],
        "head": "head",
    }
    variables = nnx.state(model)
    params, state = convert.load_network(params, state, variables, mapping, format="nnx")

    def pooled(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4

    @jax.jit
    def evaluate(x):
        a = pooled(jax.nn.relu(norm(params["c1"]["bn"], state["c1"], conv(x, params["c1"]["W"]))))
        a = pooled(jax.nn.relu(conv(a, params["c2"]["W"], padding="VALID") + params["c2"]["b"]))
        a = a.reshape(3, -1) @ params["d"]["W"] + params["d"]["b"]
        for i in range(2):
            tail = params["tails"][i]
            a = jax.nn.relu(norm(params[f"norm{i + 1}"], state[f"norm{i + 1}"], a @ tail["W"] + tail["b"]))
        return a @ params["head"]["W"] + params["head"]["b"]

    x = images(size=24, channels=1)
    assert_near(evaluate(x), nnx.jit(lambda model, x: model(x))(model, x), 1e-6)
    for like in (None, variables):
        back = convert.dump_network(params, state, mapping, format="nnx", like=like)
        assert bits(back) == bits(nnx.to_pure_dict(variables))
        nnx.update(LeNet(nnx.Rngs(1)), back)


def test_haiku():
    options = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (4, 4, 8, 8), "bottleneck": False}
    bn_config = {"decay_rate": 0.9}
    model = hk.transform_with_state(
        lambda x, train: hk.nets.ResNet(num_classes=3, bn_config=bn_config, **options)(x, train)
    )
    x = images(size=32)
    params, state = filled(jax.eval_shape(lambda key: model.init(key, x, True), jax.random.key(0)))
    warm = {"counter": jnp.int32(2**30)}  # so many updates that the hidden average is the average
    state = {name: {**kept, "hidden": kept["average"], **warm} for name, kept in state.items()}
    table = {"stem": ((7, 7, 3, 64),), "head": ((8, 3), True, False)}
    mapping = {
        "res_net/~/initial_conv": "stem",
        "res_net/~/initial_batchnorm": "stem/bn",
        "res_net/~/logits": "head",
    }
    for i, (n_in, n_out) in enumerate([(64, 4), (4, 4), (4, 8), (8, 8)]):
        sizes = {"conv_0": (3, 3, n_in, n_out), "conv_1": (3, 3, n_out, n_out), "shortcut_conv": (1, 1, n_in, n_out)}
        for name, size in sizes.items():
            table[f"{i}.{name}"] = (size,)
            theirs = f"res_net/~/block_group_{i}/~/block_0/~/{name}"
            mapping |= {theirs: f"{i}.{name}", theirs.replace("conv", "batchnorm"): f"{i}.{name}/bn"}
    ours, running = layers(table)
    ours, running = convert.load_network(ours, running, (params, state), mapping, format="haiku")

    def normed(name, a, stride):
        return norm(ours[name]["bn"], running[name], conv(a, ours[name]["W"], stride))

    @jax.jit
    def evaluate(x):
        a = jax.nn.relu(normed("stem", x, 2))
        a = jax.lax.reduce_window(a, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for i, stride in enumerate((1, 2, 2, 2)):
            z = normed(f"{i}.conv_1", jax.nn.relu(normed(f"{i}.conv_0", a, stride)), 1)
            a = jax.nn.relu(z + normed(f"{i}.shortcut_conv", a, stride))
        return a.mean((1, 2)) @ ours["head"]["W"] + ours["head"]["b"]

    assert_near(evaluate(x), jax.jit(model.apply, static_argnums=4)(params, state, None, x, False)[0], 1e-6)
    back = convert.dump_network(ours, running, mapping, format="haiku", like=(params, state))
    assert jax.tree.structure(back) == jax.tree.structure((params, state))
    assert bits(back) == bits((params, state))


def test_equinox():
    model, held = eqx.nn.make_with_state(ResNet)("ema", key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_array)
    model = eqx.combine(filled(arrays), rest)
    held = filled(held)
    names = {"conv1": ("conv1", "norm1"), "conv2": ("conv2", "norm2")}
    names["shortcut"] = ("shortcut/layers/0", "shortcut/layers/1")
    mapping = {"stem": "stem", "norm": "stem/bn", "head": "head"}
    for i in range(2):
        mapping |= block_mapping(f"blocks/{i}/", names, f"blocks/{i}", i == 1)
    network, params, state = small_resnet()
    params, state = convert.load_network(params, state, (model, held), mapping, format="equinox", layout="HWIO")

    evaluate = eqx.filter_jit(lambda m, s, x: jax.vmap(lambda x: eqx.nn.inference_mode(m)(x, s)[0])(x))
    x = images()
    expected = evaluate(model, held, x.transpose(0, 3, 1, 2))
    y, _ = jax.jit(partial(network.apply, train=False))(params, state, x)
    assert_near(y, expected, 1e-6)
    fresh = eqx.nn.make_with_state(ResNet)("ema", key=jax.random.key(1))
    back = convert.dump_network(params, state, mapping, format="equinox", like=fresh, layout="HWIO")
    assert jax.tree.structure(back) == jax.tree.structure((model, held))
    assert bits(eqx.filter(back, eqx.is_array)) != bits(eqx.filter(fresh, eqx.is_array))
    assert bits(eqx.filter(back[0], eqx.is_array)) == bits(eqx.filter(model, eqx.is_array))
    assert_near(evaluate(*back, x.transpose(0, 3, 1, 2)), expected, 0)


def stateless(model):
    return [[v.value for v in held] for held in (model.trainable_variables, model.non_trainable_variables)]


def test_keras(monkeypatch):
    """MobileNet of `keras.applications` (Howard et al. 2017), with random weights."""
    empty = lambda self, shape, dtype=None: np.zeros(shape, np.float32)  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", empty)  # which is compiled for every shape
    model = keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=3, classifier_activation=None)
    model.set_weights([np.asarray(a) for a in filled([np.asarray(v) for v in model.weights])])
    mapping = {"conv1": "conv1", "conv1_bn": "conv1/bn", "conv_preds": "conv_preds"}
    table, layout, strides = {"conv1": ((3, 3, 3, 8),), "conv_preds": ((1, 1, 256, 3), True, False)}, {}, {}
    for i in range(1, 14):
        depthwise, pointwise = (np.asarray(model.get_layer(f"conv_{kind}_{i}").kernel) for kind in ("dw", "pw"))
        channels = depthwise.shape[2]
        table |= {f"dw{i}": ((3, 3, 1, channels),), f"pw{i}": (pointwise.shape,)}
        for kind in ("dw", "pw"):
            mapping |= {f"conv_{kind}_{i}": f"{kind}{i}", f"conv_{kind}_{i}_bn": f"{kind}{i}/bn"}
        layout[f"conv_dw_{i}"] = "HWCM -> HWMC"  # grouped convolutions of JAX have the channels among the outputs
        strides[i] = model.get_layer(f"conv_dw_{i}").strides[0]
    params, state = layers(table)
    options = {"format": "keras", "layout": layout}
    params, state = convert.load_network(params, state, model.weights, mapping, **options)

    def normed(name, a, stride=1, padding="SAME", groups=1):
        z = conv(a, params[name]["W"], stride, padding, groups)
        return jnp.clip(norm(params[name]["bn"], state[name], z, eps=1e-3), 0, 6)

    @jax.jit
    def apply(x):
        a = normed("conv1", x, 2)
        for i, stride in strides.items():
            padding = "SAME" if stride == 1 else [(0, 1), (0, 1)]
            a = normed(f"pw{i}", normed(f"dw{i}", a, stride, padding, a.shape[-1]))
        return a.mean((1, 2)) @ params["conv_preds"]["W"][0, 0] + params["conv_preds"]["b"]

    x = images(size=32)
    assert_near(apply(x), jax.jit(lambda *v: model.stateless_call(*v)[0])(*stateless(model), x), 1e-6)
    back = convert.dump_network(params, state, mapping, like=model.weights, **options)
    assert bits(back) == bits([np.asarray(v) for v in model.weights])
    model.set_weights(back)
