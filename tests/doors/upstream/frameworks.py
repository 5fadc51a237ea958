"""Runs a framework's own tests of its batch norm on the door: what passes with its class has to pass with ours.

    python tests/doors/upstream/frameworks.py [flax haiku keras] [--all] [-- options of pytest]

The tests are taken from the framework's source distribution of the installed version, or from its installed
package where they are in it, and are not kept. They run twice, in a process of their own: with the class as it
is, to see which of them make a batch norm and pass, and with the door in its place; with ``--all`` also those that
make none. Needs the network for a source distribution, and the test packages of the framework.

The same file is the pytest plugin of those runs.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]


class Framework(NamedTuple):
    """Where the tests of a framework are, and what is exchanged in it."""

    distribution: str
    packed: bool  # whether the tests are in the source distribution; else they are in the package itself
    folder: str  # of the tests: below the distribution's, or a package
    files: tuple[str, ...]
    doors: dict[str, tuple[str, ...]]  # of each door, the places where the framework keeps the class
    environment: dict[str, str] = {}  # noqa: RUF012
    config: str | None = None  # of pytest, in the distribution
    noticed_by: str = "__init__"  # the method in which a test is seen to make one


FRAMEWORKS = {
    "flax": Framework(
        "flax",
        True,
        "tests",
        (
            "linen/linen_test.py",
            "linen/linen_transforms_test.py",
            "linen/linen_module_test.py",
            "linen/summary_test.py",
            "checkpoints_test.py",
            "nnx/nn/normalization_test.py",
            "nnx/nn/linear_test.py",
            "nnx/module_test.py",
            "nnx/integration_test.py",
            "nnx/transforms_test.py",
            "nnx/graph_utils_test.py",
            "nnx/helpers_test.py",
            "nnx/summary_test.py",
            "nnx/bridge/wrappers_test.py",
        ),
        {
            "jbn.linen.BatchNorm": ("flax.linen.BatchNorm", "flax.linen.normalization.BatchNorm"),
            "jbn.nnx.BatchNorm": ("flax.nnx.BatchNorm", "flax.nnx.nn.normalization.BatchNorm"),
        },
        config="pyproject.toml",
    ),
    "haiku": Framework(
        "dm-haiku",
        False,
        "haiku._src",
        ("batch_norm_test.py",),
        {"jbn.haiku.BatchNorm": ("haiku.BatchNorm", "haiku._src.batch_norm.BatchNorm")},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ),
    "keras": Framework(
        "keras",
        False,
        "keras.src.layers.normalization",
        ("batch_normalization_test.py",),
        {"jbn.keras.BatchNormalization": ("keras.src.layers.BatchNormalization", "keras.layers.BatchNormalization")},
        {"KERAS_BACKEND": "jax"},
        noticed_by="build",  # Keras reads the signature of __init__
    ),
}

# What the runs are told, in environment variables: the framework, whether its class is exchanged, a file of the
# tests to run or to write, and whether tests that make no batch norm are asked for too.
FRAMEWORK, EXCHANGED, TESTS = "JBN_UPSTREAM_FRAMEWORK", "JBN_UPSTREAM_EXCHANGED", "JBN_UPSTREAM_TESTS"
ALL = "JBN_UPSTREAM_ALL"


def _look_up(name):
    module, _, attribute = name.rpartition(".")
    return importlib.import_module(module), attribute


class Plugin:
    """In the process of the tests: exchanges the class, and notes which tests make one of it."""

    def __init__(self):
        self._made = 0
        self._passed = {}
        framework = FRAMEWORKS[os.environ[FRAMEWORK]]
        for door, places in framework.doors.items():
            where = [_look_up(place) for place in places]
            found = getattr(*where[0])
            if os.environ[EXCHANGED] == "yes":
                found = getattr(*_look_up(door))
                for module, attribute in where:
                    setattr(module, attribute, found)
            self._watch(found, framework.noticed_by)

    def _watch(self, watched, method):
        name = "__post_init__" if hasattr(watched, "__post_init__") else method
        made = getattr(watched, name)

        @functools.wraps(made)
        def noted(*args, **kwargs):
            self._made += 1
            return made(*args, **kwargs)

        setattr(watched, name, noted)

    def pytest_collection_modifyitems(self, config, items):
        if os.environ[EXCHANGED] == "yes":
            wanted = set(json.loads(Path(os.environ[TESTS]).read_text()))
            left = [item for item in items if item.nodeid not in wanted]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item.nodeid in wanted]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self._made = 0
        try:
            return (yield)
        finally:
            item.user_properties.append(("made", self._made > 0))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and (os.environ[ALL] == "yes" or dict(report.user_properties).get("made")):
            self._passed[report.nodeid] = report.passed and self._passed.get(report.nodeid, True)

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):
            passed = sorted(name for name, it_passed in self._passed.items() if it_passed)
            Path(os.environ[TESTS]).with_suffix(f".{os.environ[EXCHANGED]}").write_text(json.dumps(passed))


def pytest_configure(config):
    if FRAMEWORK in os.environ:
        config.pluginmanager.register(Plugin(), "jbn-upstream")


def _fetch(framework: Framework, scratch: Path) -> Path:
    """The folder that holds the framework's tests."""
    if not framework.packed:
        os.environ.update(framework.environment)  # to find a package imports those that it is in
        spec = importlib.util.find_spec(framework.folder)
        return Path(spec.submodule_search_locations[0])
    version = importlib.metadata.version(framework.distribution)
    wanted = f"{framework.distribution}=={version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", framework.distribution]
    subprocess.run([*pip, "--dest", str(scratch), wanted], check=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(scratch / "source", filter="data")
    (source,) = (scratch / "source").iterdir()
    return source / framework.folder


def _run(name: str, exchanged: str, every: bool, folder: Path, scratch: Path, options: list[str]) -> list[str]:
    """The tests that made a batch norm, or all of them, and passed."""
    framework, tests = FRAMEWORKS[name], scratch / "tests.no"
    here = {FRAMEWORK: name, EXCHANGED: exchanged, TESTS: str(tests), "JAX_PLATFORMS": "cpu"}
    here[ALL] = "yes" if every else "no"
    path = os.pathsep.join(map(str, (Path(__file__).parent, ROOT, os.environ.get("PYTHONPATH", ""))))
    config = "/dev/null" if framework.config is None else folder.parent / framework.config
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", "-c", str(config), "--rootdir", str(folder), "--tb=short", *options]
    command += [str(folder / file) for file in framework.files]
    environment = {**os.environ, **framework.environment, **here, "PYTHONPATH": path}
    subprocess.run(command, cwd=scratch, env=environment, check=False)
    return json.loads(tests.with_suffix(f".{exchanged}").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("frameworks", nargs="*", metavar="framework", help=", ".join(FRAMEWORKS))
    parser.add_argument("--all", action="store_true", help="ask for tests that make no batch norm too")
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    asked = parser.parse_args(arguments)
    lines, lost = [], []
    for name in asked.frameworks or FRAMEWORKS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _fetch(FRAMEWORKS[name], Path(scratch))
            own, ours = (_run(name, e, asked.all, folder, Path(scratch), options) for e in ("no", "yes"))
        version = importlib.metadata.version(FRAMEWORKS[name].distribution)
        lines.append(f"{name} {version}: {len(own)} tests pass with its own batch norm, {len(ours)} with the door.")
        lost += [f"  not with the door: {test}" for test in own if test not in ours]
    print(*lines, *lost, sep="\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
