"""Networks on a batch of images some of which are masked out."""

import jax
import jax.numpy as jnp
import numpy as np
from support.closeness import assert_close


def assert_mask_selects(network, params, state, x, *, train, roundings):
    """Loss, statistics and gradients with a mask, and NaN behind it, are those of the selected images."""
    keep = np.arange(len(x)) % 3 != 1
    dirty = jnp.where(keep[:, None, None, None], x, jnp.nan)

    def loss(params, x, rows, mask):
        outputs, stats = network.apply(params, state, x, train=train, mask=mask)
        return jnp.mean(jnp.square(outputs[rows])), stats

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    masked = run(params, dirty, np.flatnonzero(keep), jnp.asarray(keep)[:, None])
    assert_close(masked, run(params, x[keep], np.arange(keep.sum()), None), roundings=roundings)
