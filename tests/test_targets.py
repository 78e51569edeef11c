"""Windows of layers, groups of sites, neurons, sources from other pairs: what patching changes together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import interp
from interp.errors import InterpError, PromptError, SiteError
from interp.model.hooks import hooks
from interp.recipes.targets import targets_of, window_layers
from interp.sites import Site

PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")
OTHER = interp.PromptPair("w11 w2 w13 w4 w5", "w1 w9 w3 w7 w15", "w93", "w96")
EXACT = {"atol": 1e-9, "rtol": 1e-9}
QUICKLY = settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def one_site(draw) -> Site:
    component = draw(
        st.sampled_from(["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post"])
    )
    n = {"q": 4, "z": 4, "k": 2, "v": 2, "mlp_post": 48}.get(component)
    where = draw(st.sampled_from([None, 0, -1, "name", "name:last"]))
    return Site(component, draw(st.integers(0, 2)), None if n is None else draw(st.integers(0, n - 1)), where)


@st.composite
def plans(draw):
    """Pairs of several lengths with a span, groups of random sites, and sources of equal length."""
    pairs, sources = [], []
    for _ in range(draw(st.integers(1, 2))):
        n = draw(st.integers(2, 9))
        rows = [draw(st.lists(st.integers(0, 90), min_size=n, max_size=n)) for _ in range(4)]
        if draw(st.booleans()):
            rows[1] = [*rows[0][:-1], rows[1][-1]]  # differing late
        texts = [" ".join(f"w{i}" for i in row) for row in rows]
        pair = interp.PromptPair(texts[0], texts[1], "w95", "w96")
        pairs.append(pair.span("name", " ".join(texts[0].split()[:2])))
        sources.append(interp.PromptPair(texts[2], texts[3], "w95", "w96"))
    groups = {f"g{i}": draw(st.lists(one_site(), min_size=1, max_size=4)) for i in range(draw(st.integers(1, 3)))}
    return pairs, groups, sources if draw(st.booleans()) else None


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["denoise", "noise"])
@QUICKLY
@given(plan=plans())
def test_groups_fast_equal_naive(tiny, kind: str, mode: str, plan) -> None:
    model, (pairs, groups, sources) = tiny(kind), plan
    known = model.bridge.hook_dict
    groups = {name: kept for name, g in groups.items() if (kept := [s for s in g if s.hook_name in known])}
    if not groups:
        return
    fast, naive = (
        interp.patch(model, pairs, groups=groups, mode=mode, sources=sources, engine=e).frame()
        for e in ("fast", "naive")
    )
    np.testing.assert_allclose(fast["patched"], naive["patched"], **EXACT)
    assert set(fast["component"]) == set(groups)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_window_is_its_layers_together(tiny, kind: str) -> None:
    model = tiny(kind)
    sites = model.sites("mlp_out", positions=[2, -1])
    wide = interp.patch(model, PAIR, sites, window=2).frame()
    groups = {
        str(s): [Site("mlp_out", i, position=s.position) for i in window_layers(s.layer or 0, 2, model.n_layers)]
        for s in sites
    }
    grouped = interp.patch(model, PAIR, groups=groups).frame()
    np.testing.assert_allclose(wide["patched"], grouped["patched"], **EXACT)
    assert set(wide["intervention"]) == {"patch, window of 2 layers"} and wide["layer"].tolist() == [0, 0, 1, 1, 2, 2]
    each = interp.patch(model, PAIR, model.sites("mlp_out"), window=3, engine="naive").frame()
    assert len(each) == 3 * 6 and (each["raw"].abs() > 1e-4).any()


def test_all_heads_are_attn_out_and_all_neurons_are_mlp_out(tiny) -> None:
    model = tiny("gpt2")
    groups = {"heads": model.sites("z", layers=1), "neurons": model.sites("mlp_post", layers=1)}
    together = interp.patch(model, PAIR, groups=groups).frame().set_index("component")
    assert together.loc["heads", "layer"] == 1 and together["head"].isna().all()
    for name, component in (("heads", "attn_out"), ("neurons", "mlp_out")):
        whole = interp.patch(model, PAIR, Site(component, 1)).frame()
        assert together.loc[name, "patched"] == pytest.approx(whole["patched"][0], abs=1e-9)


def test_a_neuron_is_one_number_of_the_hook(tiny) -> None:
    model = tiny("llama")
    site = Site.parse("mlp_post.L1N7@-1")
    got = interp.patch(model, PAIR, site, mode="noise").frame()
    ids = [torch.tensor([model.coder.encode(t)]) for t in (PAIR.clean, PAIR.corrupt)]
    seen = {}
    with torch.no_grad():
        with hooks(model, (site.hook_name, lambda x, hook: seen.update(x=x.clone()))):
            model.last_logits(ids[1])

        def write(x, hook):
            x = x.clone()
            x[0, -1, 7] = seen["x"][0, -1, 7]
            return x

        with hooks(model, (site.hook_name, write)):
            logits = model.last_logits(ids[0])[0]
    answer, foil = (model.coder.continuation(w)[0] for w in ("w95", "w96"))
    assert got["patched"][0] == pytest.approx(float(logits[answer] - logits[foil]), abs=1e-9)
    assert got["head"][0] == 7 and abs(got["raw"][0]) > 1e-9
    assert model.n_neurons == 48 and len(model.sites("mlp_post", layers=[0, 1])) == 96


def test_neurons_that_do_not_exist_are_refused(tiny) -> None:
    with pytest.raises(SiteError, match="neurons 0 to 47"):
        interp.patch(tiny("llama"), PAIR, "mlp_post.L0N48")
    with pytest.raises(SiteError, match="no neurons"):
        tiny("mixtral").sites("mlp_post")
    with pytest.raises(SiteError, match="N that of a neuron"):
        Site.parse("mlp_post.L0H3")
    with pytest.raises(SiteError, match="needs a neuron"):
        Site("mlp_post", 0)


def test_span_ends(tiny) -> None:
    model = tiny("llama")
    pair = PAIR.span("name", "w3 w4")
    named = interp.patch(model, pair, ["resid_pre.L1@name:first", "resid_pre.L1@name:last"]).frame()
    plain = interp.patch(model, pair, ["resid_pre.L1@3", "resid_pre.L1@4"]).frame()
    np.testing.assert_allclose(named["patched"], plain["patched"], **EXACT)
    assert named["role"].tolist() == ["name:first", "name:last"]
    with pytest.raises(PromptError, match="names the span 'verb:last'"):
        interp.patch(model, pair, "resid_pre.L1@verb:last")


def test_sources_are_another_pair(tiny) -> None:
    """Interchange: everything from another pair's run makes this run the other's; from its own pair, nothing is new."""
    model = tiny("gpt2")
    whole = interp.patch(model, PAIR, Site("resid_pre", 1), sources=[OTHER], mode="noise").frame()
    swapped = interp.PromptPair(OTHER.corrupt, PAIR.corrupt, "w95", "w96")
    want = interp.patch(model, swapped, Site("resid_pre", 0, position=0)).frame()["clean"][0]
    assert whole["patched"][0] == pytest.approx(want, abs=1e-9) and whole["effect"][0] != pytest.approx(1)
    own = interp.patch(model, PAIR, model.sites("z"), sources=[PAIR]).frame()
    np.testing.assert_allclose(own["patched"], interp.patch(model, PAIR, model.sites("z")).frame()["patched"], **EXACT)
    with pytest.raises(PromptError, match="sources of the same length"):
        interp.patch(model, PAIR, "z.L0H0", sources=[interp.PromptPair("w1", "w2", "w3", "w4")])
    with pytest.raises(PromptError, match="one for each"):
        interp.patch(model, PAIR, "z.L0H0", sources=[PAIR, OTHER])


def test_groups_and_windows_teach(tiny) -> None:
    for options, words in (
        ({"sites": None, "groups": None, "window": 1}, "nothing to sweep"),
        ({"sites": ["z.L0H0"], "groups": None, "window": 3}, "do not correspond"),
        ({"sites": ["mlp_out.L0"], "groups": None, "window": 0}, "at least 1 layer"),
        ({"sites": None, "groups": {"a": []}, "window": 1}, "has no sites"),
        ({"sites": None, "groups": {"z": ["z.L0H0"]}, "window": 1}, "are called 'z'"),
        ({"sites": None, "groups": [["z.L0H0"], ["z.L0H0"]], "window": 1}, "are called 'z.L0H0'"),
        ({"sites": None, "groups": [], "window": 1}, "is empty"),
    ):
        with pytest.raises(InterpError, match=words):
            targets_of(model=tiny("llama"), **options)


def test_everything_is_one_and_nothing_zero_in_groups(tiny) -> None:
    model = tiny("neox")
    groups = {"all": model.sites("resid_pre", layers=0, positions="all"), "none": ["resid_pre.L0@0", "z.L1H0@0"]}
    for mode in ("denoise", "noise"):
        e = interp.patch(model, PAIR, groups=groups, mode=mode).frame().set_index("component")["effect"]
        assert e["all"] == pytest.approx(1, abs=1e-12) and e["none"] == 0


def test_groups_find_a_planted_circuit() -> None:
    known = interp.zoo.induction()
    model, truth = known.model, list(known.truth)
    rest = [s for s in model.sites("z") if s not in truth]
    groups = {"circuit": truth, "rest": rest}
    by = interp.patch(model, known.pairs(6), groups=groups).summary().set_index("component")["effect"]
    assert by["circuit"] == pytest.approx(1, abs=1e-4) and by["rest"] == pytest.approx(0, abs=1e-4)
