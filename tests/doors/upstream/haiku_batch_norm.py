"""Haiku's own batch norm tests, from its wheel: as they are, with the door in the place of the layer, and replaced.

Run by hand, outside the suite: ``python tests/doors/upstream/haiku_batch_norm.py``. Prints how many pass.
"""

import contextlib
import os
import sys
import unittest


def count(module, batch_norm, layer, around=contextlib.nullcontext):
    """(passed, run) of the tests in ``module``, with ``layer`` where they look for the class."""
    stock, batch_norm.BatchNorm = batch_norm.BatchNorm, layer
    try:
        tests = unittest.defaultTestLoader.loadTestsFromModule(module)
        with around():
            result = unittest.TextTestRunner(stream=sys.stderr).run(tests)
    finally:
        batch_norm.BatchNorm = stock
    lost = len(result.failures) + len(result.errors) + len(result.skipped)
    return result.testsRun - lost, result.testsRun


def main():
    """Prints a line for each way to run them; returns whether a test was lost."""
    # Read when JAX starts; one of the tests wants two devices or more.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from haiku._src import batch_norm, batch_norm_test

    import jbn.haiku

    stock = batch_norm.BatchNorm
    counts = {
        "haiku.BatchNorm": count(batch_norm_test, batch_norm, stock),
        "jbn.haiku.BatchNorm": count(batch_norm_test, batch_norm, jbn.haiku.BatchNorm),
        "jbn.haiku.replace": count(batch_norm_test, batch_norm, stock, jbn.haiku.replace),
    }
    for name, (passed, run) in counts.items():
        print(f"{name}: {passed} of {run}")
    return any(passed < run for passed, run in counts.values())


if __name__ == "__main__":
    sys.exit(main())
