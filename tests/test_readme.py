"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.slow
def test_the_thirty_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "ioi.html").stat().st_size > 50_000
    assert (tmp_path / "heads.parquet").exists()


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w[\w-]*)", TEXT)) - {"a", "it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_verbs_named_in_the_readme_exist() -> None:
    from interp.cli import app

    verbs = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    verbs |= {group.name or "" for group in app.registered_groups}
    assert set(re.findall(r"`(?:\.venv/bin/)?interp ([\w-]+)", TEXT)) <= verbs
