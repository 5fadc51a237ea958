"""Arrays of other kinds than NumPy's and JAX's, known by what they can do."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from support.beside_stock import bits

import jbn
from jbn import convert

PARAMS, STATE = jbn.bn_init(3)
STATE = jbn.BNState(STATE.mean + 0.25, STATE.var * 2, STATE.count + 7)
ARRAYS = convert.to_torch(PARAMS, STATE)


class Tensor:
    """As much of a PyTorch tensor as a conversion needs: NumPy cannot read it while it wants gradients."""

    requires_grad, device = True, "elsewhere"

    def __init__(self, array, dtype=None):
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, dtype or f"torch.{self._array.dtype}"

    def _with(self, **changes):
        copy = Tensor(self._array, self.dtype)
        vars(copy).update({"requires_grad": self.requires_grad, "device": self.device, **changes})
        return copy

    def detach(self):
        return self._with(requires_grad=False)

    def cpu(self):
        return self._with(device="cpu")

    def float(self):
        copy = self._with()
        copy.dtype = "torch.float32"
        return copy

    def numpy(self):
        if self.requires_grad or self.device != "cpu":
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self._array

    __array__ = numpy


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, Tensor], ids=["numpy", "jax", "tensor"])
def test_arrays_of_any_kind_are_read(kind):
    with jax.enable_x64(True):  # where JAX keeps an int64
        arrays = {name: kind(array) for name, array in ARRAYS.items()}
    assert bits(convert.from_torch(arrays)) == bits((PARAMS, STATE))


def test_a_bfloat16_tensor_keeps_its_dtype():
    narrow = {k: Tensor(v, "torch.bfloat16" if "tracked" not in k else None) for k, v in ARRAYS.items()}
    params, state = convert.from_torch(narrow)
    assert (params.gamma.dtype, state.mean.dtype) == (jnp.bfloat16, jnp.float32)
    assert bits(state) == bits(STATE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_survive_both_ways(dtype):
    with jax.enable_x64(True):
        arrays = {k: v if "tracked" in k else v.astype(jnp.dtype(dtype)) for k, v in ARRAYS.items()}
        params, state = convert.from_torch(arrays)
        assert params.gamma.dtype == dtype
        assert state.var.dtype == (dtype if dtype == "float64" else "float32")
        assert bits(convert.to_torch(params, state, dtype=dtype)) == bits(arrays)


def test_the_byte_order_of_a_file_does_not_matter():
    swapped = {name: array.astype(array.dtype.newbyteorder("S")) for name, array in ARRAYS.items()}
    assert bits(convert.from_torch(swapped)) == bits((PARAMS, STATE))


def test_nothing_is_shared_with_what_was_read():
    arrays = {name: np.array(array) for name, array in ARRAYS.items()}
    params, state = convert.from_torch(arrays)
    for array in arrays.values():
        array[...] = 0
    assert bits((params, state)) == bits((PARAMS, STATE))
    written = convert.to_torch(params, state)
    for array in written.values():
        array[...] = 0
    assert bits((params, state)) == bits((PARAMS, STATE))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_stacks_and_several_feature_axes(shape):
    params, state = jbn.bn_init(shape)
    state = jbn.BNState(
        state.mean + 1, state.var, state.count + jnp.arange(1, 3, dtype=jnp.int32).reshape(2, *[1] * (len(shape) - 1))
    )
    for read, write in ((convert.from_flax, convert.to_flax), (convert.from_nnx, convert.to_nnx)):
        back = read(write(params, state))
        assert bits((back[0], back[1][:2])) == bits((params, state[:2]))
    if len(shape) == 2:  # a count for each layer of a stack
        assert bits(convert.from_torch(convert.to_torch(params, state))) == bits((params, state))
        fields = convert.to_equinox(params, state, momentum=0.5)
        assert fields["batch_counter"].tolist() == [1, 2]
        assert bits(convert.from_equinox(fields, momentum=0.5)) == bits((params, state))


def test_boxes_of_flax_are_opened_and_kept():
    variables = convert.to_flax(PARAMS, STATE, "bn")
    boxed = FrozenDict(
        {
            "params": {"bn": {k: nn.Partitioned(v, ("model",)) for k, v in variables["params"]["bn"].items()}},
            "batch_stats": variables["batch_stats"],
        }
    )
    assert bits(convert.from_flax(boxed, "bn", count=7)) == bits((PARAMS, STATE))
    back = convert.dump_network({"bn": PARAMS}, {"bn": STATE}, {"bn": "bn"}, format="flax", like=boxed)
    assert isinstance(back["params"]["bn"]["scale"], nn.Partitioned)
    assert bits(nn.unbox(back)) == bits(variables)


def test_channels_that_differ_in_their_counts_share_the_largest():
    uneven = jbn.BNState(STATE.mean, STATE.var, jnp.array([1, 5, 0], jnp.int32))
    assert convert.from_torch(convert.to_torch(PARAMS, uneven))[1].count.tolist() == [5, 5, 5]


@pytest.mark.processes
def test_no_framework_is_imported():
    code = """
import sys
frameworks = ("flax", "haiku", "equinox", "keras", "torch")
for name in frameworks:
    sys.modules[name] = None
import jbn
params, state = jbn.bn_init(2)
c = jbn.convert
for read, write in ((c.from_torch, c.to_torch), (c.from_flax, c.to_flax), (c.from_nnx, c.to_nnx),
                    (c.from_equinox, c.to_equinox), (c.from_keras, c.to_keras)):
    print(read(write(params, state))[0].gamma.tolist())
print(c.from_haiku(c.to_haiku(params, state), "batch_norm")[0].gamma.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["[1.0, 1.0]"] * 6
