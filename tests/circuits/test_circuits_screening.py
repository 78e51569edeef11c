"""Attribution patching of sites against TransformerLens and exact effects; the screen labels what it verified."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import zoo
from interp.circuits import attribute_sites, screen
from interp.engine import Cell, CellWrite, Engine
from interp.engine.naive import run_cell
from interp.errors import InterpError, SiteError

PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_transformer_lens(tiny, kind: str) -> None:
    ours, theirs = both(tiny(kind), PAIR)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # norms round to float32 on the way


@pytest.mark.model
def test_equals_transformer_lens_on_the_embedded_model(smollm2) -> None:
    ours, theirs = both(smollm2, interp.tasks.ioi(smollm2, n=1, seed=0)[0])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # float32; the largest are about 1


def both(model: interp.Model, pair: interp.PromptPair) -> tuple[list[float], list[float]]:
    """Attribution of heads and MLPs at every position, and of embeddings: ours and TransformerLens'."""
    from transformer_lens.tools.analysis import attribution_patching as tl

    tokens = [torch.tensor([model.coder.encode(t)]) for t in (pair.clean, pair.corrupt)]
    answer, foil = (model.coder.continuation(w)[0] for w in (pair.answer, pair.foil))
    theirs = tl.attribution_patch(model.bridge, *tokens, lambda x: x[0, -1, answer] - x[0, -1, foil]).node_scores
    sites = model.sites("z", positions="each") | model.sites("mlp_out") | model.sites("embed")
    ours = attribute_sites(model, pair, sites)
    kinds = {"embed": "embed", "z": "attn_head_out", "mlp_out": "mlp_out"}
    assert len(ours) == len(theirs) and ours.provenance["evidence"] == "estimate"
    found, want = [], []
    for row in ours.frame().itertuples():
        layer, head = (None if str(x) == "<NA>" else int(x) for x in (row.layer, row.head))
        found.append(float(row.raw))
        want.append(float(theirs[tl.Node(kinds[row.component], int(row.position), layer, head)]))
    return found, want


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_estimates_are_the_limit_of_the_engines_exact_effects(tiny, kind: str) -> None:
    """A shrinking share of the change, added at a site, moves the metric by that share of the estimate."""
    model = tiny(kind)
    components = ("q", "k", "v", "z", "attn_out", "mlp_out", "resid_pre", "resid_post", "mlp_post")
    sites = [s for c in components for s in model.sites(c, layers=[1], positions="all")][:20]
    table = attribute_sites(model, PAIR, sites, mode="noise").frame()
    runner = Engine(model, "naive")
    base, source = runner.record([model.coder.encode(t) for t in (PAIR.clean, PAIR.corrupt)], components)
    answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))
    n, step = len(base), 1e-3  # transformers' norms round to float32, hence the coarse step and tolerance
    for site, estimate in zip(sites, table["raw"], strict=True):
        change = source.value(site, 0, n) - base.value(site, 0, n)
        cells = [Cell(0, (CellWrite(site, 0, n, e * change, "add"),)) for e in (-step, step)]
        with torch.no_grad():
            ends = [run_cell(model, base, cell) for cell in cells]
        slope = (ends[1] - ends[0]) / (2 * step)
        assert estimate == pytest.approx(float(slope[answer] - slope[foil]), abs=1e-3), str(site)
    assert table["raw"].abs().max() > 0.01


def test_the_screen_says_what_is_exact() -> None:
    known = zoo.one_head()
    pairs = known.pairs(4)
    table = screen(known.model, pairs, known.model.sites("z"), k=3)
    assert table["evidence"].tolist() == ["exact"] * 3 + ["estimate"] * 9
    top = table.iloc[0]
    assert (top["layer"], top["head"]) == (1, 2) and top["exact"] == pytest.approx(20, abs=1e-3)
    assert table["exact"].notna().tolist() == [True] * 3 + [False] * 9
    want = interp.patch(known.model, pairs, "z.L1H2").frame()["raw"].mean()
    assert top["exact"] == pytest.approx(want, abs=1e-4)


def test_bad_input_is_explained(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(SiteError, match="its gradient cannot be read"):
        attribute_sites(model, PAIR, "resid_mid.L1")
    with pytest.raises(InterpError, match="has no gradient"):
        attribute_sites(model, PAIR, metric=interp.metrics.rank)
    with pytest.raises(InterpError, match="k=0"):
        screen(model, PAIR, k=0)
    longer = interp.PromptPair("w1 w2 w3 w4 w5 w6", "w1 w9 w3 w7 w5 w6", "w95", "w96")
    with pytest.raises(InterpError, match="not in every prompt"):
        screen(model, [PAIR, longer], model.sites("resid_pre"))
    spanned = interp.PromptPair(PAIR.clean, PAIR.corrupt, PAIR.answer, PAIR.foil, {"x": (0, 5)})
    with pytest.raises(InterpError, match="named spans"):
        screen(model, spanned, "z.L1H0@x")
