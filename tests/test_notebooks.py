"""Every notebook runs from top to bottom, as a reader would run it, and is committed without bulky output."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


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
def test_notebook_is_prose_first_and_small(path: Path) -> None:
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    assert path.stat().st_size < 200_000
    assert cells[0].cell_type == "markdown"
    assert max(len(c.source.splitlines()) for c in cells if c.cell_type == "code") <= 12
    assert sum(c.cell_type == "markdown" for c in cells) >= sum(c.cell_type == "code" for c in cells)
    assert not any(c.get("outputs") for c in cells if c.cell_type == "code")
