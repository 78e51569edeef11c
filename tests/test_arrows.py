"""Imports point one way: each room may import what stands below it, never beside or above, and no circles inside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top floor down. Rooms of one line do not import each other either.
FLOORS = [
    ["interp.cli", "experiments", "notebooks"],
    ["interp"],  # the front door: lazy public names, which nothing inside interp imports
    ["interp.spans"],  # the public address of interp.prompts.spans
    ["interp.bench"],
    ["interp.doctor", "interp.sweep"],
    ["interp.zoo", "interp.plots"],
    ["interp.circuits"],
    ["interp.recipes"],
    ["interp.heads", "interp.lens"],
    ["interp.engine", "interp.corpus"],
    ["interp.model", "interp.tasks"],
    ["interp.prompts", "interp.results", "interp.jobs"],
    ["interp.interventions", "interp.metrics"],
    ["interp.sites"],
    ["interp.utils"],
    ["interp.errors"],
    ["headstats"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """``interp/model/model.py`` as ``interp.model.model``; a package is called by its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_of(path): path
    for folder in ("interp", "kernels/headstats", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def room_of(module: str) -> str:
    """The room that a module stands in: ``interp.model`` for ``interp.model.model``."""
    return next(r for r in (".".join(module.split(".")[:2]), module.split(".")[0]) if r in FLOOR)


def imports_of(module: str) -> Iterator[str]:
    """Every module of ours that a module imports, anywhere in its code; a package face where a name is taken from it.

    What is imported for type checkers alone counts too, but in a face, whose names are lazy.
    """
    tree = ast.parse(SOURCES[module].read_text())
    if SOURCES[module].name == "__init__.py":
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in SOURCES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in SOURCES:
                    yield full
                elif node.module in SOURCES:
                    yield node.module


ARROWS = {module: sorted(set(imports_of(module)) - {module}) for module in SOURCES}


@pytest.mark.parametrize("module", [m for m in SOURCES if not m.startswith("headstats")])
def test_imports_point_down(module: str) -> None:
    here = room_of(module)
    for target in ARROWS[module]:
        there = room_of(target)
        assert here == there or FLOOR[there] > FLOOR[here], f"{module} must not import {target}"


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that import each other, directly or through others (Tarjan's components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in arrows.get(name, ()):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                out.append(sorted(group))

    for name in arrows:
        if name not in index:
            visit(name)
    return out


def test_no_circles_between_modules() -> None:
    assert not circles({m: set(targets) for m, targets in ARROWS.items()})


@pytest.mark.parametrize("room", sorted({room_of(m) for m in SOURCES} - {"interp"}))
def test_no_circles_between_the_folders_of_a_room(room: str) -> None:
    """Folders and files that stand side by side inside a room import each other one way only."""

    def place(module: str) -> str:
        return module.removeprefix(room).lstrip(".").split(".")[0]

    arrows: dict[str, set[str]] = {}
    for module in SOURCES:
        if room_of(module) == room and place(module):
            inside = {place(t) for t in ARROWS[module] if room_of(t) == room}
            arrows.setdefault(place(module), set()).update(inside - {place(module), ""})
    assert not circles(arrows)


def test_no_circles_between_the_scripts_of_the_page() -> None:
    page = ROOT / "interp" / "plots" / "page"
    arrows = {p.name: scripts_used_by(p.read_text()) for p in page.glob("*.js")}
    assert set().union(*arrows.values()) == set(arrows) - {"page.js"}  # imports are written as this test reads them
    assert not circles(arrows)


def scripts_used_by(text: str) -> set[str]:
    """Names of the page's scripts that a script imports, for their values or for their types."""
    return set(re.findall(r'(?:\bfrom |^import |\bimport\()"\./([\w-]+\.js)"', text, re.M))


def test_imports_of_scripts_are_read() -> None:
    text = 'import { a } from "./one.js";\nimport {\n  b,\n} from "./two.js";\nimport "./three.js";\n'
    text += '/** @typedef {import("./four.js").View} View */\n'
    assert scripts_used_by(text) == {"one.js", "two.js", "three.js", "four.js"}
    assert circles({"one.js": {"two.js"}, "two.js": {"one.js"}}) == [["one.js", "two.js"]]


def test_backends_do_not_import_each_other() -> None:
    backends = ("headstats.triton", "headstats.blocked", "headstats.cpu")
    for module, targets in ARROWS.items():
        own = next((b for b in backends if module.startswith(b)), None)
        if own is not None:
            others = tuple(b for b in backends if b != own)
            assert not [t for t in targets if t.startswith(others)], module


def recipe_modules() -> set[str]:
    """The modules of the recipes' functions, as the registry names them."""
    from interp.recipes.registry import RECIPES

    return {f"interp.recipes.{recipe.function.partition(':')[0]}" for recipe in RECIPES.values()}


@pytest.mark.parametrize("module", sorted(recipe_modules()))
def test_recipes_do_not_import_each_other(module: str) -> None:
    allowed = {"interp.recipes.patching"} if module == "interp.recipes.mediation" else set()  # patching twice
    assert set(ARROWS[module]) & (recipe_modules() - {module}) == allowed


def imported_libraries(module: str) -> set[str]:
    """Top-level names of everything that a module imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_model_room_reaches_into_transformer_lens_and_transformers() -> None:
    """Except `interp.bench`, which runs other libraries, and the experiments."""
    for module in SOURCES:
        if room_of(module) not in ("interp.model", "interp.bench", "experiments"):
            assert not imported_libraries(module) & {"transformer_lens", "transformers"}, module


def test_headstats_stands_alone() -> None:
    allowed = {"headstats", "torch", "triton", "jaxtyping", *sys.stdlib_module_names}
    for module in SOURCES:
        if room_of(module) == "headstats":
            assert imported_libraries(module) <= allowed, module


def test_plots_know_neither_torch_nor_models() -> None:
    for module in SOURCES:
        if room_of(module) == "interp.plots":
            assert not imported_libraries(module) & {"torch", "transformers"}, module


def test_jobs_know_neither_torch_nor_effects() -> None:
    for module in SOURCES:
        if room_of(module) == "interp.jobs":
            assert "torch" not in imported_libraries(module), module


def test_a_worker_imports_no_command_line() -> None:
    code = (
        "import sys, interp.jobs.worker, interp.sweep.effects_job; "
        "print(any(m.startswith(('interp.cli', 'typer')) for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_the_kernels_folder_does_not_shadow_the_kernels_package() -> None:
    """transformers looks for a package named `kernels`; ours must not be importable under that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import transformers, headstats, importlib.util as u; from transformers import LlamaForCausalLM; "
        "s = u.find_spec('kernels'); print(s is None or s.origin is None, headstats.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "headstats"]


def test_importing_interp_is_light() -> None:
    code = (
        "import sys, interp, interp.cli.main; print(any(m in sys.modules for m in ('torch', 'transformers', 'plotly')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
