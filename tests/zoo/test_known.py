"""The hand-set models do what their docstrings say, checked by plain hooks and in closed form."""

from __future__ import annotations

import math
import time

import pytest
import torch
from naive_hooks import ablate, heads, patch, run, scores

from interp import zoo
from interp.errors import TaskError
from interp.zoo.planted import LOGIT, MATCH, SINK

PLANTED = {"induction": [(0, 1), (1, 2)], "one_head": [(1, 2)]}


@pytest.fixture(scope="module", params=["induction", "one_head"])
def known(request):
    return getattr(zoo, request.param)()


def test_truth_names_the_planted_heads():
    for name, cells in PLANTED.items():
        truth = [(s.component, s.layer, s.head) for s in getattr(zoo, name)().truth]
        assert truth == [("z", *cell) for cell in cells]
    assert len(zoo.random().truth) == 0


@pytest.mark.parametrize("name", ["induction", "one_head", "random"])
def test_is_built_in_under_a_second(name):
    getattr(zoo, name)()  # imports
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        getattr(zoo, name)()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1  # the best of three: other processes may want the same cores


@pytest.mark.parametrize("name", ["induction", "one_head", "random"])
def test_same_weights_and_pairs_every_time_and_global_seed_untouched(name):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b = getattr(zoo, name)(), getattr(zoo, name)()
    assert torch.equal(before, torch.random.get_rng_state())
    for x, y in zip(a.bridge.original_model.parameters(), b.bridge.original_model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert list(a.pairs(8, 3)) == list(b.pairs(8, 3)) != list(a.pairs(8, 4))


def test_random_models_differ_by_seed():
    a, b = (zoo.random(seed).bridge.original_model.state_dict() for seed in (0, 1))
    assert not all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("name", ["induction", "one_head"])
def test_attention_and_logits_in_closed_form(name):
    known = getattr(zoo, name)(dtype=torch.float64)
    for pair in known.pairs(6, seed=1):
        ids, cache = run(known.bridge, [pair.clean])
        assert cache["blocks.0.attn.hook_pattern"].dtype == torch.float64
        for site, keys in known.attends(pair).items():
            pattern = cache[f"blocks.{site.layer}.attn.hook_pattern"][0, site.head]
            assert len(keys) == ids.shape[1]
            assert min(pattern[i, k] for i, k in enumerate(keys)) > 0.999
            # The last query of a copying head: one match at MATCH, <bos> at SINK, everything else at 0.
            if site in (zoo.known.INDUCTION, zoo.known.COPY):
                n_other = ids.shape[1] - 2
                odds = 1 + math.exp(SINK - MATCH) + n_other * math.exp(-MATCH)
                assert pattern[-1, keys[-1]].item() == pytest.approx(1 / odds, abs=1e-14)
        with torch.no_grad():
            logits = known.bridge(ids)[0, -1]
        answer = known.bridge.tokenizer(pair.answer, add_special_tokens=False)["input_ids"][0]
        assert logits[answer].item() == pytest.approx(LOGIT, abs=1e-9)
        assert logits.abs().sum().item() == pytest.approx(LOGIT, abs=1e-9)  # every other logit is 0
        assert scores(known.bridge, known.bridge.to_tokens(pair.corrupt), [pair]).abs() < 1e-9


def test_other_heads_are_busy(known):
    """Inert means ignored, not zero: otherwise finding the planted heads would be no test."""
    _, cache = run(known.bridge, [known.pairs(1)[0].clean])
    for layer, head in heads(known.bridge):
        if (layer, head) not in PLANTED[known.name]:
            assert cache[f"blocks.{layer}.attn.hook_z"][0, :, head].norm(dim=-1).min() > 0.1
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, -1]
            assert pattern.max() < 0.99


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_patching_heads_finds_the_planted_ones(known, mode):
    effects = {cell: e for cell, (e, _) in patch(known.bridge, known.pairs(8, seed=2), mode).items()}
    for cell, values in effects.items():
        assert (values - float(cell in PLANTED[known.name])).abs().max() < 1e-3


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("component", ["resid_pre", "resid_post"])
def test_patching_the_residual_stream_finds_the_path(known, mode, component):
    pairs = known.pairs(8, seed=3)
    truth = [{(s.layer, s.position) for s in known.truth_resid(p) if s.component == component} for p in pairs]
    assert all(len(t) == known.bridge.cfg.n_layers for t in truth)
    for cell, (values, _) in patch(known.bridge, pairs, mode, component).items():
        expected = torch.tensor([float(cell in t) for t in truth])
        assert (values - expected).abs().max() < 1e-3


@pytest.mark.parametrize("source", ["clean", "corrupt"])
@pytest.mark.parametrize("recipe", [
    {"using": "zero"},
    {"using": "mean", "pool": "position"},
    {"using": "mean", "pool": "all"},
    {"using": "resample", "shift": 1},
    {"using": "resample", "shift": 3},
])  # fmt: skip
@pytest.mark.parametrize("n", [2, 7])
def test_ablation_finds_the_planted_heads(known, recipe, source, n):
    effects = ablate(known.bridge, known.pairs(n, seed=4), source=source, **recipe)
    copying = PLANTED[known.name][-1]
    # The one exception (see the module's docstring): the next pair's answer is this pair's foil.
    brings_foil = recipe["using"] == "resample" and source == "clean" and recipe["shift"] % n == 1
    for cell, values in effects.items():
        expected = 0 if cell not in PLANTED[known.name] else 2 if cell == copying and brings_foil else 1
        assert (values - expected).abs().max() < 1e-3


def test_resampling_from_any_other_pair_of_a_full_set_never_restores_the_answer():
    """The combinatorial promise behind the exact ablations, for the largest set, without running a model."""
    for seed in range(3):
        pairs = list(zoo.induction().pairs(zoo.known.MAX_PAIRS, seed))
        words = [p.clean.split() for p in pairs]
        assert len({p.answer for p in pairs}) == len(pairs)
        for i, own in enumerate(words):
            for j, other in enumerate(words):
                if i != j:  # where the induction head would look, seeing the other prompt's previous tokens
                    found = [own[k + 1] for k in range(8) if other[k] == own[-1]]
                    assert not {pairs[i].answer.strip(), pairs[i].foil.strip()} & set(found)


def test_spans_say_where_things_are():
    for pair in zoo.induction().pairs(20, seed=5):
        text = {name: pair.clean[a:b] for name, (a, b) in pair.spans.items()}
        assert text["A1"] == text["A2"] == pair.clean.split()[-1]
        assert f" {text['B1']}" == pair.answer
    for pair in zoo.one_head().pairs(20, seed=5):
        a, b = pair.spans["marked"]
        assert f" {pair.clean[a:b]}" == pair.answer and pair.clean[slice(*pair.spans["END"])] == "?"


def test_facts_are_the_clean_prompts_with_the_corrupted_word_as_subject():
    for known in (zoo.induction(), zoo.one_head(), zoo.random()):
        for fact, pair in zip(known.facts(5, 1), known.pairs(5, 1), strict=True):
            a, b = fact.subject_span
            assert (fact.prompt, fact.subject) == (pair.clean, pair.clean[a:b])
            assert pair.clean[:a] == pair.corrupt[:a] and pair.clean[a:b] != pair.corrupt[a:b]


def test_refuses_sets_it_cannot_make():
    with pytest.raises(TaskError, match="at most 72"):
        zoo.induction().pairs(73)
    with pytest.raises(TaskError, match="n=0"):
        zoo.random().pairs(0)


@pytest.mark.parametrize("seed", range(3))
def test_null_control_covers_zero_on_the_raw_scale(seed):
    """95% intervals of 32 heads' mean raw effects cover zero: 1.6 miss on average, 7 with p < 0.001."""
    known = zoo.random(seed)
    cells = patch(known.bridge, known.pairs(64, seed), "denoise")
    raw = torch.stack([raw for _, raw in cells.values()])
    half = 2.0 * raw.std(1) / math.sqrt(raw.shape[1])
    assert raw.abs().mean() > 1e-3  # heads do have effects, example by example
    assert (raw.mean(1).abs() > half).sum() < 7
