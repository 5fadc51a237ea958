"""Submodules are there on first use, the import stays light, and what is missing says so."""

import importlib
import subprocess
import sys

import pytest

import jbn
from jbn._doors import missing

PUBLIC = ("convert", "networks", "report", "training")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.processes
def test_a_submodule_is_imported_by_its_first_use_and_not_before():
    code = f"""
import sys, jbn
for name in {PUBLIC}:
    early = name != "networks" and "jbn." + name in sys.modules  # whether the import of jbn brought it
    module = getattr(jbn, name)
    print(early, module is sys.modules["jbn." + name], jbn.__dict__[name] is module)
"""
    assert run(code) == ["False", "True", "True"] * len(PUBLIC)


@pytest.mark.processes
def test_looking_at_what_there_is_imports_nothing():
    code = f"""
import sys, jbn
before = set(sys.modules)
names = dir(jbn)
print(set({PUBLIC}) <= set(names), "bn_apply" in names, "__version__" in names, set(sys.modules) == before)
print(hasattr(jbn, "no_such_thing"), set(sys.modules) == before)
"""
    assert run(code) == ["True"] * 4 + ["False", "True"]


@pytest.mark.parametrize("name", ["traning", "_calibrat", "__wrapped__", "networks.mlp", ""])
def test_a_name_that_is_none_of_ours_is_an_ordinary_attribute_error(name):
    with pytest.raises(AttributeError) as caught:
        getattr(jbn, name)
    assert str(caught.value) == f"module 'jbn' has no attribute {name!r}"
    assert not hasattr(jbn, name)


def test_a_name_that_is_none_of_ours_cannot_be_imported():
    with pytest.raises(ImportError, match="cannot import name 'traning' from 'jbn'"):
        from jbn import traning  # noqa: F401


@pytest.fixture
def door(tmp_path, monkeypatch):
    """A door to a framework that is not installed."""
    (tmp_path / "flax_of_tomorrow.py").write_text(
        "from jbn._doors import missing\n"
        "try:\n    import a_framework_of_tomorrow\n"
        "except ModuleNotFoundError:\n"
        "    raise missing('flax_of_tomorrow', 'a_framework_of_tomorrow', 'tomorrow') from None\n"
    )
    monkeypatch.setattr(jbn, "__path__", [*jbn.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    return "flax_of_tomorrow"


def test_a_door_without_its_framework_says_what_to_install(door):
    with pytest.raises(ModuleNotFoundError) as caught:
        getattr(jbn, door)
    assert str(caught.value) == str(missing(door, "a_framework_of_tomorrow", "tomorrow"))
    with pytest.raises(ModuleNotFoundError, match="run pip install 'jbn\\[tomorrow\\]'"):  # and again
        getattr(jbn, door)


@pytest.mark.processes
def test_the_doors_are_not_listed_before_they_are_used():
    doors = {"equinox", "haiku", "keras", "linen", "nnx"}
    assert not doors & set(run("import jbn; print(*dir(jbn))"))


@pytest.mark.processes
def test_help_is_had_without_any_framework():
    code = """
import sys
for name in ("flax", "equinox", "haiku", "keras", "matplotlib", "typer", "rich"):
    sys.modules[name] = None
import jbn, pydoc
print("Three functions over three small pytrees" in pydoc.plain(pydoc.render_doc(jbn)))
"""
    assert run(code) == ["True"]
