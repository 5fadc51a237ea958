"""One machine for all tests: the installed jbn, eight host devices, strict promotion, warnings as errors.

Read by pytest before any test imports jax, in the workers of ``pytest -n`` too. It holds for the doctests of
``jbn`` as well.
"""

import contextlib
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # pytest does so itself, but only later


def _set_xla_flag(name, value):
    """Adds a flag that ``XLA_FLAGS`` does not hold yet; XLA reads them when a test first makes an array."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()


_set_xla_flag("--xla_force_host_platform_device_count", 8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("KERAS_BACKEND", "jax")

# Workers share what they compile: in a temporary folder, or in the one that JAX's variable names, which is kept.
# Processes that tests start do not: one that is killed would leave half an entry behind.
_SHARED = "JBN_TESTS_SHARE_PROGRAMS_IN"
_kept, _temporary = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None), None
if _SHARED not in os.environ:
    _temporary = None if _kept else tempfile.mkdtemp(prefix="jbn-programs-")
    os.environ[_SHARED] = _kept or _temporary

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.environ[_SHARED])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

pytest.register_assert_rewrite("support")

from support import installed, pages  # noqa: E402

ROOT = installed.ROOT
installed.hide_checkout(ROOT)

# The opt-out, in one place: folders and modules whose code runs other libraries, which promote dtypes and
# ranks implicitly and warn as they like.
DOORS = frozenset(
    (
        *("cli", "convert", "docs", "doors", "notebooks", "README", "report"),
        *("equinox", "haiku", "keras", "linen", "nnx", "onnx"),
    )
)

# The package without which a door cannot be imported, nor its examples and tests collected.
PACKAGES = {
    "linen": "flax",
    "nnx": "flax",
    "flax": "flax",
    "equinox": "equinox",
    "haiku": "haiku",
    "keras": "keras",
    "onnx": "jax2onnx",
}


def _is_door(item):
    path = item.path.resolve()
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts[path.parts.index("jbn") :]
    return not DOORS.isdisjoint({*parts, path.stem.lstrip("_")})


def pytest_addoption(parser):
    parser.addoption(
        "--path-of",
        choices=("gpu", "tpu"),
        help="run on the CPU what jbn does on this platform: every lax.platform_dependent takes its branch",
    )
    parser.addoption(
        "--unoptimized",
        action="store_true",
        help="have XLA compile programs without optimizing them, in less than half the time",
    )


def _compile_unoptimized():
    """Asks XLA for programs soon rather than for quick programs, since tests run nearly all of theirs once.

    LLVM optimizes nothing then, and gets each program whole: XLA:CPU would cut it into pieces to be compiled side by
    side, which costs a tenth of the time where the workers of ``pytest -n`` keep all cores busy.

    Up to jaxlib 0.11.0 there are two ways in which XLA:CPU writes a fused kernel. The default, by MLIR, takes two
    fifths of the suite's processor time even where LLVM optimizes nothing. Later ones (0.11.2 and 0.12 were tried)
    have no other way, and XLA ends a process at a flag that it does not know.
    """
    _set_xla_flag("--xla_backend_optimization_level", 0)
    _set_xla_flag("--xla_cpu_parallel_codegen_split_count", 1)
    if jax.__version_info__ <= (0, 11, 0):
        _set_xla_flag("--xla_cpu_use_fusion_emitters", "false")


def _take_branch_of(platform):
    """In place of ``lax.platform_dependent``."""

    def taken(*operands, default=None, **branches):
        branch = branches.get("cuda" if platform == "gpu" else platform, default)
        assert branch is not None, f"a choice by platform that leaves out {platform} cannot be forced"
        return branch(*operands)

    return taken


# After so many tests a process forgets what JAX has compiled in it. Each program of XLA:CPU maps memory of its own, and
# where the system's limit of mappings is reached (65530 on Linux, about 1400 tests) the process ends by a
# segmentation fault: seen with jaxlib 0.10.2 and 0.12, in all cases of tests/core/test_explicit_meshes.py.
_FORGETS_AFTER = 150


class _House:
    """A plugin rather than fixtures: fixtures of this folder do not reach the doctests of ``jbn``."""

    def __init__(self):
        self._tests = 0

    def pytest_ignore_collect(self, collection_path):
        """Leaves out what holds no tests, and what needs a framework that is not there (or, Keras, not on JAX)."""
        if collection_path.parent == ROOT / "docs" and collection_path.suffix == ".py":
            return True  # how the site is made
        inside = collection_path.is_relative_to(ROOT / "tests") and collection_path.suffix == ".py"
        if inside and not collection_path.name.startswith("test_"):
            return True
        package = PACKAGES.get(collection_path.stem.removeprefix("test_").lstrip("_").split("_")[0])
        if package is None or collection_path.parent.name not in ("jbn", "doors", "export"):
            return None
        absent = importlib.util.find_spec(package) is None
        return True if absent or (package == "keras" and os.environ["KERAS_BACKEND"] != "jax") else None

    def pytest_collection_modifyitems(self, config, items):
        for item in items:
            # JAX writes an entry while another worker may read it; that worker then compiles for itself.
            half = "ignore:Error (reading|writing) persistent compilation cache entry"
            item.add_marker(pytest.mark.filterwarnings(half), append=False)
            if isinstance(item, pytest.DoctestItem) and item.path.suffix == ".md":
                pages.leave_out_what_is_absent(item.path.read_text(encoding="utf-8"), item.dtest.examples)
            if not _is_door(item):
                # In front, so that a test's own filterwarnings are applied after it and win.
                item.add_marker(pytest.mark.filterwarnings("error"), append=False)
        if config.getoption("--path-of"):
            apart = [item for item in items if item.get_closest_marker("cpu_path")]
            config.hook.pytest_deselected(items=apart)
            items[:] = [item for item in items if item not in set(apart)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with contextlib.ExitStack() as stack:
            if isinstance(item, pytest.DoctestItem):
                stack.enter_context(jax.enable_x64(False))  # what the examples print is JAX's default
            if not _is_door(item):
                stack.enter_context(jax.numpy_dtype_promotion("strict"))
                stack.enter_context(jax.numpy_rank_promotion("raise"))
            try:
                return (yield)
            finally:
                self._tests += 1
                if self._tests % _FORGETS_AFTER == 0:
                    jax.clear_caches()
                    gc.collect()


def pytest_configure(config):
    config.pluginmanager.register(_House(), "jbn-house")
    if config.getoption("--unoptimized"):
        _compile_unoptimized()
    if config.getoption("--path-of"):
        jax.lax.platform_dependent = _take_branch_of(config.getoption("--path-of"))


def pytest_sessionstart(session):
    _, wrong = installed.source_of_jbn(ROOT)
    if wrong:
        raise pytest.UsageError(wrong)


def pytest_report_header(config):
    platform = config.getoption("--path-of")
    path = f", on the path of a {platform.upper()}" if platform else ""
    return f"jbn: {installed.source_of_jbn(ROOT)[0]}{path}"


def pytest_collection_finish(session):
    """Keeps Python's garbage collector from going through all of JAX again and again.

    The programs and traces that JAX caches make a full collection take seconds; they were a sixth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure(config):
    if _temporary is not None:
        shutil.rmtree(_temporary, ignore_errors=True)
