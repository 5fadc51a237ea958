"""The problem of the tests on eight devices, and its answer on one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.problems import pose

from jbn import BNStats, bn_apply

D, N, C = 8, 32, 5
STATS = BNStats(P(), P(), P())


def mesh(shape=(D,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def problem(dtype=jnp.float32, mask=None, offset=0.0):
    """(params, x, weights of the loss, mask), the whole batch."""
    posed = pose((N, C), dtype=dtype, offset=offset)
    return posed.params, posed.x, posed.weights, MASKS[mask]


def _rows(per_shard):
    """(N, 1): the first rows of each shard count."""
    rows = N // D
    return jnp.asarray(np.concatenate([np.arange(rows) < k for k in per_shard])[:, None])


MASKS = {
    None: None,
    "unequal masks": _rows([1, 4, 2, 3, 4, 1, 2, 3]),
    "an empty shard": _rows([4, 0, 2, 3, 4, 1, 2, 4]),
    "one shard only": _rows([0, 0, 4, 0, 0, 0, 0, 0]),
    "differing between channels": jnp.asarray(np.random.default_rng(3).random((N, C)) < 0.5),
}


def loss_of(y, stats, weights, mask):
    """(of y, of stats): summed over examples, so that shards add up to the whole batch."""
    y = y.astype(jnp.float32)
    of_y = jnp.sum(jnp.where(True if mask is None else mask, weights * jnp.tanh(y), 0))
    return of_y, jnp.sum(jnp.sin(stats.mean)) + jnp.sum(jnp.sqrt(stats.var + 1))


def unsharded(params, x, weights, mask):
    """The whole batch on one device: (loss, (y, stats))."""
    y, stats = bn_apply(params, None, x, train=True, mask=mask)
    return sum(loss_of(y, stats, weights, mask)), (y, stats)


def whole(params, x, weights, mask):
    """(gradients, (y, stats)) of the whole batch on one device."""
    (_, out), gradients = jax.jit(jax.value_and_grad(unsharded, (0, 1), has_aux=True))(params, x, weights, mask)
    return gradients, out


def mask_spec(mask):
    return None if mask is None else P("data")


def split(a):
    return None if a is None else a.reshape(D, N // D, *a.shape[1:])
