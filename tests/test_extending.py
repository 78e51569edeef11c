"""What it costs to add a recipe: its module, one row of the registry, a page of documentation, a test."""

from __future__ import annotations

import inspect
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import typer

import interp
from interp.cli.recipes import register
from interp.recipes.options import Option, number
from interp.recipes.registry import RECIPES, Recipe, SiteOptions

ROOT = Path(__file__).parents[1]

# A toy recipe, as its module would stand in interp/recipes/damping.py: multiply an activation by a factor.
TOY_MODULE = '''
"""Damping: multiply an activation by a factor in the clean run."""

from interp.engine import Cell, CellWrite
from interp.engine.cells import rows_of
from interp.metrics import logit_diff
from interp.recipes.inputs import expand_sites
from interp.recipes.sweep_loop import WHOLE_SET, CellRow, CellSource, SweepLoop
from interp.recipes.targets import as_sites


def damp(
    model, pairs, sites, factor=0.5, metric=logit_diff, engine="auto", show_progress=None, memory=None,
    subset=WHOLE_SET,
):
    """Multiply the activation at every site by ``factor``, one site at a time."""
    loop = SweepLoop(model, pairs, metric, engine, memory, subset, show_progress)
    loop.runner.check_sites(as_sites(sites))
    return loop.run(_DampingCells(loop, as_sites(sites), factor), f"damp × {factor:g}", "noise", factor=factor)


class _DampingCells(CellSource):
    title = "damp"

    def __init__(self, loop, sites, factor):
        self.factor = factor
        self.sites = [list(expand_sites(sites, p)) for p in loop.prompts]
        self.components = sorted({s.component for s in sites})
        self.size = sum(map(len, self.sites))

    def batch(self, loop, numbers):
        return loop.record_pairs(numbers, self.components)

    def rows(self, batch):
        yield [
            CellRow(n, s, Cell(n, (self._write(s, batch.prompts[n], batch.clean_runs[n]),)))
            for n, i in enumerate(batch.numbers)
            for s in self.sites[i]
        ]

    def _write(self, site, prompt, run):
        start, stop = rows_of(site, prompt)
        return CellWrite(site, start, stop, self.factor * run.value(site, start, stop))
'''
TOY_ROW = Recipe(
    "damp", "damping:damp", "Damping: multiply an activation by a factor.",
    (Option("factor", number(0), "What the activation is multiplied by.", default=0.5),),
    sites=SiteOptions(groups=False),
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    """The toy recipe, added by its module and its row alone."""
    module = types.ModuleType("interp.recipes.damping")
    exec(compile(TOY_MODULE, "damping.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "interp.recipes.damping", module)
    monkeypatch.setitem(RECIPES, "damp", TOY_ROW)
    return module.damp


PAIRS = [
    interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96"),
    interp.PromptPair("w5 w6 w7 w8", "w5 w6 w2 w8", "w95", "w96"),
]


def test_a_new_recipe_runs_fast_and_exactly(tiny, toy) -> None:
    model = tiny("llama")
    fast = toy(model, PAIRS, model.sites("z"), factor=0.25).frame()
    exact = toy(model, PAIRS, model.sites("z"), factor=0.25, engine="naive").frame()
    np.testing.assert_allclose(fast["patched"], exact["patched"], rtol=1e-9, atol=1e-12)  # the model is float64
    nothing = toy(model, PAIRS, model.sites("z"), factor=1.0, engine="naive").frame()
    np.testing.assert_allclose(nothing["effect"], 0, atol=1e-9)  # the null: nothing is changed


def test_a_new_recipe_is_a_command(toy, folder_of_tiny_model, monkeypatch, capsys) -> None:
    app = typer.Typer()
    register(app)
    model, pairs = folder_of_tiny_model
    out = pairs.parent / "damp.parquet"
    app(
        ["damp", "--model", str(model), "--pairs", str(pairs), "--factor", "0.25", "--out", str(out)],
        standalone_mode=False,
    )
    expected = toy(interp.load(str(model)), PAIRS, "z.L1H2", factor=0.25).frame()
    got = interp.Effects.read(out).frame()
    same = got[(got["layer"] == 1) & (got["head"] == 2)]
    np.testing.assert_allclose(same["patched"], expected["patched"], rtol=1e-4, atol=1e-6)
    assert "damp × 0.25" in set(got["intervention"]) and "wrote" in capsys.readouterr().out


def test_a_new_recipe_is_in_sweeps_and_their_template(toy, folder_of_tiny_model, tmp_path) -> None:
    from interp.sweep.template import sweep_template

    assert "damp" in sweep_template()
    model, pairs = folder_of_tiny_model
    config = tmp_path / "sweep.toml"
    config.write_text(
        f'name = "toy"\nexamples_per_part = 1\n[[models]]\nload = "{model}"\n'
        f'[[tasks]]\npairs = "{pairs}"\nrequire = 0\n'
        '[[recipes]]\nrecipe = "damp"\nfactor = 0.25\n[[sites]]\nsites = "z"\n'
    )
    sweep = interp.Sweep(config, tmp_path / "run")
    sweep.run(executor="in-process")
    loaded = interp.load(str(model))
    expected = toy(loaded, PAIRS, loaded.sites("z"), factor=0.25).frame()
    (effects,) = sweep.effects().values()
    got = effects.frame().sort_values(["example", "layer", "head"])
    np.testing.assert_allclose(got["patched"], expected["patched"], rtol=1e-4, atol=1e-6)


def test_every_recipe_has_its_row_its_page_and_its_defaults_once() -> None:
    for recipe in RECIPES.values():
        function = recipe.load()
        assert getattr(interp, recipe.name) is function
        assert (ROOT / "docs" / "how-to" / f"{recipe.verb}.md").exists(), recipe.name
        parameters = inspect.signature(function).parameters
        assert parameters["metric"].default.name == recipe.metric
        for option in recipe.options:
            keyword = option.keyword or option.name
            if recipe.prepare and keyword not in parameters:
                continue  # what the direction is made of
            default = parameters[keyword].default
            assert default in (inspect.Parameter.empty, option.default, None), (recipe.name, keyword)


@pytest.fixture
def folder_of_tiny_model(tmp_path, word_tokenizer):
    """A folder with a tiny model, and a file of the pairs."""
    from interp.doctor.families.text import tiny_hf

    tiny_hf("llama").float().save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"clean": p.clean, "corrupt": p.corrupt, "answer": p.answer, "foil": p.foil} for p in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "m", tmp_path / "pairs.jsonl"
