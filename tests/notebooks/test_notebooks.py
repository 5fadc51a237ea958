"""Each notebook runs as a reader would run it, is clean, and states no number that its cells did not print."""

import re

import pytest

pytest.importorskip("nbclient", reason="needs the extra `notebooks`")

from support import notebooks

if not notebooks.ALL:
    pytest.skip("needs the repository", allow_module_level=True)

each = pytest.mark.parametrize("path", notebooks.ALL, ids=lambda path: path.stem)
WIDGETS = notebooks.FOLDER / "02-the-four-equations.ipynb"
MOST_LINES = 40  # of an output, so that nobody scrolls


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def verdicts(notebook):
    """What the cells claim: each printed line that says True or False, without its numbers and their width."""
    lines = [line for cell in code_cells(notebook) for line in notebooks.printed(cell).splitlines()]
    return [re.sub(r"\s*[\d.]+", "…", line) for line in lines if re.search(r"\b(True|False)\b", line)]


def check_clean(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", output.evalue
            assert output.get("name") != "stderr", output.text
            assert "Figure" not in output.get("data", {}).get("text/plain", ""), "a picture that is not shown"
        text = notebooks.printed(cell)
        assert len(text.splitlines()) <= MOST_LINES
        assert max(map(len, text.splitlines()), default=0) <= 130, "a line that is wider than a page"


@each
def test_the_committed_outputs_are_there_clean_and_hold_every_number_of_the_text(path):
    notebook = notebooks.read(path)
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert sum("image/png" in out.get("data", {}) for cell in code_cells(notebook) for out in cell.outputs) >= 3
    check_clean(notebook)
    assert notebooks.missing_numbers(notebook) == []


@each
def test_nothing_of_the_machine_and_of_the_run_is_committed(path):
    notebook = notebooks.read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert path.stat().st_size < 1e6
    assert "/home/" not in path.read_text(encoding="utf-8")


@each
def test_the_notebooks_lead_to_each_other(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"\(([\w-]+\.ipynb)\)", text)) == {other.name for other in notebooks.ALL} - {path.name}


@each
@pytest.mark.nightly
@pytest.mark.processes
def test_a_fresh_run_is_clean_and_prints_every_number_of_the_text(path, tmp_path):
    fresh = notebooks.executed(path, folder=tmp_path)
    check_clean(fresh)
    assert notebooks.missing_numbers(fresh) == []
    assert verdicts(fresh) == verdicts(notebooks.read(path))


@pytest.mark.nightly
@pytest.mark.processes
def test_with_ipywidgets_there_are_sliders(tmp_path):
    pytest.importorskip("ipywidgets")
    shown = [
        output
        for cell in code_cells(notebooks.executed(WIDGETS, folder=tmp_path, widgets=True))
        for output in cell.outputs
    ]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in shown)
    assert sum("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in shown) == 1


def test_a_number_that_was_not_printed_is_found():
    notebook = notebooks.read(notebooks.ALL[0])
    text = "It took 3 s, or $5$ steps of `7`; [Wu 2018](x.html). At 0.25 and 10⁴ it is 1 234."
    notebook.cells = [code_cells(notebook)[0], notebook.cells[0]]
    notebook.cells[0].outputs, notebook.cells[1].source = [], text
    assert [found.split(":")[0] for found in notebooks.missing_numbers(notebook)] == ["0.25", "10⁴", "1 234"]
