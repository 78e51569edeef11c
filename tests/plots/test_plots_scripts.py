"""The page's scripts: small modules, typed and linted, and one whole without a bundler."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from interp.plots.template import fill_template, joined_script, page_scripts

FOLDER = Path(__file__).parents[2] / "interp" / "plots" / "page"
DENO = shutil.which("deno", path=str(Path(sys.executable).parent)) or shutil.which("deno")
needs_deno = pytest.mark.skipif(DENO is None, reason="no deno found: pip install -e '.[dev]'")


def run(*arguments: str, folder: Path = FOLDER) -> str:
    """Output of deno; empty if it found nothing."""
    assert DENO is not None
    environment = {"DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1", "DENO_DIR": str(folder / ".deno"), "HOME": str(folder)}
    if folder == FOLDER:
        environment.pop("DENO_DIR")
        environment["HOME"] = str(Path.home())
    done = subprocess.run([DENO, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_modules_are_listed_small_and_use_what_they_import():
    assert {p.name for p in FOLDER.glob("*.js")} == set(page_scripts())
    for path in FOLDER.glob("*.js"):
        text = path.read_text()
        assert len(text.splitlines()) < 400, path.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|fetch\(|XMLHttp", text
        ), path


@needs_deno
def test_types_and_lint():
    assert run("lint", "-q", "--config", "deno.json", ".") == ""
    assert run("check", "-q", "--config", "deno.json", *sorted(p.name for p in FOLDER.glob("*.js"))) == ""


@needs_deno
def test_the_type_checker_would_notice(tmp_path: Path):
    (tmp_path / "deno.json").write_text((FOLDER / "deno.json").read_text())
    (tmp_path / "a.js").write_text('export const n = /** @type {number} */ ("a".length).foo;\n')
    assert "foo" in run("check", "-q", "--config", "deno.json", "a.js", folder=tmp_path)


@needs_deno
def test_names_are_unique_in_the_joined_script(tmp_path: Path):
    script = joined_script(page_scripts())
    assert script.isascii() and not re.search(r"^(import|export) ", script, re.M)
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", script, re.M)
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
    (tmp_path / "page.js").write_text(script)
    (tmp_path / "deno.json").write_text('{"lint": {"rules": {"tags": [], "include": ["no-redeclare"]}}}')
    assert run("lint", "-q", "--config", "deno.json", "page.js", folder=tmp_path) == ""


def test_the_page_is_made_the_same_each_time():
    assert fill_template("t", "{}") == fill_template("t", "{}")
