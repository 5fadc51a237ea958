"""How the site is made: Sphinx reads the repository's own Markdown and notebooks, which read as well without it.

The command is `docs` in `[tool.jbn.commands]` of pyproject.toml. Pages are where they are, so that a link between
two files of the repository is a link between two pages. Three things are added while they are read: the contents, to
README.md; the notebooks that there are, to docs/notebooks.md; and the errors of the test suite's table, to
docs/errors.md.
"""

import os
import re
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from docutils import nodes

import jbn

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(file.stem for file in ROOT.glob("notebooks/*.ipynb"))

project = "jbn"
author = "The jbn authors"
copyright = author
release = version = jbn.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax as files of the site
]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "docs/**.md",
    "notebooks/*.ipynb",
]

html_domain_indices = False  # a list of modules beside that of names
html_theme = "sphinx_book_theme"
html_title = "jbn"
html_extra_path = ["_extra"]  # the way from index.html to README.html
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "navbar_persistent": [],  # the search stands in the sidebar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_fullscreen_button": False,
}
highlight_language = "none"

# Markdown and notebooks. Notebooks are shown with the outputs that are committed; the test suite runs them.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # these would be loaded from elsewhere

# Docstrings: `name` is a link where it is one of ours.
default_role = "py:obj"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "groupwise"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_ivar = False
napoleon_attr_annotations = False
toc_object_entries_show_parents = "hide"
napoleon_use_rtype = False

# A copied example has no prompts and no output.
copybutton_prompt_text = r">>> |\.\.\. ?"
copybutton_prompt_is_regexp = True

CONTENTS = """
```{toctree}
:hidden:
Start <self>
docs/idea
```

```{toctree}
:hidden:
:caption: Guides
docs/training
docs/masks
docs/devices
docs/inference
docs/frameworks
docs/recipes
docs/command_line
docs/notebooks
```

```{toctree}
:hidden:
:caption: Reference
docs/api
docs/errors
docs/costs
docs/scope
CONTRIBUTING
CHANGELOG
```
"""


def errors_of_the_table() -> dict[str, list[str]]:
    """The entries of the table in tests/checks/test_errors.py, call and message, by the argument that they name."""
    text = (ROOT / "tests" / "checks" / "test_errors.py").read_text(encoding="utf-8")
    table = re.search(r'^TABLE = r"""\n(.*?)^"""', text, re.DOTALL | re.MULTILINE)
    entries: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", table.group(1).strip()) if table else []:
        argument = re.match(r".*?\n\s+\w+: (\w+)", entry)
        entries.setdefault(argument.group(1) if argument else "", []).append(entry)
    return entries


def _listed(entries: list[str]) -> str:
    messages = "1 message" if len(entries) == 1 else f"{len(entries)} messages"
    return f"<details><summary>{messages}</summary>\n\n```\n" + "\n".join(entries) + "\n```\n\n</details>\n"


def _complete(app, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] += CONTENTS
    if docname == "docs/notebooks" and NOTEBOOKS:
        source[0] += "\n".join(["", "```{toctree}", *(f"/notebooks/{name}" for name in NOTEBOOKS), "```", ""])
    if docname == "docs/errors":
        entries = errors_of_the_table()
        source[0] = re.sub(
            r"^<!-- errors: (\w+) -->$",
            lambda marker: _listed(entries[marker.group(1)]),
            source[0],
            flags=re.MULTILINE,
        )


def _is_plain_field(app, what: str, name: str, value, skip: bool, options) -> bool | None:
    """Fields of a NamedTuple stand in its docstring, which says more than that they are fields."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def _without_substitutions(app, what: str, name: str, value, options, lines: list[str]) -> None:
    """An absolute value, |γ|, is no reStructuredText substitution. What stands between `` is literal already."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        lines[i] = "``".join(part if odd % 2 else part.replace("|", r"\|") for odd, part in enumerate(parts))


def _describe_pictures(app, doctree) -> None:
    """Gives a text to pictures that a program has made: the paragraph above it in a notebook, or the page's title."""
    for picture in doctree.findall(nodes.image):
        if picture.get("alt", "") not in ("", Path(picture["uri"]).stem):
            continue
        top = picture
        while not isinstance(top.parent, nodes.section):
            top = top.parent
        before = top.parent[: top.parent.index(top)]
        above = [node.astext() for node in before if isinstance(node, (nodes.paragraph, nodes.title))]
        title = next(doctree.findall(nodes.title)).astext()
        picture["alt"] = f"{title}: the tables, drawn" if "alt" in picture else " ".join(above[-1].split())


def setup(app) -> None:
    app.connect("source-read", _complete)
    app.connect("doctree-read", _describe_pictures)
    app.connect("autodoc-skip-member", _is_plain_field)
    app.connect("autodoc-process-docstring", _without_substitutions)
