"""Every notebook runs from top to bottom, as a reader runs it, and outputs kept are small and of one such run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
INSTALL = re.compile(r"^\s*[%!]\s*(?:pip|conda|uv)\b|subprocess|os\.system", re.MULTILINE)


def _cells(path: Path):
    import nbformat

    return nbformat.read(path, as_version=4).cells


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert list(tmp_path.glob("*.html"))  # each ends by writing its page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_prose_first_and_ready_for_colab(path: Path) -> None:
    cells = _cells(path)
    code = [c.source for c in cells if c.cell_type == "code"]
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert max(len(source.splitlines()) for source in code) <= 12
    assert "# %pip install" in code[0] and "import interp" in code[0]
    assert not any(INSTALL.search(source) for source in code)  # nothing is installed behind the reader's back
    assert not any(re.search(r"\b_\w+\(|import _|\._[a-z]", source) for source in code)  # no private helpers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_that_are_kept_are_small(path: Path) -> None:
    """`make notebooks` puts them there: figures as pictures, without the library that draws them."""
    assert path.stat().st_size < 300_000
    cells = _cells(path)
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    for output in outputs:
        assert output.output_type in ("execute_result", "display_data", "stream")
        data = output.get("data", {})
        assert not any("plotly" in kind for kind in data) and "<script" not in "".join(data.get("text/html", ""))
    counts = [c.execution_count for c in cells if c.cell_type == "code"]
    assert not outputs or counts == list(range(1, len(counts) + 1))  # of one run, from a fresh kernel
