"""examples/quickstart.ipynb runs from top to bottom with the library alone, and is committed without outputs."""

from __future__ import annotations

import base64
import os
import re

import pytest

from tests.conftest import PROJECT

NOTEBOOK = PROJECT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="the extra `dev` is not installed")
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_committed_without_outputs_and_imports_the_library_alone(notebook):
    for cell in code_of(notebook):
        assert not cell.outputs
        assert cell.execution_count is None
        assert not [name for name in ("prefect", "dvc", "mlflow", "tasks", "flows") if f"import {name}" in cell.source]
        assert not [name for name in ("tasks", "flows") if f"from {name}" in cell.source]


@pytest.mark.slow
def test_the_notebook_runs_and_ends_with_a_chart(notebook, tokenizer, monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    del tokenizer  # skips where the wheels cannot be had
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    written = "".join(output.get("text", "") for cell in code_of(notebook) for output in cell.outputs)
    sizes = {name: float(size) for name, size in re.findall(r"^(\w+) +([\d.]+) MiB  ", written, re.MULTILINE)}
    assert list(sizes) == ["base", "pruned", "quantised"]
    assert sizes["quantised"] < sizes["pruned"] < sizes["base"]
    (chart,) = [output for output in code_of(notebook)[-1].outputs if output.output_type == "display_data"]
    picture = base64.b64decode(chart.data["image/png"])
    assert picture.startswith(b"\x89PNG")
