"""Runs the notebooks as a reader would, and finds the numbers that their text states in what their cells printed.

``python tests/support/notebooks.py [notebooks/01-….ipynb …]`` executes them in place, all by default, and leaves
nothing in them that changes from run to run but what the cells themselves print.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
ALL = sorted(FOLDER.glob("*.ipynb"))

# What tests set for themselves, and what would change what a reader sees.
_OURS = ("JAX_ENABLE_X64", "JAX_COMPILATION_CACHE_DIR", "KERAS_BACKEND", "MPLBACKEND", "XLA_FLAGS")
_NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(path: Path, *, folder: Path | None = None, widgets: bool = False) -> Any:
    """A fresh run of a notebook in a kernel of this Python, with its outputs and no metadata of the run.

    ``widgets`` False hides ipywidgets, so that the outputs are those of a page that nobody can click on.
    """
    from nbclient import NotebookClient

    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if not widgets:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(_NO_WIDGETS))
    kernel = {key: value for key, value in os.environ.items() if key not in _OURS}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(folder or path.parent)}},
    )
    client.execute(env=kernel | {"JAX_PLATFORMS": "cpu"})
    if not widgets:
        del notebook.cells[0]
    return _without_traces(notebook)


def _without_traces(notebook: Any) -> Any:
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
                if "data" in output:  # `<Figure size …>` beside a picture says nothing
                    output.metadata = {}
                    if "image/png" in output.data:
                        output.data = {"image/png": output.data["image/png"]}
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Lines that were printed one after the other are one output, however the kernel cut them."""
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def printed(cell: Any) -> str:
    """What a code cell wrote and returned, as text."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif "data" in output and "text/plain" in output.data:
            texts.append(output.data["text/plain"])
    return "\n".join(texts)


def missing_numbers(notebook: Any) -> list[str]:
    """The numbers in the text that the code cell above did not print, each with the line that states it.

    Not looked at are formulas ($…$) and code, which state no result, links, and timings, which differ from machine
    to machine.
    """
    missing, known = [], set[str]()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            known = set(_numbers(printed(cell)))
        elif cell.cell_type == "markdown":
            for line in _prose(cell.source).splitlines():
                missing += [f"{number}: {line.strip()}" for number in _numbers(line) if number not in known]
    return missing


_NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$"  # code and formulas
    r"|\[[^\]]*\]\([^)]*\)"  # links
    r"|\d[\d.]*\s*(?:s|ms|µs|seconds?|minutes?)\b",  # timings
    re.DOTALL,
)


def _prose(source: str) -> str:
    return _NOT_PROSE.sub(" ", source)


def _numbers(text: str) -> Iterator[str]:
    """Numbers as they are written: 0.97, 10 000, 10⁴."""
    for match in re.finditer(r"(?<![\w.])\d{1,3}(?:[  ]\d{3})+(?!\d)|(?<![\w.])\d+(?:\.\d+)?[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]*", text):
        yield match.group().replace(" ", " ")


def main() -> None:
    for path in map(Path, sys.argv[1:] or ALL):
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(path.name, *(missing_numbers(notebook) or ["every number in the text was printed"]), sep="\n  ")


if __name__ == "__main__":
    main()
