"""Notebooks beside the files they are paired with; that they run is `make test-notebooks`."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["privacy_budget", "quickstart"]


def test_all_are_tested() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_py_file_and_ran_to_its_end(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    paired = jupytext.read(FOLDER / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in paired.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "in order, and to the end"
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert len([out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]) >= 2
