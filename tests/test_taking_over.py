"""A patch of the first rows that differ is answered from the run that its values come from: fewer rows to run."""

from __future__ import annotations

import numpy as np
import pytest

import interp
from interp.engine import Cell, Engine
from interp.recipes.patching import STREAM

# The pair first differs at token 3 (the first one marks the beginning), and at 5 again.
SPANS = {"both": (6, 14), "front": (3, 11)}  # by character: tokens 3 to 5, and 2 to 4
PAIR = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w1 w2 w8 w4 w9 w6 w7", "w95", "w96", SPANS)
OTHER = interp.PromptPair("w1 w2 w10 w4 w5 w6 w7", "w1 w11 w8 w4 w9 w6 w7", "w95", "w96")
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def patched(model: interp.Model, engine: str, **options) -> np.ndarray:
    return interp.patch(model, PAIR, engine=engine, **options).frame()["patched"].to_numpy()


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("component", STREAM)
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 3}, {"sources": OTHER}], ids=str)
def test_every_place_equals_naive(tiny, component: str, mode: str, options: dict) -> None:
    model = tiny("llama")
    sites = [*model.sites(component, positions="each")]
    sites += [site for at in (None, "both", "front") for site in model.sites(component, positions=at)]
    fast, naive = (patched(model, engine, sites=sites, mode=mode, **options) for engine in ("fast", "naive"))
    np.testing.assert_allclose(fast, naive, **EXACT)


@pytest.mark.parametrize(
    "group",
    [
        ["resid_pre.L1@3", "resid_post.L1@3"],  # the second finds what it would set
        ["resid_pre.L1@3", "resid_mid.L2@2"],
        ["resid_post.L1@3", "resid_pre.L1@both"],
        ["resid_pre.L1@3", "resid_mid.L1@both"],  # the second reaches further
        ["z.L0H1@3", "resid_pre.L1@3"],
        ["resid_pre.L1@3", "z.L2H1@3"],
        ["resid_pre.L1@3", "resid_pre.L1@6"],
    ],
    ids=" ".join,
)
def test_groups_equal_naive(tiny, group: list[str]) -> None:
    model = tiny("llama")
    fast, naive = (patched(model, engine, groups={"group": group}) for engine in ("fast", "naive"))
    np.testing.assert_allclose(fast, naive, **EXACT)


def test_fewer_rows_are_run(tiny, monkeypatch) -> None:
    seen: list[Cell] = []
    score = Engine.score

    def watched(self, runs, cells, *rest, **options):
        seen.extend(cells)
        return score(self, runs, cells, *rest, **options)

    monkeypatch.setattr(Engine, "score", watched)
    patched(tiny("llama"), "fast", sites=["resid_pre.L1@3", "resid_pre.L1@both", "resid_pre.L1@5"])
    assert [(cell.run, cell.first_row) for cell in seen] == [(1, 4), (1, 6), (0, 5)]  # run 1 is the clean one


def test_the_only_token_that_differs_carries_everything(tiny) -> None:
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w2 w8 w4 w5", "w95", "w96")
    effects = interp.patch(model, pair, ["resid_pre.L0@3", "resid_pre.L0@4"], engine="fast").frame()["effect"]
    assert effects.tolist() == [1.0, 0.0]  # exactly
