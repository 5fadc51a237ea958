"""Whether `jbn.networks.resnet` computes what torchvision's network computed, on the weights that it had."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jbn import bn_update_stats
from jbn.convert import from_torchvision, to_torchvision
from jbn.networks import fold

CLOSE = 1e-10  # of the largest number in each array


def part(answers, kind):
    return {name.removeprefix(f"{kind}/"): v for name, v in answers.items() if name.startswith(f"{kind}/")}


def assert_equals_torchvision(make, answers, x):
    """In float64: logits in both modes and folded, all gradients, and the state dict after a training pass."""
    with jax.enable_x64(True):
        before = part(answers, "before")
        params, state = from_torchvision(before)
        _assert_same(to_torchvision(params, state), before)
        network, x = make(), jnp.asarray(x, jnp.float64)
        plain, folded = fold(make, params, state)

        @jax.jit
        def training(params, state, cotangent):
            forward = partial(network.apply, train=True)
            logits, pullback, stats = jax.vjp(lambda p: forward(p, state, x), params, has_aux=True)
            after = bn_update_stats(state, stats, momentum=0.9, debias=False)
            return logits, pullback(cotangent)[0], after

        logits, grads, after = training(params, state, jnp.asarray(answers["cotangent"]))
        got = {
            "training": logits,
            "evaluation": jax.jit(partial(network.apply, train=False))(params, state, x)[0],
            "folded": jax.jit(partial(plain.apply, train=False))(folded, None, x)[0],
        }
        _assert_close(got, part(answers, "logits"))
        # Gradients have the structure of params, and so torchvision's names.
        trained = to_torchvision(grads, state)
        want = part(answers, "grad")
        _assert_close({name: trained[name] for name in want}, want)
        assert set(want) == {name for name in trained if "running" not in name and "num_batches" not in name}
        want = part(answers, "after")
        trained = to_torchvision(params, after)
        _assert_close({name: trained[name] for name in want}, want)


def _assert_same(got, want):
    assert list(got) == list(want)
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def _assert_close(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        assert np.shape(got[name]) == array.shape, name
        error = np.max(np.abs(np.asarray(got[name], np.float64) - array))
        assert error <= CLOSE * np.max(np.abs(array)), f"{name}: off by {error:.3g} of {np.max(np.abs(array)):.3g}"
