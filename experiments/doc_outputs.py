"""Run the Python of documentation pages, and write what each block prints below it.

Run: python experiments/doc_outputs.py [PAGE ...] (default: all pages), or `make docs-outputs`. A block that ends in an
expression shows its value, as a notebook does. Tests run the same blocks, and compare the outputs with those stored.
"""

from __future__ import annotations

import ast
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```output\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
OPTIONS = {
    "display.width": 110, "display.max_columns": 12, "display.max_rows": 12, "display.float_format": "{:.4g}".format,
}  # fmt: skip


def pages() -> list[Path]:
    """Return the pages that hold Python."""
    return sorted(p for p in DOCS.rglob("*.md") if "```python" in p.read_text(encoding="utf-8") and not p.is_symlink())


def stored_outputs(text: str) -> list[str]:
    """Return what a page shows below each of its blocks; "" where there is nothing."""
    return [output or "" for _, output in BLOCK.findall(text)]


def run_page(text: str, name: str) -> list[str]:
    """Run the blocks of a page from top to bottom in the current folder, and return what each of them prints."""
    names: dict[str, Any] = {"__name__": name}
    items = [item for pair in OPTIONS.items() for item in pair]
    with pd.option_context(*items):
        return [_run_block(code, name, names) for code, _ in BLOCK.findall(text)]


def _run_block(code: str, name: str, names: dict[str, Any]) -> str:
    body = ast.parse(code).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(ast.Module(body, []), name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if value is not None and not hasattr(value, "to_plotly_json"):
                print(value if isinstance(value, str) else repr(value))
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def with_outputs(text: str, outputs: list[str]) -> str:
    """Return a page with these outputs below its blocks."""
    remaining = iter(outputs)

    def block(match: re.Match[str]) -> str:
        output = next(remaining)
        return f"```python\n{match[1]}```\n" + (f"\n```output\n{output}```\n" if output else "")

    return BLOCK.sub(block, text)


@contextmanager
def in_empty_folder() -> Iterator[None]:
    """Work in a temporary folder inside the block."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def main(paths: list[Path]) -> None:
    """Rewrite the pages."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        with in_empty_folder():
            outputs = run_page(text, path.stem)
        path.write_text(with_outputs(text, outputs), encoding="utf-8")
        print(
            f"{path.relative_to(DOCS)}: {sum(map(bool, outputs))} of {len(outputs)} blocks show something", flush=True
        )


if __name__ == "__main__":
    main([Path(a).resolve() for a in sys.argv[1:]] or pages())
