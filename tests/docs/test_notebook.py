"""Execute the notebook of the documentation."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "your_own_pair.ipynb"


@pytest.mark.long
def test_notebook_runs_and_the_student_improves(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    root = str(NOTEBOOK.parents[2])
    monkeypatch.setenv("PYTHONPATH", root)  # of the kernel's process
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # the repository has none
    check = nbformat.v4.new_code_cell("{name: result.report[name]['error_rate'] for name in result.report}")
    notebook.cells.append(check)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    rates = ast.literal_eval(notebook.cells[-1].outputs[0]["data"]["text/plain"])
    assert rates["teacher"] < rates["student_after"] < rates["student_before"]
    assert (tmp_path / "runs" / "your-own-pair" / "model.safetensors").is_file()
