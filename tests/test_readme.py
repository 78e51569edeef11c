"""The README is short; its Python runs as it stands, its commands, links and figures exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "ioi.html").stat().st_size > 50_000
    summary = names["heads"].summary()  # type: ignore[attr-defined]  # what the text after it says
    assert len(summary) == 270 and {"effect", "lo", "hi", "raw"} <= set(summary)


def test_it_stays_short_and_its_measured_rows_are_those_of_the_documentation() -> None:
    assert len(TEXT.splitlines()) <= 120
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in TEXT.split("## Measured")[1].split("##")[0].splitlines() if "×" in line and "**" in line]
    assert len(rows) > 5 and set(rows) <= set(measured)


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 8
    assert not [x for x in links if not x.startswith("http") and not (ROOT / x).exists()]


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w[\w-]*)", TEXT)) - {"a", "it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_verbs_named_in_the_readme_exist() -> None:
    from interp.cli.main import app

    verbs = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    verbs |= {group.name or "" for group in app.registered_groups}
    assert set(re.findall(r"`(?:\.venv/bin/)?interp ([a-z][\w-]*)", TEXT)) <= verbs
