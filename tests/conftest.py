"""One machine for all tests: eight host devices, strict promotion, warnings as errors.

Read by pytest before any test imports jax. It holds for the doctests of ``jbn`` as well, and for the
workers of ``pytest -n``.
"""

import contextlib
import os

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402

# The opt-out, in one place: folders and modules whose code runs other libraries, which promote dtypes and
# ranks implicitly and warn as they like.
DOORS = frozenset(
    {"cli", "convert", "docs", "doors", "equinox", "haiku", "keras", "linen", "nnx", "notebooks", "README", "report"}
)


def _is_door(item):
    path = item.path.relative_to(item.config.rootpath)
    return not DOORS.isdisjoint({*path.parts, path.stem.lstrip("_")})


class _House:
    """A plugin rather than fixtures: fixtures of this folder do not reach the doctests of ``jbn``."""

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if not _is_door(item):
                # In front, so that a test's own filterwarnings are applied after it and win.
                item.add_marker(pytest.mark.filterwarnings("error"), append=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with contextlib.ExitStack() as stack:
            if isinstance(item, pytest.DoctestItem):
                stack.enter_context(jax.enable_x64(False))  # what the examples print is JAX's default
            if not _is_door(item):
                stack.enter_context(jax.numpy_dtype_promotion("strict"))
                stack.enter_context(jax.numpy_rank_promotion("raise"))
            return (yield)


def pytest_configure(config):
    config.pluginmanager.register(_House(), "jbn-house")
