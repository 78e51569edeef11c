"""Every recipe of the toolkit finds exactly what was planted, and nothing in a random model."""

from __future__ import annotations

import pytest

import interp
from interp import zoo


@pytest.fixture(scope="module", params=["induction", "one_head"])
def known(request):
    return getattr(zoo, request.param)()


def finds(summary, truth):
    for row in summary.itertuples():
        planted = (row.layer, row.head) in truth
        assert row.effect >= 0.95 if planted else abs(row.effect) <= 0.05, row


@pytest.mark.parametrize("recipe", [
    lambda m, p, s: interp.patch(m, p, s, metric=interp.logit_diff, mode="denoise"),
    lambda m, p, s: interp.patch(m, p, s, metric=interp.logit_diff, mode="noise"),
    lambda m, p, s: interp.ablate(m, p, s, metric=interp.logit_diff, using="zero"),
    lambda m, p, s: interp.ablate(m, p, s, metric=interp.logit_diff, using="mean"),
    lambda m, p, s: interp.ablate(m, p, s, metric=interp.logit_diff, using="resample"),
], ids=["denoise", "noise", "zero", "mean", "resample"])  # fmt: skip
def test_head_recipes(known, recipe):
    effects = recipe(known.model, known.pairs(8, 0), known.model.sites("z"))
    finds(effects.summary(by=["layer", "head"]), {(s.layer, s.head) for s in known.truth})


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_residual_patching(known, mode):
    pairs = known.pairs(6, 1)
    table = interp.patch(known.model, pairs, known.model.sites("resid_pre"), metric="logit_diff", mode=mode).frame()
    for i, pair in enumerate(pairs):
        truth = {(s.layer, s.position) for s in known.truth_resid(pair) if s.component == "resid_pre"}
        for row in table[table["example"] == i].itertuples():
            planted = (row.layer, row.position) in truth
            assert row.effect >= 0.95 if planted else abs(row.effect) <= 0.05, row


def test_causal_tracing_goes_from_the_subject_to_the_last_token(known):
    """Pooled over facts: in the first layer only earlier positions restore the answer, in the last only the end."""
    table = interp.trace(known.model, known.facts(12)).frame().query("component == 'resid_post'")
    at_end = table["position"] == table.groupby("example")["position"].transform("max")
    for layer, carries in ((0, ~at_end), (known.bridge.cfg.n_layers - 1, at_end)):
        rows = table[table["layer"] == layer]
        first = rows.drop_duplicates("example")
        gap = (first["clean"] - first["corrupt"]).sum()
        assert rows[carries[rows.index]]["raw"].sum() / gap == pytest.approx(1, abs=0.05)
        assert rows[~carries[rows.index]]["raw"].abs().sum() / gap < 0.05


@pytest.mark.parametrize("seed", range(2))
def test_null_control(seed):
    known = zoo.random(seed)
    effects = interp.patch(known.model, known.pairs(64, seed), known.model.sites("z"), metric=interp.logit_diff)
    summary = effects.summary()
    missed = ~((summary["raw_lo"] <= 0) & (summary["raw_hi"] >= 0))
    assert missed.sum() < 7  # of 32 intervals at 95%: 1.6 expected, 7 has p < 0.001
