"""Which examples each step takes, and how they come to the devices: shuffled epoch by epoch, cut and dealt here."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jbn.cli.data import Data
from jbn.cli.devices import split

__all__ = ["Batches"]

# Steps in one call: enough to hide the call, few enough for a live display of a long epoch.
_STEPS_A_CALL = 64
_BYTES_A_CALL = 2**26


class Batches(NamedTuple):
    """The batches of a run: in each epoch a shuffle, less the rows that fill no batch.

    Attributes:
        examples: of the training set.
        batch_size, epochs, seed: as in the options.
        accumulate: microbatches that a device splits its share of a batch into.
    """

    examples: int
    batch_size: int
    epochs: int
    seed: int
    accumulate: int = 1

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.examples // self.batch_size

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps

    def order(self) -> Iterator[np.ndarray]:
        """The row numbers (steps, batch_size) of one epoch after the other, each drawn when it comes."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            rows = rng.permutation(self.examples)[: self.steps * self.batch_size]
            yield rows.astype(np.int32).reshape(self.steps, self.batch_size)

    def length(self, x: np.ndarray) -> int:
        """How many steps go into one call: fewer of large batches, which wait in memory."""
        fitting = _BYTES_A_CALL // (self.batch_size * x[:1].nbytes)
        return max(1, min(_STEPS_A_CALL, self.steps, fitting))

    def feeds(self, data: Data, mesh: Mesh, at: int, every: int) -> Iterator[tuple[int, jax.Array, jax.Array]]:
        """For each call from step ``at`` on: how many steps, and their examples x and y, filled up to `length` steps.

        No call goes across the end of an epoch, nor across a multiple of ``every`` steps.
        """
        length = self.length(data.x)
        for epoch, rows in enumerate(self.order()):
            begin, end = epoch * self.steps, (epoch + 1) * self.steps
            while at < end:
                count = min(length, end - at, every - at % every)
                taken = self.deal(rows[at - begin : at - begin + count], mesh.size)
                filled = np.concatenate([taken, np.repeat(taken[:1], length - count, axis=0)])
                yield count, split(data.x, filled, mesh), split(data.y, filled, mesh)
                at += count

    def deal(self, rows: np.ndarray, devices: int) -> np.ndarray:
        """The rows (…, batch_size) in the order in which each device's share is consecutive.

        A device splits its share into microbatches by itself. So that microbatch j holds the same rows on any number
        of devices, each device is dealt its part of every microbatch.
        """
        by_micro = rows.reshape(*rows.shape[:-1], self.accumulate, devices, -1)
        return by_micro.swapaxes(-3, -2).reshape(rows.shape)
