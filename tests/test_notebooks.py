"""Every notebook runs from top to bottom, and is published with its outputs."""

import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_published_with_outputs_and_without_errors(file):
    code = [c for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "run it: make notebooks"
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert sum(bool(c.outputs) for c in code) > len(code) / 2
    assert file.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own dependencies
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_runs_from_top_to_bottom(file, tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
