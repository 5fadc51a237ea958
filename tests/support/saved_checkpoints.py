"""Checkpoints that hold every kind of array of a run, and a disk that has no room for more."""

import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np

from jbn.cli.checkpoints import checkpoints
from jbn.cli.fit import SoFar
from jbn.cli.streams import hush

hush()  # as the command line does

IDENTITY = {"--norm": "z", "--hidden": (6, 5), "--lr": 0.1, "--data": "examples 1a2b"}


def made(step):
    """A checkpoint with every kind of array that a run holds."""
    rng = np.random.default_rng(step)
    loss = rng.normal(size=step).astype(np.float32)
    loss[:1] = np.nan
    train_state = {"params": [{"W": rng.normal(size=(6, 5)).astype(np.float32)}], "step": np.asarray(step, np.int32)}
    histories = {"loss": loss, "skipped": np.isnan(loss), "test_accuracy": rng.uniform(size=step // 10)}
    return SoFar(jax.tree.map(jnp.asarray, train_state), histories)


START = made(0)


def newest(folder, identity=IDENTITY, start=START):
    with checkpoints(folder, identity) as each:
        return each.newest(start)


def saved(folder, *steps, identity=IDENTITY):
    with checkpoints(folder, identity) as each:
        for step in steps:
            each.save(made(step))
    return folder


def limit_files(size):
    """The nearest thing to a full disk that needs no rights: no file of this process may grow beyond a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
