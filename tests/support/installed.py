"""Which `jbn` is tested: the installed wheel, unless the developer has asked for the checkout."""

import importlib.util
import json
import os
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "run python -m pip install . (or python -m pip install -e . to work on it)"


def hide_checkout(root: Path) -> None:
    """Takes ``root`` off the path of imports, here and in every process that a test starts.

    ``python -m pytest`` puts the working directory first, so that the checkout's ``jbn/`` would hide the
    installed one. A checkout that ``PYTHONPATH`` names is asked for, and stays.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if not _asked_for(root):
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != root]


def source_of_jbn(root: Path) -> tuple[str, str | None]:
    """(what is tested, in words; what is wrong with it, in one line, or None)."""
    spec = importlib.util.find_spec("jbn")
    if spec is None or spec.origin is None:
        return "none", f"jbn: got nothing to import; expected an installed wheel; {INSTALL}."
    package = Path(spec.origin).resolve().parent
    if package == root / "jbn":
        if _asked_for(root):
            return f"the checkout {package}, by PYTHONPATH", None
        if _is_editable():
            return f"the checkout {package}, by an editable install", None
        return str(package), f"jbn: got the checkout {package}; expected the installed wheel; {INSTALL}."
    stale = differing(package, root / "jbn")
    if stale:
        return str(package), f"jbn: got an installed {stale[0]} unlike that of {root}; expected its wheel; {INSTALL}."
    return f"the installed {package}", None


def differing(package: Path, checkout: Path) -> list[str]:
    """The Python files that are not the same in the two folders."""
    here, there = ({str(p.relative_to(top)): p for p in top.rglob("*.py")} for top in (package, checkout))
    return sorted(
        name
        for name in here.keys() | there.keys()
        if name not in here or name not in there or here[name].read_bytes() != there[name].read_bytes()
    )


def _asked_for(root: Path) -> bool:
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return any(entry and Path(entry).resolve() == root for entry in entries)


def _is_editable() -> bool:
    text = metadata.distribution("jbn").read_text("direct_url.json")
    return bool(text and json.loads(text).get("dir_info", {}).get("editable"))
