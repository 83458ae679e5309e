"""docs/walkthrough.ipynb: it runs from top to bottom, its asserts hold, and what it shows is stored in it, small."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_runs_and_every_fact_it_asserts_holds(notebook):
    fresh = nbformat.from_dict(notebook)
    for cell in code_cells(fresh):
        cell.outputs = []
    client = NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute()  # raises where a cell does, an assert included
    for ran, stored in zip(code_cells(fresh), code_cells(notebook), strict=True):
        kinds = [{output.output_type for output in cell.outputs} for cell in (ran, stored)]
        assert kinds[0] == kinds[1], f"cell {ran.id} no longer shows what is stored in it; run the notebook and save it"


def test_the_notebook_is_stored_as_it_ran_small_and_in_order(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 500_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
