"""What must be true of every recipe: plans drawn at random, nulls over seeds, ends of the scale, linear models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import interp
from interp import zoo
from interp.sites import Site

SMALL = ("llama", "gpt2", "gemma2")
QUICKLY = settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@st.composite
def pairs_of_lengths(draw) -> list[interp.PromptPair]:
    out = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(3, 8))
        rows = [draw(st.lists(st.integers(0, 90), min_size=n, max_size=n)) for _ in range(2)]
        kept = draw(st.integers(0, n - 1))
        out.append(interp.PromptPair(text(rows[0]), text(rows[0][:kept] + rows[1][kept:]), "w95", "w96"))
    return out


def assert_engines_agree(recipe, **options) -> None:
    """The recipe's table by the packed engine equals that of one full forward per cell."""
    fast, naive = (recipe(engine=e, **options).frame() for e in ("fast", "naive"))
    np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-7)


@pytest.mark.parametrize("kind", SMALL)
@QUICKLY
@given(data=st.data(), pairs=pairs_of_lengths())
def test_random_plans_of_the_other_recipes(tiny, kind: str, data, pairs) -> None:
    model = tiny(kind)
    shortest = min(len(p.clean.split()) for p in pairs) + 1  # with <bos>
    place = st.integers(-shortest + 1, shortest - 1)
    layers = data.draw(st.sets(st.integers(0, 2), min_size=1).map(sorted))
    window = data.draw(st.integers(1, 3))
    key = data.draw(st.integers(1, shortest - 1))
    heads = data.draw(st.one_of(st.none(), st.sets(st.integers(0, 3), min_size=1).map(sorted)))
    cut = {"queries": -1, "layers": layers, "window": window, "heads": heads, "metric": "logit_diff"}
    assert_engines_agree(lambda engine: interp.knock_out(model, pairs, key, engine=engine, **cut))
    position, component = (
        data.draw(st.one_of(st.none(), place)),  # None: all positions together
        data.draw(st.sampled_from(["resid_pre", "resid_post", "attn_out", "mlp_out"])),
    )
    sites = model.sites(component, layers=layers, positions="all" if position is None else [position])
    push = torch.linspace(-1, 1, model.d_model, dtype=torch.float64)
    assert_engines_agree(lambda engine: interp.steer(model, pairs, sites, push, engine=engine))
    sever = data.draw(st.sampled_from([None, "mlp", "attn"]))
    traced = {"layers": layers, "window": window, "sever": sever, "metric": "logit_diff"}
    assert_engines_agree(lambda engine: interp.trace(model, pairs, engine=engine, **traced))
    groups = {"g": list(sites), "h": [Site("z", layers[0], data.draw(st.integers(0, 3)), position)]}
    assert_engines_agree(lambda engine: interp.mediate(model, pairs, groups=groups, engine=engine))
    ablated = {"groups": groups, "using": "mean", "schedule": "cumulative"}
    assert_engines_agree(lambda engine: interp.ablate(model, pairs, engine=engine, **ablated))


NULLS = {
    "groups": lambda m, p: interp.patch(m, p, groups={f"L{i}": m.sites("z", layers=i) for i in range(4)}),
    "neurons": lambda m, p: interp.patch(m, p, m.sites("mlp_post", layers=[1, 2], heads=range(4)), mode="noise"),
    "windows": lambda m, p: interp.patch(m, p, m.sites("mlp_out", positions=[-1]), window=2),
    "sources": lambda m, p: interp.patch(m, p, m.sites("resid_mid", positions=[-1]), sources=[*p[1:], p[0]]),
    "position means": lambda m, p: interp.ablate(m, p, m.sites("attn_out", positions="all"), using="position_mean"),
    "leave one out": lambda m, p: interp.ablate(
        m, p, m.sites("attn_out", positions="all"), using="resample", schedule="all but one"
    ),
    "replacement": lambda m, p: interp.trace(m, p, positions=[-1, -2], sever="mlp", metric="logit_diff"),
    "knock-out": lambda m, p: interp.knock_out(m, p, 3, metric="logit_diff", window=1),
    "peeking": lambda m, p: interp.peek(m, p, full=1, context="keep"),
    "paths": lambda m, p: interp.path_patch(
        m, p, m.sites("z", layers=0, heads=[0, 5]), m.sites("v", layers=2, heads=[1, 2])
    ),
    "paths through MLPs": lambda m, p: interp.path_patch(
        m, p, m.sites("z", layers=0, heads=[0, 5]), m.sites("q", layers=2, heads=[1, 2]), mlps="recomputed"
    ),
    "mediation": lambda m, p: interp.mediate(m, p, m.sites("mlp_out", positions="all")),
    "zeros": lambda m, p: interp.ablate(m, p, m.sites("z", layers=[1, 2]), using="zero"),
    "steering": lambda m, p: interp.steer(
        m, p, m.sites("resid_post", positions=[-1]), torch.linspace(-1, 1, m.d_model)
    ),
}

# In a mediation all rows of a model go together, since its total effect stands in each, and elsewhere most do: more
# models.
SEEDS = {"mediation": 24, "replacement": 24, "steering": 24}


@pytest.mark.parametrize("recipe", NULLS)
def test_where_there_is_nothing_intervals_cover_zero_at_their_rate(recipe: str) -> None:
    """Random weights, and answers that were drawn apart from the prompts: the mean raw change has expectation zero."""
    missed = asked = 0
    for seed in range(SEEDS.get(recipe, 8)):
        known = zoo.random(seed)
        table = NULLS[recipe](known.model, known.pairs(20, seed)).summary(n_boot=500)
        table = table[table["raw"] != 0]
        missed += int(((table["raw_lo"] > 0) | (table["raw_hi"] < 0)).sum())
        asked += len(table)
    # 5% nominal, some more of bootstrap intervals over 20 examples; effects of one model go together
    assert asked >= 16 and missed <= 0.17 * asked, (missed, asked)


@pytest.mark.model
def test_answers_of_other_pairs_are_not_carried_by_any_head(smollm2) -> None:
    """Shuffled pairs: another pair's names for answer and foil, either way round. The true ones are carried."""
    pairs = list(interp.tasks.ioi(smollm2, n=24, seed=3))
    rng = random.Random(0)
    shifted = [*pairs[7:], *pairs[:7]]
    shuffled = []
    for pair, other in zip(pairs, shifted, strict=True):
        words = [other.answer, other.foil]
        if words[0] in pair.clean or words[1] in pair.clean:
            continue
        rng.shuffle(words)
        shuffled.append(interp.PromptPair(pair.clean, pair.corrupt, *words))
    assert len(shuffled) >= 12
    sites = smollm2.sites("resid_pre", layers=[6, 14, 18, 22, 26], positions=[-1]) | smollm2.sites("z", layers=23)
    by = ["component", "layer", "head"]  # the last position has another number in each length
    table = interp.patch(smollm2, shuffled, sites).summary(by)
    missed = ((table["raw_lo"] > 0) | (table["raw_hi"] < 0)).sum()
    assert missed <= 3 and len(table) == 14
    true = interp.patch(smollm2, pairs[: len(shuffled)], sites).summary(by)
    assert ((true["raw_lo"] > 0) | (true["raw_hi"] < 0)).sum() > 6


@pytest.fixture(scope="module")
def linear() -> interp.Model:
    """Attention without norms or MLPs whose queries are zero: uniform patterns, so that logits are linear in all."""
    from interp.model.native import plain_module
    from interp.zoo.known import WORDS
    from interp.zoo.planted import word_level_bridge
    from interp.zoo.tokenizer import SPECIALS

    config = {
        "d_model": 16, "d_head": 4, "n_heads": 4, "n_layers": 3, "n_ctx": 32, "d_vocab": len(SPECIALS) + len(WORDS),
        "attn_only": True, "normalization_type": None, "positional_embedding_type": "standard", "seed": 0,
    }  # fmt: skip
    bridge = word_level_bridge("linear", config, WORDS, torch.float64)
    with torch.no_grad():
        for layer in bridge.original_model.layers:  # type: ignore[union-attr]
            query = plain_module(plain_module(layer.attn).q)
            query.weight.zero_()
            query.bias.zero_()
    return interp.load(bridge)


def test_in_a_linear_model_what_noising_takes_denoising_gives(linear) -> None:
    """On one scale (0 = corrupt, 1 = clean) noising leaves 1 − what denoising restores, and parts add up to 1."""
    from interp.zoo.known import WORDS

    pair = interp.PromptPair(
        " ".join(WORDS[:6]), " ".join([*WORDS[:2], *WORDS[8:12]]), f" {WORDS[20]}", f" {WORDS[21]}"
    )
    sites = linear.sites("z") | linear.sites("resid_pre", positions=[3, -1]) | linear.sites("v", layers=1)
    restored = interp.patch(linear, pair, sites).frame()["effect"]
    noised = interp.patch(linear, pair, sites, mode="noise").frame()
    left = (noised["patched"] - noised["corrupt"]) / (noised["clean"] - noised["corrupt"])
    np.testing.assert_allclose(restored, 1 - left, atol=1e-9)
    swapped = interp.PromptPair(pair.corrupt, pair.clean, pair.answer, pair.foil)
    np.testing.assert_allclose(interp.patch(linear, swapped, sites).frame()["effect"], noised["effect"], atol=1e-9)
    assert restored.abs().max() > 0.01
    parts = interp.patch(linear, pair, linear.sites("resid_pre", layers=1)).frame()["effect"].sum()
    assert parts == pytest.approx(1, abs=1e-9)
    mediated = interp.mediate(linear, pair, sites).frame()
    crossed = mediated[mediated["intervention"] == "interaction"]["raw"]
    np.testing.assert_allclose(crossed, 0, atol=1e-9)


@pytest.mark.parametrize("kind", SMALL)
def test_ends_of_the_scale(tiny, kind: str) -> None:
    """Everything is 1 and nothing 0, exactly, however it is asked."""
    model = tiny(kind)
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96").span("changed", "w2 w3 w4")
    final, nothing = Site("resid_post", model.n_layers - 1, position=None), "resid_pre.L0@1"
    for mode in ("denoise", "noise"):
        e = interp.patch(model, pair, ["resid_pre.L0@changed", nothing], mode=mode).frame()["effect"]
        assert e[0] == pytest.approx(1, abs=1e-12) and e[1] == 0
    e = interp.path_patch(model, pair, "z.L0H0@1", "logits").frame()
    assert e["raw"][0] == 0
    traced = interp.trace(model, pair, layers=0, positions=["changed", 0], metric="logit_diff").frame()["effect"]
    assert traced[0] == pytest.approx(1, abs=1e-12) and traced[1] == 0
    mediated = interp.mediate(model, pair, groups={"all": [final]}).frame().set_index("intervention")["effect"]
    assert mediated["natural indirect effect"] == pytest.approx(1, abs=1e-12)
    assert mediated["natural direct effect"] == pytest.approx(0, abs=1e-12)
    own = interp.patch(
        model, pair, model.sites("z"), sources=[interp.PromptPair(pair.corrupt, pair.corrupt, "w1", "w2")]
    )
    assert (own.frame()["raw"] == 0).all()


@pytest.mark.parametrize("kind", SMALL)
def test_to_do_nothing_changes_nothing(tiny, kind: str) -> None:
    """Every other way to ask for nothing gives 0, to the bit where nothing is written."""
    model = tiny(kind)
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96").span("two", "w2 w3")
    exactly = {
        "a full peek to the end, after the last layer": interp.peek(model, pair, -1, context="keep"),
        "a path from where the prompts are the same": interp.path_patch(model, pair, ["z.L0H0@1", "mlp_out.L1@0"]),
        "the same prompt as source": interp.patch(
            model, pair, model.sites("v"), mode="noise", sources=interp.PromptPair(pair.clean, pair.clean, "w1", "w2")
        ),
    }
    for what, effects in exactly.items():
        assert (effects.frame()["raw"] == 0).all(), what
    nearly = {
        "keys that the query cannot read": interp.knock_out(model, pair, -1, 1, metric="logit_diff"),
        "a direction of length 0": interp.steer(model, pair, model.sites("z"), torch.zeros(8), 3.0),
        "its own activations": interp.ablate(model, pair, model.sites("z"), using="resample", reference=[pair]),
        "the same words in their place": interp.leave_out(model, pair, instead={"two": " w2 w3"}),
    }
    for what, effects in nearly.items():
        assert effects.frame()["raw"].abs().max() < 1e-9, what  # float64; values are written, or lengths packed anew
    corrupted = interp.ablate(model, pair, "resid_pre.L0", using="resample", reference=[pair.corrupt]).frame()
    assert corrupted["effect"][0] == pytest.approx(1, abs=1e-9)


def test_everything_is_exactly_one_in_single_precision(word_tokenizer) -> None:
    """What carries all over is the other run, and is answered by it: no rounding stands in between."""
    from interp.doctor.families.text import tiny_hf

    model = interp.load(tiny_hf("llama", torch.float32), tokenizer=word_tokenizer)
    pairs = [interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96").span("end", "w2 w3 w4"),
             interp.PromptPair("w7 w8 w9", "w7 w8 w1", "w95", "w96").span("end", "w9")]  # fmt: skip
    sites = [
        s for c in ("resid_pre", "resid_mid", "resid_post") for p in ("all", "end") for s in model.sites(c, positions=p)
    ]
    for mode in ("denoise", "noise"):
        e = interp.patch(model, pairs, sites, mode=mode).frame()
        assert (e["effect"] == 1).all() and len(e) == 2 * len(sites)
        slow = interp.patch(model, pairs, sites, mode=mode, engine="naive").frame()
        np.testing.assert_allclose(e["patched"], slow["patched"], atol=1e-4)
    crossed = interp.patch(model, pairs[0], sites, sources=interp.PromptPair("w9 w9 w2 w4", "w3 w4 w5 w5", "w1", "w2"))
    slow = interp.patch(model, pairs[0], sites, engine="naive",
                        sources=interp.PromptPair("w9 w9 w2 w4", "w3 w4 w5 w5", "w1", "w2"))  # fmt: skip
    np.testing.assert_allclose(crossed.frame()["patched"], slow.frame()["patched"], atol=1e-4)
