"""Import arrows point one way; heavy libraries stay out of light modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room -> what it may import from interp (module prefixes); None: anything
ALLOWED: dict[str, tuple[str, ...] | None] = {
    "collector": (),
    "errors": (),
    "display": (),
    "sites": ("display", "errors"),
    "prompts": ("display", "errors"),
    "metrics": ("errors",),
    "provenance": ("given",),
    "progress": (),
    "dense": (),
    "inference": (),
    "effects": ("display", "errors", "inference"),
    "attention": ("display", "effects", "errors"),
    "attention_bridges": ("dense", "errors", "instrument"),
    "inputs": ("errors",),
    "instrument": ("dense", "errors", "attention_bridges"),
    "adapters": ("image_adapters",),
    "image_adapters": (),
    "towers": ("errors", "image_adapters"),
    "given": ("prompts",),
    "batching": ("given",),
    "encoding": ("alignment", "errors", "prompts"),
    "made_up": (),
    "pictures": ("errors", "given", "prompts", "spans"),
    "verification": ("errors", "instrument", "made_up", "pictures", "seq2seq"),
    "pattern_collection": (
        "dense", "errors", "head_statistics", "instrument", "patterns", "prompts", "provenance", "sites", "spans",
    ),
    "head_statistics": (
        "attention", "batching", "errors", "given", "inputs", "pictures", "prompts", "provenance",
    ),
    "seq2seq": ("attention", "errors", "made_up", "provenance"),
    "loading": ("adapters", "errors", "towers", "zoo.embedded"),
    "alignment": (),
    "spans": ("errors", "prompts"),
    "model": (
        "attention",
        "batching",
        "collector",
        "display",
        "encoding",
        "errors",
        "head_statistics",
        "inputs",
        "instrument",
        "loading",
        "pattern_collection",
        "patterns",
        "pictures",
        "prompts",
        "provenance",
        "seq2seq",
        "sites",
        "verification",
    ),
    "memory": ("dense", "model"),
    "trial": ("made_up", "pictures", "seq2seq", "verification"),
    "doctor": (
        "dense", "engine", "errors", "instrument", "loading", "matrix", "memory", "model", "sites", "towers", "trial",
    ),
    "matrix": ("dense", "errors", "instrument", "loading", "made_up", "matrix", "model", "pictures", "zoo"),
    "engine": ("batching", "dense", "engine", "errors", "given", "instrument", "model", "prompts", "sites"),
    "recipes": (
        "effects",
        "engine",
        "errors",
        "metrics",
        "model",
        "progress",
        "prompts",
        "provenance",
        "sites",
        "targets",
    ),
    "targets": ("engine", "errors", "prompts", "sites"),
    "means": ("engine", "errors", "prompts", "sites"),
    "circuits": (
        "batching",
        "circuits",
        "display",
        "dense",
        "effects",
        "engine",
        "errors",
        "inference",
        "instrument",
        "means",
        "metrics",
        "model",
        "patching",
        "progress",
        "prompts",
        "provenance",
        "recipes",
        "sites",
        "targets",
    ),
    "corpus": ("batching", "corpus", "errors", "head_statistics", "sweep"),
    "sweep": (
        "batching", "effects", "engine", "errors", "means", "plots.report", "prompt_files", "prompts", "provenance",
        "recipes", "sites", "sweep", "sweep_options", "tasks",
    ),
    "patterns": ("display", "effects", "errors"),
    "plots": ("attention", "circuits", "effects", "errors", "patterns", "plots", "sites"),
    "results": ("attention", "circuits", "effects", "errors", "patterns"),
}  # fmt: skip
RECIPES = ("patching", "ablation", "tracing", "knockout", "paths", "steering", "omission", "peeking")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def modules(room: str) -> list[Path]:
    folder = ROOT / "interp" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows(room: str) -> None:
    allowed = ALLOWED[room]
    assert allowed is not None
    for path in modules(room):
        for name in imports_of(path):
            if name.startswith("interp."):
                inner = name.removeprefix("interp.")
                if inner == "engine":  # `from interp import engine`
                    continue
                assert inner.startswith(tuple(allowed)), f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_do_not_import_each_other(recipe: str) -> None:
    (path,) = modules(recipe)
    others = [f"interp.{r}" for r in RECIPES if r != recipe]
    assert not [n for n in imports_of(path) if n.startswith(tuple(others))]


def test_mediation_is_patching_twice() -> None:
    (path,) = modules("mediation")
    others = [f"interp.{r}" for r in RECIPES if r != "patching"]
    assert not [n for n in imports_of(path) if n.startswith(tuple(others))]


def test_only_model_rooms_import_transformer_lens() -> None:
    homes = {"adapters", "image_adapters", "model", "loading", "instrument", "attention_bridges"}
    homes |= {"weights", "interchange"}  # which wrap its FactoredMatrix and its interchange interventions
    for path in (ROOT / "interp").rglob("*.py"):
        if path.stem in homes or "zoo" in path.parts or path.parts[-2:] == ("bench", "peers.py"):
            continue
        assert not [n for n in imports_of(path) if n.startswith("transformer_lens")], path


def test_headstats_stands_alone() -> None:
    allowed = ("headstats", "torch", "triton", "jaxtyping")
    stdlib = sys.stdlib_module_names
    for path in (ROOT / "kernels" / "headstats").rglob("*.py"):
        for name in imports_of(path):
            root = name.split(".")[0]
            assert root in stdlib or root in allowed, f"{path.name} imports {name}"


def test_plots_know_neither_torch_nor_models() -> None:
    for path in (ROOT / "interp" / "plots").rglob("*.py"):
        assert not [n for n in imports_of(path) if n.split(".")[0] in ("torch", "transformers")], path


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
