"""What calibration stores in narrow states: every number rounded once, however many values were seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from jbn import BNState, BNStats, bn_calibrate, bn_update_stats

C = 64


def old(dtype):
    return BNState(jnp.full(C, 9, dtype), jnp.full(C, 9, dtype), jnp.full(C, 9, jnp.int32))


def calibrated(state, *batches):
    return bn_calibrate(lambda params, state, stats: (None, stats), None, state, batches)


def seen(mean, var, count):
    return BNStats(*(np.broadcast_to(np.float32(v), C) for v in (mean, var, count)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("count", [65504, 65536, 2**30])
def test_a_channel_that_has_seen_any_number_of_values_is_calibrated(dtype, count):
    state = calibrated(old(dtype), seen(1, 2, count), seen(3, 2, count))
    np.testing.assert_array_equal(state.mean.astype(jnp.float32), 2)
    np.testing.assert_allclose(
        state.var.astype(jnp.float32), 3 * 2 * count / (2 * count - 1), rtol=jnp.finfo(dtype).eps
    )
    np.testing.assert_array_equal(state.count, 2)
    assert state.mean.dtype == state.var.dtype == dtype


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float16, 11), (jnp.bfloat16, 8), (jnp.float32, 24)])
def test_mean_and_unbiased_variance_are_rounded_once(dtype, bits):
    rng = np.random.default_rng(0)
    batches = [seen(rng.uniform(-2, 2, C), rng.uniform(1, 2, C), 5), seen(rng.uniform(-2, 2, C), 1.5, 3)]
    state = calibrated(old(dtype), *batches)
    means, variances, counts = (
        np.stack([getattr(b, name) for b in batches]).astype(np.float64) for name in BNStats._fields
    )
    m = counts.sum(0)
    mean = (counts * means).sum(0) / m
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / m * m / (m - 1)
    for got, want in ((state.mean, mean), (state.var, var)):
        _, exponent = np.frexp(want)
        half_a_step = np.ldexp(0.5, exponent - bits)
        assert np.all(np.abs(np.asarray(got).astype(np.float64) - want) <= half_a_step * (1 + 1e-6))


def test_a_bfloat16_state_takes_what_an_update_of_it_takes():
    state = old(jnp.bfloat16)
    rng = np.random.default_rng(1)
    stats = seen(rng.uniform(-2, 2, C), rng.uniform(0.1, 9, C), 3)
    got, want = calibrated(state, stats), bn_update_stats(state._replace(count=jnp.zeros(C, jnp.int32)), stats)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(*(getattr(node, name).astype(jnp.float32) for node in (got, want)))


def test_a_channel_that_overflows_the_state_keeps_its_old_values_and_all_of_them_are_an_error():
    large = seen(1e5, 1, 4)
    mixed = BNStats(*(np.where(np.arange(C) < 2, a, b) for a, b in zip(large, seen(1, 3, 4), strict=True)))
    state = calibrated(old(jnp.float16), mixed)
    np.testing.assert_array_equal(state.count, np.where(np.arange(C) < 2, 9, 1))
    np.testing.assert_array_equal(state.mean.astype(jnp.float32), np.where(np.arange(C) < 2, 9, 1))
    with pytest.raises(ValueError, match="not finite in all channels"):
        calibrated(old(jnp.float16), large)


class Loader:
    """Batches whose number is not known."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter([seen(1, 1, 4)] * 3)

    def __len__(self):
        if isinstance(self.length, Exception):
            raise self.length
        return self.length


@pytest.mark.parametrize(
    "length",
    [NotImplementedError("a stream"), RuntimeError("closed"), TypeError("no sampler"), 2.5, None, "3", -1, 2**70],
    ids=repr,
)
def test_the_bar_of_batches_that_do_not_know_their_number_shows_none(length, capsys):
    state = bn_calibrate(
        lambda params, state, stats: (None, stats), None, old(jnp.float32), Loader(length), progress=True
    )
    np.testing.assert_array_equal(state.count, 3)
    assert "3/?" in capsys.readouterr().err
