"""Runs Keras's own tests of BatchNormalization, which its wheel brings along, on Keras's class and on the door to it.

    python tests/doors/upstream/run_keras.py [arguments for pytest]

They are Keras's, so they are not in this repository, and they are no part of the suite.
"""

import os
import subprocess
import sys
from pathlib import Path


def run(door, arguments):
    """The exit code of pytest and its last line, with the door in the place of the class or without."""
    code = f"""
import sys, pathlib, keras, pytest
from keras.src import layers
if {door}:
    import jbn.keras
    layers.BatchNormalization = jbn.keras.BatchNormalization
folder = pathlib.Path(keras.__file__).parent / "src" / "layers" / "normalization"
options = ["-q", "-c", "/dev/null", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(folder)]
sys.exit(pytest.main([*options, str(folder / "batch_normalization_test.py"), *sys.argv[1:]]))
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr


def main():
    worst = 0
    for name, door in (("keras.layers.BatchNormalization", False), ("jbn.keras.BatchNormalization", True)):
        code, summary = run(door, sys.argv[1:])
        print(f"{name}: {summary}", flush=True)
        worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(main())
