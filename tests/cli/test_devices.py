"""Training over several devices of one process, from the command line and in its pieces."""

import io
import json
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.closeness import CHAIN, assert_close
from support.saved_runs import two_classes

import jbn.cli.batches
from jbn.cli import main
from jbn.cli.batches import Batches
from jbn.cli.data import load_data
from jbn.cli.devices import axis_of, local, mesh_of, replicated, split
from jbn.cli.display import lines_of
from jbn.cli.documents import show
from jbn.cli.fit import SoFar, fit, loss_fn
from jbn.networks import mlp
from jbn.training import TrainState, make_train_step


@pytest.fixture(scope="module", autouse=True)
def jax_has_started():
    """With the eight devices of these tests, before a run could ask for fewer."""
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_classes(tmp_path_factory.mktemp("data"))


def trained(file, devices, *, sync_stats=True, accumulate=1, epochs=2, batch_size=32):
    network, optimizer = mlp((3, 3, 2), activation=jax.nn.sigmoid), optax.sgd(0.5)
    data, mesh = load_data(file, 0, flat=True), mesh_of(devices)
    step = make_train_step(
        network.apply, loss_fn, optimizer, accumulate=accumulate, axis_name=axis_of(mesh), sync_stats=sync_stats
    )
    params, state = network.init(jax.random.key(0))
    start = TrainState(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
    batches = Batches(len(data.x), batch_size, epochs, 0, accumulate)
    return fit(network, step, SoFar.at(replicated(start, mesh)), data, batches, mesh, lambda progress: None)


shared = cache(trained)


def results(done):
    return done.train_state[:2], done.histories["loss"], done.epochs


@pytest.mark.parametrize(
    ("accumulate", "numbers"),
    [(1, (8,)), (2, (4,)), *(pytest.param(each, (2, 4, 8), marks=pytest.mark.nightly) for each in (1, 2))],
)
def test_any_number_of_devices_trains_as_one_does(data, accumulate, numbers):
    one = shared(data, 1, accumulate=accumulate)
    assert len(one.histories["loss"]) == 4
    for devices in numbers:
        assert_close(
            results(shared(data, devices, accumulate=accumulate)), results(one), roundings=CHAIN, computed_in="float32"
        )


def test_local_statistics_normalize_each_share_by_itself(data):
    synced, apart = shared(data, 8, accumulate=1), trained(data, 8, sync_stats=False)
    assert np.abs(synced.histories["loss"] - apart.histories["loss"]).max() > 1e-3
    assert_close(
        results(trained(data, 1, sync_stats=False))[1], results(synced)[1], roundings=CHAIN, computed_in="float32"
    )


def test_large_batches_come_in_shorter_calls_and_train_alike(data, monkeypatch):
    whole = trained(data, 2, batch_size=8)
    monkeypatch.setattr(jbn.cli.batches, "_BYTES_A_CALL", 3 * 8 * 3 * 4)
    lengths, deal = [], Batches.deal
    monkeypatch.setattr(Batches, "deal", lambda *given: lengths.append(len(given[1])) or deal(*given))
    assert_close(results(trained(data, 2, batch_size=8)), results(whole), roundings=CHAIN, computed_in="float32")
    assert lengths == [3, 3, 2] * 2


def test_a_run_goes_on_from_the_middle_of_an_epoch(data, monkeypatch):
    monkeypatch.setattr(jbn.cli.batches, "_STEPS_A_CALL", 3)
    passed, after = [], SoFar.after
    monkeypatch.setattr(SoFar, "after", lambda *given: passed.append(after(*given)) or passed[-1])
    whole = trained(data, 2, batch_size=8)
    assert [so_far.steps for so_far in passed] == [3, 6, 8, 11, 14, 16]
    monkeypatch.setattr(SoFar, "at", lambda train_state: passed[3])
    again = trained(data, 2, batch_size=8)
    for a, b in zip(jax.tree.leaves(results(again)), jax.tree.leaves(results(whole)), strict=True):
        np.testing.assert_array_equal(a, b)


class TestPlacement:
    @pytest.mark.parametrize("devices", [1, 2, 4])
    def test_a_microbatch_holds_the_same_rows_on_any_number_of_devices(self, devices):
        order = np.random.default_rng(0).permutation(48).reshape(1, 2, 24)
        shares = (
            Batches(48, 24, 1, 0, accumulate=3).deal(order, devices).reshape(2, devices, 3, -1)
        )  # each device splits its share in three
        for step in range(2):
            for micro in range(3):
                want = order[0, step].reshape(3, 8)[micro]
                np.testing.assert_array_equal(shares[step, :, micro].ravel(), want)

    def test_one_microbatch_is_dealt_in_consecutive_parts(self):
        order = np.arange(24).reshape(1, 1, 24)
        np.testing.assert_array_equal(Batches(24, 24, 1, 0).deal(order, 8), order)

    def test_a_device_is_given_its_share_of_each_batch_and_no_more(self):
        values, rows = np.arange(20.0).reshape(10, 2), np.array([[9, 1, 3, 4], [0, 7, 2, 5]])
        fed = split(values, rows, mesh_of(2))
        assert [shard.data.shape for shard in fed.addressable_shards] == [(2, 2, 2)] * 2
        for shard, columns in zip(fed.addressable_shards, (slice(0, 2), slice(2, 4)), strict=True):
            np.testing.assert_array_equal(shard.data, values[rows[:, columns]])

    def test_what_is_replicated_can_be_read_again(self):
        tree = {"a": jnp.arange(3), "b": jnp.ones((), jnp.bfloat16)}
        everywhere = replicated(tree, mesh_of(4))
        assert all(len(leaf.addressable_shards) == 4 for leaf in jax.tree.leaves(everywhere))
        again = local(everywhere)
        assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(again))
        assert jax.tree.map(lambda leaf: leaf.tolist(), again) == {"a": [0, 1, 2], "b": 1.0}


class TestCommand:
    SMALL = ("--epochs", "1", "--batch-size", "32", "--hidden", "3", "--norm", "z", "--no-compare")

    def test_what_is_shown_and_kept_says_on_how_many_devices_and_with_which_statistics(
        self, data, tmp_path, capsys, monkeypatch
    ):
        arguments = ("--data", str(data), *self.SMALL, "--devices", "4", "--stats", "local")
        assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
        printed = json.loads(capsys.readouterr().out)
        saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
        for document in (printed, saved):
            assert [document[key] for key in ("devices", "processes", "stats")] == [4, 1, "local"]
        assert len(saved["history"]["with"]["loss"]) == 2
        monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        show(printed, lines_of(printed))
        assert "\n4 devices, local statistics.\n" in terminal.getvalue()
