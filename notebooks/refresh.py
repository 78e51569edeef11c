"""Run notebooks from a fresh kernel and store their outputs, with figures as PNG images.

Run: python notebooks/refresh.py [NOTEBOOK ...] (default: all). Headless Chromium draws the figures, so that any viewer
can show them. A reader who runs a notebook gets interactive figures.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from plotly.offline import get_plotlyjs

FIGURE = "application/vnd.plotly.v1+json"
BAR = {"interp": "progress"}  # metadata of a progress bar's output
SIZE = (760, 440)  # in pixels, of a figure without a size of its own


def execute(path: Path) -> Any:
    """Run a notebook from top to bottom in a temporary folder; return it with its outputs."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # stores the figure's data without the plotly library
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if cell.cell_type == "code":  # progress bars and log lines are not results
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o.get("metadata") != BAR]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def draw(notebook: Any) -> int:
    """Replace every figure by a PNG; return the number of figures."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    outputs = [o for c in notebook.cells for o in c.get("outputs", []) if FIGURE in o.get("data", {})]
    if outputs and browser is None:
        raise SystemExit("Chromium is needed to draw figures: apt-get install chromium")
    for output in outputs:
        png = picture(str(browser), output.data[FIGURE])
        output.data = {"image/png": base64.b64encode(png).decode(), "text/plain": "a plotly figure"}
    return len(outputs)


def picture(browser: str, figure: dict[str, Any]) -> bytes:
    """Draw a plotly figure as a PNG."""
    layout = figure.get("layout", {})
    width, height = (layout.get(k) or default for k, default in zip(("width", "height"), SIZE, strict=True))
    data = json.dumps({"data": figure["data"], "layout": {**layout, "width": width, "height": height}})
    with tempfile.TemporaryDirectory() as folder:
        page, png = Path(folder, "figure.html"), Path(folder, "figure.png")
        script = f"const f = {data}; Plotly.newPlot('f', f.data, f.layout, {{staticPlot: true}})".replace("</", "<\\/")
        page.write_text(
            "<meta charset=utf-8><body style='margin:0'><div id=f></div>"
            f"<script>{get_plotlyjs()}</script><script>{script}</script>",
            encoding="utf-8",
        )
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000",
            f"--window-size={width},{height}", f"--screenshot={png}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return png.read_bytes()


def main(paths: list[Path]) -> None:
    """Run each notebook and write it back."""
    for path in paths:
        start = time.perf_counter()
        notebook = execute(path)
        seconds = time.perf_counter() - start
        n = draw(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {seconds:.0f} s, {n} figures, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main([Path(a) for a in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.ipynb")))
