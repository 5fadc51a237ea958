"""What can be said about the finished site without a browser: ``python docs/check_site.py build/site``.

Nothing is loaded from elsewhere, every picture has a text, every link leads somewhere, every public name is in the
reference and found by the search, and every notebook can be downloaded as it is. Prints each fault, and exits with 1 if
there is any.
"""

import importlib
import os
import pkgutil
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jbn

ROOT = Path(__file__).parents[1]
# Where a page names what the browser fetches by itself. A link is followed by the reader alone.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data"), ("link", "href")}


class Page(HTMLParser):
    """What one page loads, links to and can be linked at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.without_text: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.loads += [value for name, value in values.items() if (tag, name) in LOADED]
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img" and len(values.get("alt", "").split()) < 2:
            self.without_text.append(values["src"])


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def faults_of_pages(site: Path):
    pages = {file: Page(file) for file in sorted(site.rglob("*.html")) if "_static" not in file.parts}
    for file, page in pages.items():
        name = file.relative_to(site)
        for address in page.loads:
            if is_elsewhere(address):
                yield f"{name}: loads {address} from elsewhere"
        for picture in page.without_text:
            yield f"{name}: no text that describes {picture}"
        for address in page.loads + page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{name}: {address} leads nowhere"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{name}: nothing is called {address}"


def faults_of_styles(site: Path):
    for file in site.rglob("*.css"):
        for address in re.findall(r"""(?:url\(|@import )\s*["']?([^"')]+)""", file.read_text(encoding="utf-8")):
            if is_elsewhere(address):
                yield f"{file.relative_to(site)}: loads {address} from elsewhere"


def public_names():
    """``jbn.bn_apply``, ``jbn.networks.mlp`` and so on."""
    modules = [jbn.__name__, *(f"jbn.{m.name}" for m in pkgutil.iter_modules(jbn.__path__) if m.name[0] != "_")]
    for module in modules:
        for name in importlib.import_module(module).__all__:
            yield f"{module}.{name}"


def faults_of_reference(site: Path):
    documented = set().union(*(Page(file).ids for file in (site / "docs" / "api").glob("*.html")))
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for name in public_names():
        if name not in documented:
            yield f"docs/api: {name} is missing"
        if f'"{name.rpartition(".")[2]}"' not in index:
            yield f"searchindex.js: {name} is not found"


def faults_of_notebooks(site: Path):
    for notebook in sorted(ROOT.glob("notebooks/*.ipynb")):
        page, copy = site / "notebooks" / f"{notebook.stem}.html", site / "_sources" / "notebooks" / notebook.name
        if not page.exists():
            yield f"notebooks: {notebook.name} has no page"
        elif f"../_sources/notebooks/{notebook.name}" not in Page(page).links:
            yield f"notebooks: {notebook.name} cannot be downloaded from its page"
        elif copy.read_bytes() != notebook.read_bytes():
            yield f"notebooks: what is downloaded is not {notebook.name}"


def main(site: Path) -> int:
    rooms = (faults_of_pages, faults_of_styles, faults_of_reference, faults_of_notebooks)
    faults = [fault for room in rooms for fault in room(site.resolve())]
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
