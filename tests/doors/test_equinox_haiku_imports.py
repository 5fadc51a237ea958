"""What importing a door imports, and what it says where its framework is absent."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes
FRAMEWORKS = {"equinox": "equinox", "haiku": "dm-haiku"}
OTHERS = ("equinox", "flax", "haiku", "keras", "optax", "tensorflow", "torch")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("door", FRAMEWORKS)
def test_a_door_imports_its_framework_and_no_other(door):
    pytest.importorskip(door)
    own = python(f"import sys, {door}; print([m for m in {OTHERS} if m in sys.modules])")
    done = python(f"import sys, jbn.{door}; print([m for m in {OTHERS} if m in sys.modules])")
    assert done.stdout == own.stdout
    assert door in done.stdout


@pytest.mark.parametrize("door", FRAMEWORKS)
def test_without_its_framework_a_door_names_the_extra_in_one_line(door):
    done = python(f"import sys; sys.modules[{door!r}] = None; import jbn.{door}")
    assert done.returncode
    assert "During handling" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: jbn.{door}: got no package {FRAMEWORKS[door]}; expected it to be installed; "
        f"run pip install 'jbn[{door}]'."
    )


@pytest.mark.parametrize("door", FRAMEWORKS)
def test_a_door_does_not_hide_its_framework(door):
    pytest.importorskip(door)
    done = python(f"import jbn.__main__, jbn.{door}, {door}; print({door}.__name__, jbn.{door}.__name__)")
    assert done.stdout.splitlines()[-1] == f"{door} jbn.{door}"
