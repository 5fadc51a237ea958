"""The commands of pyproject.toml are those that users read, and CI runs no others."""

import re
import tomllib

import pytest
from support.installed import ROOT

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("needs the repository", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = PROJECT["tool"]["jbn"]["commands"]


def shown_in(name):
    """The lines of fenced blocks that are not Python."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for language, block in blocks if not language for line in block.splitlines()]


def test_the_readme_shows_how_to_run_the_tests():
    assert COMMANDS["test"] in shown_in("README.md")


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"oldest", "newest", "onnx"}))
def test_contributing_shows_every_command(name):
    assert COMMANDS[name] in shown_in("CONTRIBUTING.md")


def test_the_oldest_jax_that_is_tried_is_the_oldest_that_is_allowed():
    for package in ("jax", "jaxlib"):
        (oldest,) = (need for need in PROJECT["project"]["dependencies"] if need.startswith(f"{package}>="))
        assert f"{oldest.replace('>=', '==')}.0" in COMMANDS["oldest"].split()


def test_ci_runs_commands_by_their_names_alone():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pytest " not in script
    assert set(re.findall(r"\w+", " ".join(re.findall(r"(?:^|; )run ([\w ]+)", script, re.M)))) <= COMMANDS.keys()
