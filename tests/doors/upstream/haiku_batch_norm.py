"""Haiku's own batch norm tests, from its wheel: as they are, with the door in the place of the layer, and replaced.

Run by hand, outside the suite: ``python tests/doors/upstream/haiku_batch_norm.py``. Prints how many pass.
"""

import contextlib
import os
import sys
import unittest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from haiku._src import batch_norm, batch_norm_test

import jbn.haiku


def count(layer, around=contextlib.nullcontext):
    """(passed, run) with ``layer`` where the tests look for the class."""
    stock, batch_norm.BatchNorm = batch_norm.BatchNorm, layer
    try:
        tests = unittest.defaultTestLoader.loadTestsFromModule(batch_norm_test)
        with around():
            result = unittest.TextTestRunner(stream=sys.stderr).run(tests)
    finally:
        batch_norm.BatchNorm = stock
    lost = len(result.failures) + len(result.errors) + len(result.skipped)
    return result.testsRun - lost, result.testsRun


if __name__ == "__main__":
    stock = batch_norm.BatchNorm
    counts = {
        "haiku.BatchNorm": count(stock),
        "jbn.haiku.BatchNorm": count(jbn.haiku.BatchNorm),
        "jbn.haiku.replace": count(stock, jbn.haiku.replace),
    }
    for name, (passed, run) in counts.items():
        print(f"{name}: {passed} of {run}")
    sys.exit(any(passed < run for passed, run in counts.values()))
