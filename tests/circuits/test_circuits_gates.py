"""Learned head gates against scaled z, finite differences, and models whose heads are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import zoo
from interp.circuits import Circuit, HeadGates, causal_head_gating, contrastive_head_gating
from interp.circuits.fitting import shuffled_batches
from interp.circuits.learned.causal_gating import _GateFit, _losses
from interp.circuits.learned.gated_model import GatedModel
from interp.circuits.learned.head_gates import HELD
from interp.circuits.learned.next_token import Unembedding, permuted, samples
from interp.errors import InterpError, ModelError, PromptError
from interp.model.hooks import hooks
from interp.model.native import plain_module
from interp.sites import Site

TEXTS = ["w1 w2 w3 w4 w5", "w7 w8 w9", "w2 w4 w6 w8 w1"]
SLOW = {"lr": 0.25, "lr_end": 0.02, "start": (0.9, 0.98), "batch_size": 4}  # for saturated heads: see gates.py


def plain(model, sample, gates) -> torch.Tensor:
    """Mean log-probability of the targets by full logits, heads' z multiplied by hooks."""

    def scale(layer):
        return lambda z, hook: z * gates[layer][:, None]

    names = [(f"blocks.{i}.attn.hook_z", scale(i)) for i in range(model.n_layers)]
    with hooks(model, *names):
        logits = model.bridge(torch.tensor([sample.ids])).double()[0]
    chosen = logits.log_softmax(-1)[list(sample.positions)]
    return chosen.gather(-1, torch.tensor(sample.targets)[:, None]).mean()


@pytest.mark.parametrize("kind", ["llama", "neox", "mistral", "gemma2", "mixtral"])
def test_gated_log_probs_and_gradients_equal_scaled_z(tiny, kind: str, monkeypatch) -> None:
    """Grouped queries; parallel blocks; a window; norms behind attention and soft caps; experts."""
    monkeypatch.setattr("interp.circuits.learned.next_token.LOGIT_BYTES", 1)  # a position at a time
    model = tiny(kind)
    data = samples(TEXTS, model)
    gates = torch.rand(2, model.n_layers, model.n_heads, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    ours, theirs = (gates.clone().requires_grad_() for _ in range(2))
    tolerance = 1e-6 if model.dtype == torch.float64 else 1e-4
    got, want = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    with torch.enable_grad():
        for rows, found in GatedModel(model).log_probs(data, ours):
            got[:, rows] = found.double()
        for i, sample in enumerate(data):
            want[:, i] = torch.stack([plain(model, sample, g) for g in theirs])
        weights = torch.arange(1, 7).reshape(2, 3)
        a, b = (torch.autograd.grad((x * weights).sum(), y)[0] for x, y in ((got, ours), (want, theirs)))
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_equal_finite_differences(tiny, kind: str) -> None:
    model = tiny(kind)
    gated, data = GatedModel(model), samples(TEXTS[:2], model)
    gates = torch.full((1, model.n_layers, model.n_heads), 0.7, dtype=torch.float64)

    def total(g):
        return torch.stack([found.sum() for _, found in gated.log_probs(data, g)]).sum()

    with torch.enable_grad():
        leaf = gates.clone().requires_grad_()
        grad = torch.autograd.grad(total(leaf), leaf)[0]
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        step = torch.zeros_like(gates)
        step[0, layer, head] = 1e-3
        with torch.no_grad():
            slope = float((total(gates + step) - total(gates - step)) / 2e-3)
        # transformers' norms round to float32, hence the coarse step and tolerance
        assert slope == pytest.approx(float(grad[0, layer, head]), abs=2e-3)


def test_a_batch_in_parts_moves_gates_as_one_does(tiny, monkeypatch) -> None:
    """Lengths differ, and only some prompts fit through the model together."""
    model, moved = tiny("llama"), []
    for tokens in (4096, 6):
        monkeypatch.setattr("interp.circuits.learned.gated_model.TOKENS", tokens)
        found = causal_head_gating(model, [*TEXTS, "w3 w1 w7 w9 w2"], steps=2, n_seeds=2)
        moved.append(found.values["minus"])
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-6)


def test_what_is_predicted(tiny) -> None:
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w4", "w5")
    text, completion, answer = samples(["w1 w2 w3", ("w1 w2", " w3 w4"), pair], model)
    ids = model.coder.encode("w1 w2 w3 w4")
    assert text.ids == tuple(ids[:-1]) and text.targets == text.ids[1:] and text.positions == (0, 1, 2)
    assert completion.ids == tuple(ids)
    assert completion.targets == tuple(ids[-2:]) and [ids[p + 1] for p in completion.positions] == ids[-2:]
    assert answer.targets == (model.coder.continuation("w4")[0],) and answer.positions == (len(answer.ids) - 1,)
    mixed = permuted([text, text, answer, answer, answer], seed=0)
    assert mixed[0].targets == text.targets and mixed[0].ids == text.ids
    seen = list(shuffled_batches(5, 2, 10, seed=0))
    assert [len(b) for b in seen] == [2] * 10 and len({*seen[0], *seen[1]}) == 4
    assert all(len(b) == 3 for b in shuffled_batches(3, 8, 4, seed=0))


def test_every_planted_head_of_induction_is_classified_over_five_seeds() -> None:
    """Two heads in series, the first behind a softmax that is open or shut: it needs small steps from nearly open."""
    known = zoo.induction()
    found = causal_head_gating(known.model, known.pairs(12), steps=70, n_seeds=5, **SLOW)
    assert_planted(found, known)
    evidence = found.toggle(known.model, known.pairs(24, seed=1), [*known.truth, Site("z", 0, 0)])
    assert evidence["confirmed"].tolist() == [True, True, False]
    circuit = found.circuit(known.model)
    assert isinstance(circuit, Circuit) and circuit.is_connected()
    assert {s for s in circuit.nodes() if s.component == "z"} == set(known.truth)
    assert circuit.roles[Site("z", 1, 2)].startswith("facilitating")


@pytest.mark.parametrize("name", ["previous_token", "duplicate_token", "greater_than", "tracr_induction"])
def test_every_planted_head_of_the_other_models_is_classified_over_five_seeds(name: str) -> None:
    known = getattr(zoo, name)()
    assert_planted(causal_head_gating(known.model, known.pairs(6), steps=40, n_seeds=5, **SLOW), known)


@pytest.mark.parametrize("name", ["ioi", "two_hop"])
def test_every_planted_head_of_longer_chains_is_classified_over_five_seeds(name: str) -> None:
    """In `ioi` inhibition is stronger than it need be: a gate of 0.08 will do, where idle heads come to 0.02."""
    known = getattr(zoo, name)()
    found = causal_head_gating(known.model, known.pairs(8), steps=60, n_seeds=5, **SLOW)
    assert_planted(found, known, HELD)
    heads = {s for s in known.truth if s.component == "z"}
    with pytest.raises(InterpError, match=r"threshold=0\.7"):
        found.summary(0.7)
    assert {s for s in found.circuit(known.model, HELD).nodes() if s.component == "z"} == heads
    if name == "two_hop":
        return
    inhibition, idle = Site("z", 1, 2), Site("z", 0, 0)
    assert found.classes()[inhibition] == "irrelevant"  # by the paper's count
    at_least = torch.ones(2, 3, 4)
    at_least[0, 1, 2] = 0.08
    losses = _losses(GatedModel(known.model), samples(known.pairs(8), known.model), at_least)
    assert losses[0] < losses[1] + 1e-3  # which is right: no more of it is needed
    evidence: Any = found.toggle(known.model, known.pairs(12, seed=1), [inhibition, idle], threshold=HELD)
    assert evidence["confirmed"].tolist() == [True, False] and evidence["difference"][0] < -5


def assert_planted(found: HeadGates, known, threshold: float = 0.5) -> None:
    assert not found.stuck()
    heads = {s for s in known.truth if s.component == "z"}
    for site, word in found.classes(threshold).items():
        assert word == ("facilitating" if site in heads else "irrelevant"), (str(site), word)
    table: Any = found.frame()
    for head in heads:  # in every seed by itself
        rows = table[(table["layer"] == head.layer) & (table["head"] == head.head)]
        assert (rows["facilitation"] >= threshold).all() and (rows["interference"] < threshold).all()


def opposed():
    """zoo.one_head with L2H1 set to do what L1H2 does, nine tenths of it, with the other sign."""
    known = zoo.one_head()
    layers: Any = known.bridge.original_model.layers
    of, to = (plain_module(plain_module(layers[i]).attn) for i in (1, 2))
    n = of.q.weight.shape[0] // 4
    there, here = slice(2 * n, 3 * n), slice(n, 2 * n)
    with torch.no_grad():
        for name in "qkv":
            plain_module(getattr(to, name)).weight[here] = plain_module(getattr(of, name)).weight[there]
        plain_module(to.q).bias[here] = plain_module(of.q).bias[there]
        plain_module(to.o).weight[:, here] = -0.9 * plain_module(of.o).weight[:, there]
    return known


def test_helping_opposing_and_idle_heads_as_published(tmp_path) -> None:
    """With the authors' start and step, over five seeds."""
    known = opposed()
    found = causal_head_gating(known.model, known.pairs(12), steps=40, n_seeds=5, batch_size=4)
    words = found.classes()
    assert words.pop(Site("z", 1, 2)) == "facilitating" and words.pop(Site("z", 2, 1)) == "interfering"
    assert set(words.values()) == {"irrelevant"}
    found.write(tmp_path / "gates.parquet")
    back = HeadGates.read(tmp_path / "gates.parquet")
    assert back.provenance == found.provenance and back.frame().equals(found.frame())
    with pytest.raises(ModelError, match="other weights"):
        found.circuit(zoo.one_head().model)
    rows: Any = found.toggle(known.model, known.pairs(16, seed=3), [Site("z", 1, 2), Site("z", 2, 1), Site("z", 0, 0)])
    assert rows["confirmed"].tolist() == [True, True, False]
    assert rows["difference"][0] < 0 < rows["difference"][1]


def test_a_start_that_finds_nothing_is_named(caplog) -> None:
    """From (0, 1), in big steps, the first head of induction is shut and has no gradient."""
    known = zoo.induction()
    found = causal_head_gating(known.model, known.pairs(4), steps=3, n_seeds=2, batch_size=4)
    assert found.stuck() == [0, 1] and "says nothing" in caplog.text


def test_a_random_model_confirms_nothing() -> None:
    """Its gates fit noise, as do those of permuted targets; on other data no head is confirmed."""
    known = zoo.random()
    found, chance = (
        causal_head_gating(known.model, known.pairs(16), steps=40, n_seeds=2, batch_size=8, permute_targets=permute)
        for permute in (False, True)
    )
    counts = [(np.array(list(x.classes().values())) != "irrelevant").mean() for x in (found, chance)]
    assert min(counts) > 0.3 and abs(counts[0] - counts[1]) < 0.35  # classes alone are no evidence
    evidence: Any = found.toggle(known.model, known.pairs(48, seed=1))
    assert not evidence["confirmed"].any()
    covered = (evidence["lo"] <= 0) & (evidence["hi"] >= 0)
    assert covered.mean() >= 0.85


def test_contrastive_gates_close_the_head_of_the_forgotten_task() -> None:
    """L1H2 tells the marked word; its opponent L2H1 serves the twin task that the marked word is not said."""
    known = opposed()
    pairs = list(known.pairs(8))
    retain = [(p.clean, p.answer) for p in pairs]
    forget = [(p.clean, p.foil or "") for p in pairs]  # whatever else: the marked word is what keeps it small
    found = contrastive_head_gating(known.model, retain, forget, steps=40, n_seeds=3, batch_size=4, lr=0.5, lr_end=0.1)
    table: Any = found.summary().set_index(["layer", "head"])
    assert table.loc[(2, 1), "removed"] == 1 and table.loc[(1, 2), "removed"] == 0
    assert found.contrastive and "facilitation" not in found.frame()
    with pytest.raises(InterpError, match="contrastive"):
        found.scores()
    with pytest.raises(PromptError, match="twin"):
        contrastive_head_gating(known.model, retain, forget[:-1], steps=1)


def test_the_contrastive_loss_stops_at_its_bound(tiny) -> None:
    """Forgetting has no gradient once log P is 5 nats below the retained one's: what is left is the retained part."""
    model = tiny("llama")
    data = samples(TEXTS[:1], model)
    gated = GatedModel(model)

    def moved(bound: float) -> torch.Tensor:
        fit = _GateFit(gated, torch.zeros(1, model.n_layers, model.n_heads, dtype=torch.float64), 1.0, 1.0, 1, 0.0)
        import interp.circuits.learned.causal_gating as module

        before, module.MAX_DIFFERENCE = module.MAX_DIFFERENCE, bound
        try:
            fit.contrast(data, samples(TEXTS[1:2], model))
        finally:
            module.MAX_DIFFERENCE = before
        return fit.logits.detach()

    fit = _GateFit(gated, torch.zeros(1, model.n_layers, model.n_heads, dtype=torch.float64), 1.0, 1.0, 1, 0.0)
    fit.step(data, "start")
    torch.testing.assert_close(moved(-1e3), fit.logits.detach())  # the bound is above any difference
    assert not torch.allclose(moved(1e3), fit.logits.detach())


def test_bad_input_is_refused_before_work(tiny) -> None:
    model = tiny("llama")
    bad = [{"lam": 0}, {"lam": float("nan")}, {"lam": -0.1}, {"steps": 0}, {"n_seeds": True}, {"lr": 0}]
    bad += [{"batch_size": 1.5}, {"lr_end": 2.0}, {"start": (0.5, 0.5)}, {"start": (-1.0, 0.5)}, {"start": 0.5}]
    bad += [{"start": ("a", "b")}, {"seed": -1}, {"seed": None}, {"lr": "fast"}]
    for wrong in bad:
        with pytest.raises(InterpError, match=next(iter(wrong))):
            causal_head_gating(model, TEXTS, **wrong)
    with pytest.raises(PromptError, match="no data"):
        causal_head_gating(model, [])
    with pytest.raises(PromptError, match="none is left to be predicted"):
        causal_head_gating(model, ["w1 w2", model.tokenizer.bos_token])
    with pytest.raises(PromptError, match="PromptPair expected"):
        causal_head_gating(model, ["w1 w2", 3])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="permuted"):
        causal_head_gating(model, TEXTS[:2], permute_targets=True)


@pytest.mark.parametrize("kind", ["bert", "bert_headless", "t5"])
def test_encoders_are_refused(tiny, kind: str) -> None:
    with pytest.raises(ModelError, match="decoders that read text"):
        Unembedding(tiny(kind))


def test_a_loss_that_is_no_number_is_an_error(tiny, monkeypatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(
        Unembedding, "_log_probs", lambda self, hidden, tokens: hidden.sum(-1, keepdim=True) * float("nan")
    )
    with pytest.raises(InterpError, match="loss of the start fit is nan"):
        causal_head_gating(model, TEXTS, steps=1)
