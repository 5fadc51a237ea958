"""Against PyTorch itself; without it tests/convert/test_golden.py reads what it wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.beside_stock import bits

import jbn
from jbn import convert

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[parity]'")

SHAPES = {torch.nn.BatchNorm1d: (16, 3), torch.nn.BatchNorm2d: (4, 3, 5, 5), torch.nn.BatchNorm3d: (2, 3, 2, 3, 4)}


def trained(kind=torch.nn.BatchNorm2d, steps=3, **options):
    torch.manual_seed(0)
    layer = kind(3, **options)
    if layer.affine:
        torch.nn.init.uniform_(layer.weight, 0.5, 2)
        torch.nn.init.normal_(layer.bias)
    for _ in range(steps):
        layer(3 * torch.randn(SHAPES[kind]) + 1)
    return layer


def as_tensors(arrays):
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def assert_loads_as(arrays, state_dict):
    """Bit for bit, and of the same dtypes and shapes."""
    tensors = as_tensors(arrays)
    assert list(tensors) == list(state_dict)
    for name, tensor in tensors.items():
        assert tensor.dtype == state_dict[name].dtype
        assert torch.equal(tensor, state_dict[name])


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_computes_the_same_in_both_modes(kind, affine, momentum):
    layer = trained(kind, affine=affine, momentum=momentum)
    params, state = convert.from_torch(layer.state_dict())
    assert state.count.tolist() == [3] * 3
    x = torch.randn(SHAPES[kind])
    axis = 1
    y, _ = jbn.bn_apply(params, state, x.numpy(), train=False, axis=axis)
    np.testing.assert_allclose(y, layer.eval()(x).detach(), rtol=1e-6, atol=1e-6)
    layer.train()
    rule = {"momentum": 1.0} if momentum is None else {"momentum": 1 - momentum, "debias": False}
    for _ in range(5):
        x = 2 * torch.randn(SHAPES[kind]) - 1
        y, stats = jbn.bn_apply(params, state, x.numpy(), train=True, axis=axis)
        state = jbn.bn_update_stats(state, stats, **rule)
        np.testing.assert_allclose(y, layer(x).detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.mean, layer.running_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.var, layer.running_var, rtol=1e-5)
    assert state.count.tolist() == [int(layer.num_batches_tracked)] * 3


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_a_state_dict_goes_back_bit_for_bit(steps, affine):
    state_dict = trained(steps=steps, affine=affine).state_dict()
    params, state = convert.from_torch(state_dict)
    arrays = convert.to_torch(params, state)
    assert_loads_as(arrays, state_dict)
    assert bits(convert.from_torch(arrays)) == bits((params, state))
    torch.nn.BatchNorm2d(3, affine=affine).load_state_dict(as_tensors(arrays))


def test_statistics_whose_updates_pytorch_does_not_know_are_warm():
    state_dict = trained().state_dict()
    state_dict["num_batches_tracked"].zero_()
    params, state = convert.from_torch(state_dict)
    assert state.count.tolist() == [np.iinfo(np.int32).max] * 3
    assert_loads_as(convert.to_torch(params, state), state_dict)
    del state_dict["num_batches_tracked"]
    assert bits(convert.from_torch(state_dict)) == bits((params, state))


def test_bfloat16_goes_both_ways():
    state_dict = trained().bfloat16().state_dict()
    params, state = convert.from_torch(state_dict)
    assert (params.gamma.dtype, state.var.dtype) == (jnp.bfloat16, jnp.float32)
    back = convert.to_torch(params, state, dtype=jnp.bfloat16)
    for name, array in back.items():
        tensor = torch.from_dlpack(jnp.asarray(array)) if array.dtype == jnp.bfloat16 else torch.as_tensor(array)
        assert tensor.dtype == state_dict[name].dtype
        assert torch.equal(tensor, state_dict[name])


def test_parameters_that_want_gradients_are_detached():
    layer = trained()
    live = dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert live["weight"].requires_grad
    assert bits(convert.from_torch(live)) == bits(convert.from_torch(layer.state_dict()))


def test_what_is_read_is_a_copy():
    layer = trained()
    _, state = convert.from_torch(layer.state_dict())
    before = bits(state)
    layer(torch.randn(4, 3, 5, 5))
    assert bits(state) == before


def test_a_tensor_without_values_is_one_line():
    state_dict = torch.nn.BatchNorm2d(3, device="meta").state_dict()
    with pytest.raises(TypeError, match=r"^state_dict\['running_mean'\]: got torch\.Tensor, which gives"):
        convert.from_torch(state_dict)


def test_an_ensemble_is_a_stack():
    layers = [trained(steps=n) for n in (1, 2)]
    params, buffers = torch.func.stack_module_state(layers)
    stacked = convert.from_torch(params | buffers)
    assert stacked[1].count.tolist() == [[1] * 3, [2] * 3]
    alone = [convert.from_torch(layer.state_dict()) for layer in layers]
    assert bits(stacked) == bits(jax.tree.map(lambda *a: jnp.stack(a), *alone))
    assert_loads_as(convert.to_torch(*stacked), {**params, **buffers})


def test_float64_needs_64_bit():
    state_dict = trained().double().state_dict()
    with jax.enable_x64(False), pytest.raises(TypeError, match="got dtype float64, which JAX would round to float32"):
        convert.from_torch(state_dict)
    with jax.enable_x64(True):
        params, state = convert.from_torch(state_dict)
        assert state.mean.dtype == jnp.float64
        assert_loads_as(convert.to_torch(params, state), state_dict)


class Block(torch.nn.Module):
    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1:
            convolution = torch.nn.Conv2d(before, channels, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(torch.nn.Module):
    """The CIFAR network of He et al. 2016, section 4.2, named as torchvision names its own; the paper's has n = 3."""

    def __init__(self, n=1, widths=(4, 8)):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(widths[0])
        before = widths[0]
        for stage, channels in enumerate(widths, 1):
            strides = [2 if stage > 1 else 1] + [1] * (n - 1)
            blocks = [Block(before if i == 0 else channels, channels, s) for i, s in enumerate(strides)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
            before = channels
        self.stages = len(widths)
        self.fc = torch.nn.Linear(before, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def resnet_mapping(n, stages):
    mapping = {"conv1": "stem", "bn1": "stem/bn"}
    names = {"conv1": "conv1", "bn1": "conv1/bn", "conv2": "conv2", "bn2": "conv2/bn"}
    names |= {"downsample.0": "shortcut", "downsample.1": "shortcut/bn"}
    for stage in range(stages):
        for i in range(n):
            for theirs, ours in names.items():
                if "shortcut" not in ours or (stage and not i):
                    mapping[f"layer{stage + 1}.{i}.{theirs}"] = f"blocks/{stage * n + i}/{ours}"
    return mapping | {"fc": "head"}


def test_a_residual_network_computes_the_same_in_both_modes_and_goes_back():
    n, widths = 2, (4, 8)
    torch.manual_seed(0)
    model = ResNet(n, widths)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8))
    network = jbn.networks.resnet(3, widths=widths, blocks=n)
    params, state = jax.eval_shape(network.init, jax.random.key(0))
    mapping, options = resnet_mapping(n, len(widths)), {"format": "torch", "layout": "HWIO"}
    params, state = convert.load_network(params, state, model.state_dict(), mapping, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for like in (None, before):
        assert_loads_as(convert.dump_network(params, state, mapping, like=like, **options), before)
    x = torch.randn(4, 3, 8, 8)
    nhwc = x.permute(0, 2, 3, 1).numpy()
    for train in (False, True):
        y, stats = jax.jit(network.apply, static_argnames="train")(params, state, nhwc, train=train)
        np.testing.assert_allclose(y, model.train(train)(x).detach(), rtol=1e-4, atol=1e-5)
    state = jbn.bn_update_stats(state, stats, debias=False)
    after = convert.dump_network(params, state, mapping, **options)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(after[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_module_that_pytorch_names_twice_is_one_of_ours():
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(shared, torch.nn.BatchNorm1d(3), torch.nn.ReLU(), shared)
    state_dict = model.state_dict()
    assert {"0.weight", "3.weight"} <= set(state_dict)
    bn, running = jbn.bn_init(3)
    params = {"W": jnp.zeros((3, 3)), "b": jnp.zeros(3), "bn": bn}
    mapping, options = {"0": "", "1": "bn", "3": ""}, {"format": "torch", "layout": "HWIO"}
    params, running = convert.load_network(params, {"bn": running}, state_dict, mapping, **options)
    assert_loads_as(convert.dump_network(params, running, mapping, like=state_dict, **options), state_dict)
