"""Ablation: what each recipe writes, schedules, and what means must rest on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES

import interp
from interp.engine import Engine
from interp.errors import InterpError, PromptError
from interp.sites import Site, Sites

EXACT = {"atol": 1e-9, "rtol": 1e-9}
# one template, two slots with two fillers each: every token has two prompts at its place
TEMPLATE = [f"w{a} w5 w{b} w7" for a in (1, 2) for b in (3, 4)]
PAIRS = [interp.PromptPair(t, "w8 w5 w9 w7", "w95", "w96") for t in TEMPLATE]


def activation(model, text: str, site: Site) -> torch.Tensor:
    run = Engine(model, "naive").record([model.coder.encode(text)], [site.component])[0]
    return run.value(site, 0, len(run))


def logit_diff_with(model, text: str, site: Site, value: torch.Tensor) -> float:
    """A full hooked forward in which the site is set to ``value`` at every position."""
    from interp.model.hooks import hooks

    def write(x, hook):
        x = x.clone()
        if site.head is None:
            x[0] = value
        else:
            x[0, :, site.head] = value
        return x

    with torch.no_grad(), hooks(model, (site.hook_name, write)):
        logits = model.last_logits(torch.tensor([model.coder.encode(text)]))[0]
    answer, foil = (model.coder.continuation(w)[0] for w in ("w95", "w96"))
    return float(logits[answer] - logits[foil])


@pytest.mark.parametrize("site", [Site("z", 1, 2), Site("resid_post", 0), Site("mlp_out", 1)])
def test_means_are_over_what_they_say(tiny, site: Site) -> None:
    model = tiny("llama")
    every = torch.stack([activation(model, t, site) for t in TEMPLATE])  # [prompt, position, width]
    ids = torch.tensor([model.coder.encode(t) for t in TEMPLATE])
    same = (ids[0] == ids).double()  # which prompts have the first one's token at each place
    by_token = torch.einsum("np,npw->pw", same, every) / same.sum(0)[:, None]
    for using, value in (
        ("mean", every.mean((0, 1)).expand_as(every[0])), ("position_mean", every.mean(0)), ("cama", by_token),
        ("zero", torch.zeros_like(every[0])),
    ):  # fmt: skip
        got = interp.ablate(model, PAIRS, site, using=using).frame()["patched"][0]
        assert got == pytest.approx(logit_diff_with(model, TEMPLATE[0], site, value), abs=1e-9), using


def test_cama_keeps_what_the_token_says_and_drops_what_its_context_adds(tiny) -> None:
    """Before anything varies there is no context to take away; after a change, equal tokens come to say the same."""
    model = tiny("llama")
    first = interp.ablate(model, PAIRS, ["resid_post.L1@0", "resid_post.L1@1"], using="cama").frame()
    np.testing.assert_allclose(first["raw"], 0, atol=1e-12)
    last = interp.ablate(model, PAIRS, "resid_post.L2@-1", using="cama").frame()["patched"]
    assert np.ptp(last) < 1e-12 and last[0] != pytest.approx(interp.ablate(model, PAIRS, "z.L0H0").frame()["clean"][0])


def test_cama_of_a_token_plus_a_context_is_the_token_alone() -> None:
    """A planted head adds its context's token to the last position; the conditional mean takes just that away."""
    known = interp.zoo.one_head()
    pairs = known.pairs(8)
    e = interp.ablate(known.model, pairs, "resid_post.L1@-1", using="cama", reference=known.pairs(11, 5)).frame()
    # the last word is always "?": its conditional mean says every marked word of the reference a little
    assert (e["patched"].abs() < 0.2 * e["clean"].abs()).all() and (e["clean"] > 1).all()


def test_means_over_a_reference(tiny) -> None:
    model = tiny("gpt2")
    site = Site("attn_out", 1)
    own = interp.ablate(model, PAIRS, site, using="position_mean").frame()["patched"]
    one = interp.ablate(model, PAIRS[0], site, using="position_mean", reference=TEMPLATE)
    assert one.frame()["patched"][0] == pytest.approx(own[0], abs=1e-9)
    assert one.provenance["n_reference"] == 4 and len(one.provenance["reference"]) > 8
    drawn = interp.ablate(model, PAIRS[0], site, using="resample", reference=[PAIRS[3]]).frame()["patched"][0]
    assert drawn == pytest.approx(
        logit_diff_with(model, TEMPLATE[0], site, activation(model, TEMPLATE[3], site)), abs=1e-9
    )


def test_means_that_would_be_the_activation_itself_are_refused(tiny) -> None:
    model = tiny("llama")
    odd = interp.PromptPair("w1 w5 w33 w7", "w8 w5 w9 w7", "w95", "w96")
    with pytest.raises(PromptError, match="'w33' at that place"):
        interp.ablate(model, [*PAIRS, odd], "resid_post.L1", using="cama")
    interp.ablate(model, [*PAIRS, odd], "resid_post.L1@-1", using="cama")  # that token has its fellows
    longer = interp.PromptPair("w1 w5", "w8 w5", "w95", "w96")
    with pytest.raises(PromptError, match="of the same length"):
        interp.ablate(model, [*PAIRS, longer], "z.L0H0", using="position_mean")
    with pytest.raises(PromptError, match="reference= is empty"):
        interp.ablate(model, PAIRS, "z.L0H0", reference=[])


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("using", ["position_mean", "cama"])
def test_contextual_means_fast_equal_naive(tiny, kind: str, using: str) -> None:
    model = tiny(kind)
    sites = model.sites("z", layers=1) | model.sites("resid_post", layers=[0, 2], positions=[2, -1])
    sites = sites | model.sites("mlp_post", layers=1, heads=[0, 5])
    for schedule in ("each", "cumulative"):
        fast, naive = (
            interp.ablate(model, PAIRS, sites, using=using, schedule=schedule, engine=e).frame()
            for e in ("fast", "naive")
        )
        np.testing.assert_allclose(fast["patched"], naive["patched"], **EXACT)


def test_schedules_are_groups(tiny) -> None:
    model = tiny("llama")
    sites = Sites(["z.L0H1", "mlp_out.L1@-1", "z.L2H3", "mlp_post.L0N3"])
    upto = {f"g{i}": sites[: i + 1] for i in range(len(sites))}
    without = {f"g{i}": [s for s in sites if s != spared] for i, spared in enumerate(sites)}
    for schedule, groups in (("cumulative", upto), ("all but one", without)):
        e = interp.ablate(model, PAIRS, sites, using="mean", schedule=schedule)
        grouped = interp.ablate(model, PAIRS, groups=groups, using="mean").frame()
        np.testing.assert_allclose(e.frame()["patched"], grouped["patched"], **EXACT)
        assert e.frame()["component"].tolist()[:4] == [s.component for s in sites]
        assert e.provenance["schedule"] == schedule and schedule.split()[0] in e.frame()["intervention"][0]
    with pytest.raises(InterpError, match="there is only one"):
        interp.ablate(model, PAIRS, "z.L0H1", schedule="all but one")
    with pytest.raises(InterpError, match="unknown schedule"):
        interp.ablate(model, PAIRS, "z.L0H1", schedule="backwards")


def test_ablating_too_much_at_once_is_refused(tiny, monkeypatch) -> None:
    monkeypatch.setattr("interp.recipes.ablation.MOST_WRITES", 20)
    with pytest.raises(InterpError, match="in groups="):
        interp.ablate(tiny("llama"), PAIRS, tiny("llama").sites("z"), schedule="cumulative")


def test_a_planted_circuit_is_lost_in_order_and_spared_in_turn() -> None:
    known = interp.zoo.one_head()
    model, pairs, truth = known.model, known.pairs(6), next(iter(known.truth))
    order = Sites([*(s for s in model.sites("z", layers=[0, 1]) if s != truth), truth])
    losing = interp.ablate(model, pairs, order, using="zero", schedule="cumulative").summary(by=["layer", "head"])
    losing = losing.set_index(["layer", "head"])["effect"]
    here = (truth.layer, truth.head)
    assert losing[here] == pytest.approx(1, abs=0.05) and losing.drop([here]).abs().max() < 0.05
    spared = interp.ablate(model, pairs, model.sites("z"), using="zero", schedule="all but one")
    spared = spared.summary(by=["layer", "head"]).set_index(["layer", "head"])["effect"]
    assert abs(spared[here]) < 0.05 and (spared.drop([here]) > 0.95).all()
