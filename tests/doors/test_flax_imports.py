"""What importing a door of Flax imports, and what it says where Flax is absent."""

import subprocess
import sys

import pytest

DOORS = pytest.mark.parametrize("door", ["linen", "nnx"])
OTHERS = ("equinox", "haiku", "keras", "torch", "tensorflow", "matplotlib")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@DOORS
@pytest.mark.processes
def test_it_imports_flax_and_no_other_framework(door):
    done = run(f"import sys, jbn.{door}; print([m for m in ('flax', *{OTHERS!r}) if m in sys.modules])")
    assert done.stdout.strip() == "['flax']", done.stderr


@DOORS
@pytest.mark.processes
def test_without_flax_it_names_the_extra_in_one_line(door):
    done = run(f"import sys; sys.modules['flax'] = None; import jbn.{door}")
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: jbn.{door}: got no package flax; expected it to be installed; "
        "run pip install 'jbn[flax]'."
    )
