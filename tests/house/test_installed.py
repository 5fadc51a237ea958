"""The guard that proves which jbn is tested."""

import os
import sys
from pathlib import Path

import pytest
from support import installed

import jbn

PACKAGE = Path(jbn.__file__).resolve().parent


@pytest.fixture
def apart(monkeypatch):
    """Neither an editable install nor a PYTHONPATH."""
    monkeypatch.setattr(installed, "_is_editable", lambda: False)
    monkeypatch.delenv("PYTHONPATH", raising=False)


def copied(folder, change=None):
    """A checkout of the installed files, one of them changed."""
    for file in PACKAGE.rglob("*.py"):
        copy = folder / "jbn" / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes() + (b"\n" if file.name == change else b""))
    return folder


def test_a_wheel_of_the_same_files_is_what_is_tested(apart, tmp_path):
    assert installed.source_of_jbn(copied(tmp_path)) == (f"the installed {PACKAGE}", None)


def test_a_wheel_of_other_files_is_refused_in_one_line(apart, tmp_path):
    _, wrong = installed.source_of_jbn(copied(tmp_path, change="_core.py"))
    assert wrong.startswith(f"jbn: got an installed _core.py unlike that of {tmp_path}; expected its wheel; run ")
    assert "\n" not in wrong


def test_a_wheel_with_a_file_more_or_less_is_refused(apart, tmp_path):
    (copied(tmp_path) / "jbn" / "more.py").write_text("")
    assert installed.differing(PACKAGE, tmp_path / "jbn") == ["more.py"]
    assert installed.differing(tmp_path / "jbn", PACKAGE) == ["more.py"]


def test_the_checkout_is_refused_unless_it_was_asked_for(apart, monkeypatch):
    root = PACKAGE.parent
    _, wrong = installed.source_of_jbn(root)
    assert wrong.startswith(f"jbn: got the checkout {PACKAGE}; expected the installed wheel; run python -m pip install")
    monkeypatch.setattr(installed, "_is_editable", lambda: True)
    assert installed.source_of_jbn(root) == (f"the checkout {PACKAGE}, by an editable install", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["elsewhere", str(root)]))
    assert installed.source_of_jbn(root) == (f"the checkout {PACKAGE}, by PYTHONPATH", None)


@pytest.mark.parametrize("asked", [False, True], ids=["as python -m pytest adds it", "by PYTHONPATH"])
def test_the_checkout_is_hidden_here_and_from_processes_unless_it_was_asked_for(apart, tmp_path, monkeypatch, asked):
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", "elsewhere"])
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if asked:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    installed.hide_checkout(tmp_path)
    assert sys.path == ([str(tmp_path), "", "elsewhere"] if asked else ["elsewhere"])
    assert os.environ["PYTHONSAFEPATH"] == "1"
