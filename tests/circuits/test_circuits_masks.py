"""Gates on edges and masks on heads: against exact circuits and finite differences, and on models that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import zoo
from interp.circuits import causal_head_gating, differential_masks, prune_edges, random_scores
from interp.circuits.capture import capture
from interp.circuits.evaluation.ablated_forward import run_circuit
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.learned.diffmask import _MaskFit, bernoulli_kl
from interp.circuits.learned.hard_concrete import HardConcrete
from interp.circuits.learned.soft_forward import run_weighted
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError, ModelError, PromptError
from interp.model.hooks import hooks
from interp.prompts.pairs import encode_pairs
from interp.results.significance import sign_flip
from interp.sites import Site

KINDS = ["llama", "gpt2", "neox", "mistral", "mixtral"]  # grouped queries; plain; parallel; a window; experts
PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")


def weighted(model, weights: torch.Tensor) -> torch.Tensor:
    ids = [model.coder.encode(t) for t in (PAIR.clean, PAIR.corrupt)]
    wiring = Wiring(model)
    return run_weighted(wiring, ids[:1], weights, capture(model, ids[1:], sender_hooks(wiring)))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_zero_and_one_are_the_exact_circuit(tiny, kind: str) -> None:
    model = tiny(kind)
    wiring = Wiring(model)
    ids = [model.coder.encode(t) for t in (PAIR.clean, PAIR.corrupt)]
    kept = torch.rand(wiring.graph.allowed.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    want = run_circuit(wiring, ids[:1], kept, capture(model, ids[1:], sender_hooks(wiring)))[0]
    with torch.no_grad():
        got = weighted(model, kept.to(model.dtype))
    tolerance = 1e-5 if model.dtype == torch.float64 else 1e-3  # transformers' norms round to float32
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_gradients_of_weights_equal_finite_differences(tiny, kind: str) -> None:
    """Of every receiver's kind and from every sender's, through what edges change downstream."""
    model = tiny(kind)
    graph = Wiring(model).graph
    weights = 0.2 + 0.6 * torch.rand(graph.allowed.shape, generator=torch.Generator().manual_seed(1)).double()

    def total(w):
        logits = weighted(model, w)
        return logits[3] - logits[7]

    with torch.enable_grad():
        leaf = weights.clone().requires_grad_()
        grad = torch.autograd.grad(total(leaf), leaf)[0]
    assert (grad[~torch.from_numpy(graph.allowed)] == 0).all()
    places = np.argwhere(graph.allowed)
    chosen = places[np.random.default_rng(0).permutation(len(places))[:24]]
    with torch.no_grad():
        for row, column in [*chosen.tolist(), places[-1].tolist(), places[0].tolist()]:
            step = torch.zeros_like(weights)
            step[row, column] = 1e-2
            slope = float(total(weights + step) - total(weights - step)) / 2e-2
            assert slope == pytest.approx(float(grad[row, column]), abs=2e-3, rel=2e-2), (row, column)


def test_hard_concrete_draws_have_their_mass_on_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for gates in (HardConcrete(), HardConcrete(-0.2, 1.0, 0.2)):
        for a in (-2.0, 0.0, 1.5):
            z = gates.sample(torch.full((40_000,), a, dtype=torch.float64), generator)
            assert float((z > 0).double().mean()) == pytest.approx(float(gates.alive(torch.tensor(a))), abs=0.01)
            assert float(z.min()) >= 0 and float(z.max()) <= 1
    a = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        assert torch.autograd.gradcheck(
            lambda x: HardConcrete().sample(x, torch.Generator().manual_seed(3)), (a,), atol=1e-6
        )


def test_pruning_finds_the_planted_edges() -> None:
    known = zoo.ioi()
    found = prune_edges(known.model, known.pairs(8), sparsity=1.1, steps=80, lr=0.2, batch_size=2, start=2.0)
    truth = set(known.circuit.edges)
    assert truth <= set(found.circuit.edges), found.circuit.frame()
    assert len(found.circuit) < 0.4 * len(found.scores)
    worst = min(found.scores[e] for e in truth)
    ranks = found.scores.matrix[found.scores.graph.allowed]
    assert (ranks >= worst).sum() <= 2 * len(truth), worst  # of 262 edges
    last = found.history.iloc[-1]
    assert last["target"] == pytest.approx(1.1) and last["sparsity"] > 0.8 and last["kl"] < 0.05
    assert all(found.circuit.edges[e] == found.scores[e] for e in truth)


def test_on_a_random_model_every_edge_closed_costs() -> None:
    """There is no small circuit to be had: the divergence rises with sparsity, where that of a planted one is 0."""
    known = zoo.random()
    found = prune_edges(known.model, known.pairs(4), sparsity=0.9, steps=20, batch_size=2, start=2.0, lr=0.4)
    history: Any = found.history
    assert history["kl"].iloc[-3:].mean() > history["kl"].iloc[0] > 0


def test_what_is_pruned_from_random_models_beats_no_random_circuit_on_other_pairs() -> None:
    """By logit difference, beside random circuits of the same size; on a planted model the same test sees it."""

    def gains(known, n: int) -> np.ndarray:
        pairs = known.pairs(n)
        found = prune_edges(known.model, pairs[:4], sparsity=0.9, steps=25, lr=0.4, batch_size=4, start=2.0)
        chance = [random_scores(known.model, i).top(len(found.circuit), prune=False).mask() for i in range(3)]
        evaluate = Evaluator(known.model, pairs, "logit_diff", "counterfactual")
        mine, *others = evaluate.many(np.stack([found.circuit.mask(), *chance]))
        return (mine - np.mean(others, axis=0))[4:]

    assert sign_flip(np.concatenate([gains(zoo.random(seed), 20) for seed in range(3)])[None])[0] > 0.01
    assert sign_flip(gains(zoo.ioi(), 20)[None])[0] < 0.001


def test_pruning_refuses_bad_input(tiny) -> None:
    model = tiny("llama")
    for wrong in (
        {"sparsity": 0},
        {"sparsity": 1.5},
        {"steps": 0},
        {"lr": float("nan")},
        {"batch_size": True},
        {"start": 99.0},
        {"seed": -1},
        {"sparsity": "much"},
    ):
        with pytest.raises(InterpError, match=next(iter(wrong))):
            prune_edges(model, PAIR, **wrong)
    with pytest.raises(PromptError, match="no prompt pairs"):
        prune_edges(model, [])
    with pytest.raises(InterpError, match="all the same"):
        prune_edges(model, interp.PromptPair("w1 w2", "w1 w2", "w3", "w4"))
    for kind in ("gemma2", "bert", "deepseek_v2"):
        with pytest.raises(ModelError):
            prune_edges(tiny(kind), PAIR, steps=1)
    with pytest.raises(ModelError):
        prune_edges(tiny("t5"), PAIR, steps=1)


# ---------------------------------------------------------------- masks on heads


@pytest.mark.parametrize("kind", ["llama", "neox", "gemma2"])
def test_masked_runs_and_their_gradients_equal_mixed_z(tiny, kind: str) -> None:
    """A mask through the kernel equals (1 − m) z + m z' set by a hook at the last token, and so do its gradients."""
    model = tiny(kind)
    fit = _MaskFit(model, 2, 1e-3, seed=0)
    prompts = encode_pairs(PAIR, model.coder)
    names = [f"blocks.{i}.attn.hook_z" for i in range(model.n_layers)]
    other = capture(model, [prompts[0].corrupt], names)
    draw = torch.rand(1, model.n_layers, model.n_heads, generator=torch.Generator().manual_seed(2)).double()

    def by_hooks(m):
        def mix(i):
            def hook(z, hook):
                end = z.shape[1] - 1
                at = torch.arange(z.shape[1])[None, :, None, None] == end
                share = torch.where(at, m[:, i][:, None, :, None], torch.zeros((), dtype=m.dtype))
                return (1 - share) * z + share * other[names[i]]

            return hook

        with hooks(model, *[(n, mix(i)) for i, n in enumerate(names)]):
            return model.last_logits([prompts[0].clean])

    with torch.enable_grad():
        a, b = (draw.clone().requires_grad_() for _ in range(2))
        ours = fit._run(prompts, a, fit._attention_outputs([prompts[0].corrupt]))
        theirs = by_hooks(b)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(x[0, 5] - x[0, 9], y)[0] for x, y in ((ours, a), (theirs, b))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_bernoulli_kl_is_that_of_the_authors() -> None:
    a, b = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (torch.distributions.Bernoulli(logits=x) for x in (a, b))
    torch.testing.assert_close(bernoulli_kl(a, b), torch.distributions.kl_divergence(p, q), atol=1e-3, rtol=1e-3)


def test_the_heads_that_flip_the_answer_are_masked_first() -> None:
    """Either of two does, at the last token: the name mover, and the head that tells it what to avoid."""
    known = zoo.ioi()
    found = differential_masks(known.model, known.pairs(6), k=1, steps=60, lr=0.15, batch_size=6)
    table: Any = found.frame()
    assert set(found.chosen()[:2]) == {Site("z", 1, 2), Site("z", 2, 0)}
    assert table["masked"][0] > 0.5 and table["masked"][2] < table["masked"][0]


def test_masks_of_random_models_flip_no_other_answers() -> None:
    """The heads masked, in their counterfactual state at the last token on pairs not seen: beside random heads.

    By how much more the logit difference falls. On a planted model the same test sees it.
    """

    def gains(known, k: int) -> np.ndarray:
        pairs, model = known.pairs(22), known.model
        found = differential_masks(model, pairs[:6], k=k, steps=40, lr=0.2, batch_size=6)
        table: Any = found.frame()
        order = [(int(r.layer), int(r.head)) for r in table.itertuples()]
        rng = np.random.default_rng(0)
        sets = [order[:k], *([order[i] for i in rng.permutation(len(order))[:k]] for _ in range(3))]
        prompts, fit = encode_pairs(pairs[6:], model.coder), _MaskFit(model, k, 1e-3, seed=0)
        left = []
        with torch.no_grad():
            for heads in sets:
                mask = torch.zeros(len(prompts), model.n_layers, model.n_heads)
                for layer, head in heads:
                    mask[:, layer, head] = 1.0
                logits = fit._run(prompts, mask, fit._attention_outputs([p.corrupt for p in prompts]))
                left.append([float(row[p.answer] - row[p.foil]) for row, p in zip(logits, prompts, strict=True)])
        return np.mean(left[1:], axis=0) - np.array(left[0])

    assert sign_flip(np.concatenate([gains(zoo.random(seed), 3) for seed in range(3)])[None])[0] > 0.01
    assert sign_flip(gains(zoo.ioi(), 1)[None])[0] < 0.001


@pytest.mark.parametrize("kind", ["jamba", "deepseek_v2", "gpt_oss"])
def test_masks_and_gates_where_there_are_no_edges(tiny, kind: str) -> None:
    """Hybrids, latent attention and learned sinks have heads, if no edges in this sense."""
    model = tiny(kind)
    masks = differential_masks(model, PAIR, k=1, steps=1)
    gates = causal_head_gating(model, ["w1 w2 w3", "w4 w5"], steps=1, n_seeds=2)
    assert masks.masked.shape == gates.values["plus"].shape[1:] == (len(model.attention_layers), model.n_heads)
    assert set(masks.frame()["layer"]) == set(model.attention_layers)
    if kind == "jamba":
        gates.values["minus"][:] = 1.0
        with pytest.raises(ModelError, match="softmax attention"):
            gates.circuit(model)


def test_masking_refuses_bad_input(tiny) -> None:
    model = tiny("llama")
    for wrong in ({"k": 0}, {"k": 99}, {"steps": 0}, {"lr": -1.0}, {"batch_size": 0}, {"seed": 0.5}):
        with pytest.raises(InterpError, match=next(iter(wrong))):
            differential_masks(model, PAIR, **wrong)
    with pytest.raises(PromptError, match="foil"):
        differential_masks(model, interp.PromptPair("w1 w2", "w1 w3", "w3"))
    with pytest.raises(ModelError, match="decoders"):
        differential_masks(tiny("bert"), interp.PromptPair("w1 w2", "w1 w3", "w3", "w4"), k=1)
