"""The documentation's Python runs, its commands and links exist, and its pictures are those that the script draws."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
from doc_outputs import BLOCK, run_page, stored_outputs  # noqa: E402

DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "```python" in p.read_text(encoding="utf-8") and not p.is_symlink())
NUMBER = r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?"
# times of this machine, fits that differ in later digits, and tables whose best rows differ by rounding alone
FITTED = ("concepts", "gates", "interchange", "circuits", "quickstart")
NEEDS_MODEL = ("quickstart",)


def _case(path: Path):
    marks = [pytest.mark.model, pytest.mark.slow] if path.stem in NEEDS_MODEL else []
    return pytest.param(path, id=path.stem, marks=marks)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and body of every fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [_case(p) for p in PAGES])
def test_the_code_on_a_page_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.count("```python") == len(BLOCK.findall(text)) > 0
    outputs = run_page(text, path.stem)
    shown = stored_outputs(text)
    assert [bool(o) for o in outputs] == [bool(o) for o in shown], "run make docs-outputs"
    if path.stem not in FITTED:
        assert [same(o) for o in outputs] == [same(o) for o in shown], "run make docs-outputs"


def test_the_first_example_of_the_kernel_runs() -> None:
    text = (ROOT / "kernels" / "headstats" / "README.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n.*?^```\n", text, re.DOTALL | re.MULTILINE)
    assert example and run_page(example[0], "headstats") == [""]


def same(output: str) -> list[object]:
    """An output with its numbers rounded as far as machines agree, and without differences of spaces."""
    words = re.findall(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?|[^\s\d]+", output)
    return [
        round(float(w), 2) + 0.0 if re.fullmatch(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", w) else w.rstrip("+-") for w in words
    ]


def test_blocks_are_in_a_language_that_is_checked() -> None:
    """Python is run and lines of `interp` are looked up; whatever else comes in a fence is not code of ours to run."""
    for page in DOCS.rglob("*.md"):
        if page.is_symlink():
            continue
        for language, body in blocks(page.read_text(encoding="utf-8")):
            assert language in ("python", "sql", "output", ""), f"{page.name}: {language}"
            assert language in ("python", "output") or not re.search(r"^(import|from) \w+", body, re.MULTILINE), (
                page.name
            )


def test_every_page_is_reachable() -> None:
    """The strict build finds broken links; pages that nothing leads to it leaves out in silence."""
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} == set(re.findall(r'"([\w/-]+\.md)"', config))


def test_commands_on_the_pages_exist() -> None:
    import typer
    from click import Context

    from interp.cli.main import app

    known = typer.main.get_command(app)
    context = Context(known)
    pages = "\n".join(p.read_text(encoding="utf-8") for p in DOCS.rglob("*.md") if not p.is_symlink())
    lines = re.findall(r"^interp (.+)$", pages, re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        verb, *rest = line.split()
        command = known.get_command(context, verb)  # type: ignore[attr-defined]
        assert command is not None, line
        if rest and hasattr(command, "commands"):
            command = command.commands[rest[0]]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word for word in rest if word.startswith("-")} <= options, line


def test_pictures_are_those_that_the_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_concepts", ROOT / "experiments" / "draw_concepts.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = {f"{name}.svg": draw() for name, draw in script.PICTURES.items()}
    kept = {p.name: p.read_text(encoding="utf-8") for p in (DOCS / "pictures").glob("*.svg")}
    assert kept == drawn, "run python experiments/draw_concepts.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built as `make docs` does."""
    pytest.importorskip("zensical", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(DOCS, folder / "docs")
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    here = config.replace('paths = [".", "kernels"]', f"paths = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]")
    assert here != config
    (folder / "zensical.toml").write_text(here, encoding="utf-8")
    command = [Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


def test_strict_build_makes_pages_that_ask_the_network_for_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        asked = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?([^\" >]+)", html)
        asked += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|icon|preload|preconnect)[^>]+href=\"?([^\" >]+)", html)
        assert asked and not [a for a in asked if a.startswith(("http", "//"))], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize(
    "package", ["interp", "headstats", "interp.circuits", "interp.plots", "interp.tasks", "interp.zoo", "interp.corpus"]
)
def test_every_public_name_has_an_entry_in_the_api(site: Path, package: str) -> None:
    root = package.split(".")[0]
    pages = "".join(p.read_text(encoding="utf-8") for p in (site / "api").glob("*.html"))
    entries = set(re.findall(rf'<h\d id="?({root}\.[\w.]+)', pages))
    named = {entry.rsplit(".", 1)[-1] for entry in entries}
    module = importlib.import_module(package)
    missing = [
        name
        for name in module.__all__
        if not (any(e.startswith(f"{package}.{name}") for e in entries)
                if isinstance(getattr(module, name), ModuleType) else name in named)
    ]  # fmt: skip
    assert module.__all__ and not missing
