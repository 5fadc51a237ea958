"""What the pages promise, held to the code: names, errors, commands, pictures. Links are checked with the site."""

import importlib
import re
import tomllib

import pytest
from support.installed import ROOT

import jbn

if not (ROOT / ".github").exists():
    pytest.skip("needs the repository", allow_module_level=True)

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_public_module_has_a_page_in_the_reference():
    documented = {
        module
        for page in (ROOT / "docs" / "api").glob("*.md")
        for module in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert documented == {"jbn", *(f"jbn.{name}" for name in jbn._submodules())}


def test_the_overview_names_every_function_of_the_core_and_every_submodule():
    overview = text_of("docs/api.md")
    for name in jbn.__all__:
        assert f"{{py:obj}}`jbn.{name}`" in overview
    for name in jbn._submodules() - {"cli"}:
        assert f"[`jbn.{name}`](api/{name}.md)" in overview


def test_the_readme_names_every_function_of_the_core():
    table = text_of("README.md").partition("## The functions")[2].partition("## ")[0]
    functions = {name for name in jbn.__all__ if not name.startswith("BN")}
    assert functions <= set(re.findall(r"`(\w+)`", table))


def test_the_page_of_errors_has_a_place_for_every_argument_that_an_error_names():
    table = re.search(r'^TABLE = r"""\n(.*?)^"""', text_of("tests/checks/test_errors.py"), re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"^ +(?:Type|Value)Error: (\w+)", table.group(1), re.MULTILINE))
    page = text_of("docs/errors.md")
    assert sorted(named) == sorted(re.findall(r"^<!-- errors: (\w+) -->$", page, re.MULTILINE))
    for argument in named:
        assert re.search(rf"^## {argument}\n", page, re.MULTILINE)


def test_the_page_of_the_command_line_names_every_command():
    commands = pytest.importorskip("jbn.cli.commands", reason="needs the extra demo")
    names = importlib.import_module("typer.main").get_command(commands._app).commands
    page = text_of("docs/command_line.md")
    for name in names:
        assert re.search(rf"^jbn {name} ", page, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_has_a_text_and_a_file(page):
    for words, file in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8"), re.DOTALL):
        assert len(words.split()) >= 5
        assert (page.parent / file).is_file()


def test_the_version_stands_in_one_place():
    project = tomllib.loads(text_of("pyproject.toml"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "jbn/__init__.py"
    assert not re.search(r"^version:", text_of("CITATION.cff"), re.MULTILINE)
    assert jbn.__version__ not in text_of("docs/conf.py")


def test_the_code_host_runs_what_everyone_runs():
    workflow = text_of(".github/workflows/ci.yml")
    assert re.findall(r"^ *- run: (.*)$", workflow, re.MULTILINE) == ["bash .ci/run"]
