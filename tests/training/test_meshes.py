"""Training on an explicit mesh with an axis for the batch and one for the features: the losses of one device."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.nightly import by_day

from jbn import networks
from jbn.training import TrainState, make_train_step

STEPS = 4
# How W and the vectors behind it are split in each layer: not at all; outputs of hidden layers over "model"; outputs
# and inputs in turn, as in large networks; the inputs over "data", as weights are that are gathered for their use.
WHOLE, OUTPUTS, INPUTS = (P(), P()), (P(None, "model"), P("model")), (P("model", None), P())
WEIGHTS = {
    "replicated": (WHOLE, WHOLE, WHOLE),
    "outputs": (OUTPUTS, OUTPUTS, WHOLE),
    "inputs and outputs in turn": (WHOLE, OUTPUTS, INPUTS),
    "inputs over the axis of the batch": ((P("data", None), P()),) * 3,
}


# How images are split, after the axis of the steps.
IMAGES = {
    "batch": P(None, "data"),
    "batch and rows": P(None, "data", "model"),
    "rows": P(None, None, "data"),
}


def loss_fn(outputs, y):
    """With one-hot labels: JAX 0.12 has no gradient of optax's loss with integer ones on an explicit mesh."""
    return optax.softmax_cross_entropy(outputs, jax.nn.one_hot(y, outputs.shape[-1])).mean()


def start(network):
    params, bn_state = jax.jit(network.init)(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        return TrainState(params, bn_state, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))


OPTIMIZER = optax.adam(1e-2)


@jax.jit
def rows():
    x = jax.random.normal(jax.random.key(1), (STEPS, 32, 8)) + 3
    return x, (x[..., 0] > x[..., 1]).astype(int)


def trained(network, train_state, batches, **options):
    """(train state after some steps, losses), in a loop that carries the train state."""
    step = make_train_step(network.apply, loss_fn, OPTIMIZER, **options)
    return jax.jit(partial(lax.scan, lambda state, batch: step(state, batch)))(train_state, batches)


def by_path(train_state, mesh, specs_of_layers):
    """Every array of layer i put on the mesh: matrices and vectors as ``specs_of_layers[i]`` says."""

    def put(path, leaf):
        index = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
        specs = specs_of_layers[index[-1]] if index and leaf.ndim else WHOLE
        spec = specs[0] if leaf.ndim == 2 else specs[1] if leaf.ndim == 1 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, train_state)


@pytest.mark.parametrize(
    ("weights", "accumulate"),
    by_day(itertools.product(WEIGHTS, (1, 2)), zip(WEIGHTS, (2, 1, 2, 1), strict=True)),
)
def test_a_perceptron_trains_as_on_one_device_and_its_state_stays_where_it_is(weights, accumulate):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    network = networks.mlp((8, 16, 8, 2))
    alone, batches = start(network), rows()
    want_state, want = trained(network, alone, batches, accumulate=accumulate)
    there = by_path(alone, mesh, WEIGHTS[weights])
    placed = jax.device_put(batches, NamedSharding(mesh, P(None, "data")))
    got_state, got = trained(network, there, placed, accumulate=accumulate)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-4)
    for a, b, c in zip(*map(jax.tree.leaves, (got_state, want_state, there)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert a.sharding.is_equivalent_to(c.sharding, a.ndim)


@pytest.mark.parametrize(
    ("split", "remat"),
    by_day(itertools.product(IMAGES, (False, True)), [("batch", True), ("batch and rows", False), ("rows", True)]),
)
def test_a_residual_network_trains_as_on_one_device(split, remat):
    spec, mesh = IMAGES[split], jax.make_mesh((4, 2), ("data", "model"))
    network = networks.resnet(2, in_channels=1, widths=(4, 8), blocks=1, remat=remat)
    x = jax.random.normal(jax.random.key(1), (STEPS, 8, 8, 8, 1))
    y = (x.mean((2, 3, 4)) > 0).astype(int)
    alone = start(network)
    _, want = trained(network, alone, (x, y))
    there = jax.device_put(alone, NamedSharding(mesh, P()))
    batches = (jax.device_put(x, NamedSharding(mesh, spec)), jax.device_put(y, NamedSharding(mesh, P(*spec[:2]))))
    _, got = trained(network, there, batches)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-4)
