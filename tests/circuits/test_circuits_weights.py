"""QK and OV circuits, their composition and channels, against dense float64 products and models' activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from slow_circuits import activations

from interp import zoo
from interp.circuits import Channels, WeightCircuits, attention_channels
from interp.circuits.weights.channels import smallest_prefix
from interp.circuits.weights.composition import _pair_scores
from interp.errors import InterpError, ModelError, PromptError, SiteError
from interp.model.hooks import hooks

TEXT = "w1 w9 w3 w7 w5 w2"
KINDS = [
    "llama",
    "gpt2",
    "neox",
    "mistral",
    "smollm3",
    "mixtral",
]  # RoPE and groups; none; partial; window; some; experts


def scores_of(model, text: str) -> dict[str, torch.Tensor]:
    """By hook name: attention scores [heads, query, key] on the dense path, z, and the streams that blocks read."""
    found: dict[str, torch.Tensor] = {}
    kinds = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "hook_resid_pre", "hook_attn_out")
    names = [f"blocks.{i}.{kind}" for i in range(model.n_layers) for kind in kinds]
    with torch.no_grad(), hooks(model, *[(n, lambda x, hook, n=n: found.__setitem__(n, x[0].double())) for n in names]):
        model.bridge(torch.tensor([model.coder.encode(text)]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_qk_and_ov_give_the_model_s_scores_and_outputs(tiny, kind: str) -> None:
    model = tiny(kind)
    weights, found = WeightCircuits(model), scores_of(model, TEXT)
    for layer in range(model.n_layers):
        stream = found[f"blocks.{layer}.hook_resid_pre"]
        read = weights.norms[layer].scaled(stream)
        out = torch.zeros_like(stream)
        for head in range(model.n_heads):
            pattern = found[f"blocks.{layer}.attn.hook_pattern"][head]
            ov = weights.ov(layer, head)
            constant = weights.read("v", layer, head)[1].double() @ weights.written(layer, head).double()
            out += pattern @ read @ ov.AB.double() + constant
            for query, key in ((5, 0), (5, 3), (4, 4), (2, 1)):
                (w_q, b_q), (w_k, b_k) = weights.rotated(layer, head, query - key)
                mine = (read[query] @ w_q.double() + b_q) @ (read[key] @ w_k.double() + b_k)
                qk = weights.qk(layer, head, query - key).AB.double()
                plain = (
                    mine - (read[query] @ w_q.double()) @ b_k.double() - b_q.double() @ (read[key] @ w_k.double() + b_k)
                )
                torch.testing.assert_close(read[query] @ qk @ read[key], plain, atol=2e-4, rtol=1e-4)
                score = found[f"blocks.{layer}.attn.hook_attn_scores"][head, query, key]
                if score > -1e30:  # else outside the window
                    torch.testing.assert_close(mine, score, atol=2e-4, rtol=1e-4)
        bias = weights.wiring.output_bias(layer)
        want = found[f"blocks.{layer}.hook_attn_out"] - (0 if bias is None else bias.detach().double())
        torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-4)


def test_rotations_depend_on_the_distance_alone(tiny) -> None:
    weights = WeightCircuits(tiny("llama"))
    turns = weights.rotations
    turns._measure(6)
    q, k = (turns._matrices[1, c].double() for c in "qk")
    torch.testing.assert_close(q[5] @ k[2].T, q[3] @ k[0].T, atol=1e-6, rtol=0)
    with pytest.raises(SiteError, match="offset="):
        weights.qk(0, 0)
    with pytest.raises(SiteError, match="no head 9"):
        weights.ov(0, 9)
    with pytest.raises(InterpError, match="offset=-1"):
        weights.qk(0, 0, -1)
    assert WeightCircuits(tiny("gpt2")).qk(0, 0).shape == (32, 32)  # no rotation: no offset needed


def test_models_without_such_circuits_are_refused(tiny) -> None:
    with pytest.raises(ModelError, match="normed after projection"):
        WeightCircuits(tiny("qwen3")).qk(0, 0, 1)
    for kind in ("gemma2", "bert", "t5", "deepseek_v2"):
        with pytest.raises(ModelError):
            WeightCircuits(tiny(kind))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_composition_equals_dense_norms(tiny, kind: str) -> None:
    weights = WeightCircuits(tiny(kind))
    table: Any = weights.composition(offset=2)
    h = weights.graph.n_heads
    assert len(table) == 3 * 3 * h * h  # kinds × pairs of layers × pairs of heads
    for row in table.iloc[::29].itertuples():
        sent = weights.ov(row.sender_layer, row.sender_head).AB.double()
        qk = weights.qk(row.layer, row.head, 2).AB.double()
        read = {"q": qk, "k": qk.T, "v": weights.ov(row.layer, row.head).AB.double()}[row.kind]
        want = torch.linalg.norm(sent @ read) / torch.linalg.norm(sent) / torch.linalg.norm(read)
        assert row.score == pytest.approx(float(want), abs=1e-5)
        assert row.excess == pytest.approx(row.score - 32**-0.5) and row.baseline == pytest.approx(32**-0.5)
    with pytest.raises(SiteError, match="kinds"):
        weights.composition(["o"])


def test_the_baseline_has_the_moments_of_random_turnings() -> None:
    """Against drawn rotations: mean of score², and z of mean 0 and deviation 1 in their distribution."""
    generator = torch.Generator().manual_seed(0)
    d = 12
    a = torch.randn(1, 3, d, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.3])[None, :, None]
    b = torch.randn(1, d, 3, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(torch.randn(4000, d, d, generator=generator, dtype=torch.float64))
    turned = a @ (q * r.diagonal(dim1=1, dim2=2).sign()[:, None])
    found: Any = _pair_scores(turned, b, d)
    scores, z = found["score"].to_numpy(), found["z"].to_numpy()
    assert np.mean(scores**2) == pytest.approx(1 / d, rel=0.02)
    assert abs(z.mean()) < 0.06 and z.std() == pytest.approx(1, rel=0.05)


def test_planted_compositions_stand_out_and_random_ones_do_not() -> None:
    known = zoo.induction(dtype=torch.float64)
    table: Any = WeightCircuits(known.model).composition()
    first = table.iloc[0]
    assert (first.sender_layer, first.sender_head, first.layer, first["head"], first.kind) == (0, 1, 1, 2, "k")
    known = zoo.ioi()
    table = WeightCircuits(known.model).composition()
    tops = {kind: table[table.kind == kind].iloc[0] for kind in "kv"}
    assert (tops["k"].sender_layer, tops["k"].sender_head, tops["k"].layer, tops["k"]["head"]) == (0, 1, 1, 2)
    assert (tops["v"].sender_layer, tops["v"].sender_head, tops["v"].layer, tops["v"]["head"]) == (0, 1, 1, 2)
    null = WeightCircuits(zoo.random().model).composition()
    assert abs(null["z"].mean()) < 0.2 and 0.7 < null["z"].std() < 1.3 and null["z"].abs().max() < 6


def test_copying_is_the_eigenvalues_of_the_long_product(tiny) -> None:
    model = tiny("llama")
    weights = WeightCircuits(model)
    hf: Any = model.bridge.original_model
    table: Any = weights.copying()
    embed = hf.model.embed_tokens.original_component.weight.detach().double()
    unembed = hf.lm_head.original_component.weight.detach().double()
    gamma = hf.model.norm.original_component.weight.detach().double()
    for layer, head in ((0, 0), (2, 3)):
        whole = embed @ weights.ov(layer, head).AB.double() @ (gamma[:, None] * unembed.T)
        values = torch.linalg.eigvals(whole)
        want = float(values.real.sum() / values.abs().sum())
        row = table[(table.layer == layer) & (table["head"] == head)].iloc[0]
        assert row.copying == pytest.approx(want, abs=1e-4)


def test_copying_heads_of_known_models() -> None:
    table: Any = WeightCircuits(zoo.induction().model).copying().set_index(["layer", "head"])["copying"]
    assert table[1, 2] == pytest.approx(1, abs=1e-5)
    assert abs(WeightCircuits(zoo.random().model).copying()["copying"].mean()) < 0.2


# ---------------------------------------------------------------- channels


def test_a_firing_is_traced_to_the_head_that_wrote_its_key(tmp_path) -> None:
    """In induction, what the key is found by is what the previous-token head wrote there."""
    known = zoo.induction()
    pairs = known.pairs(4)
    found = attention_channels(known.model, pairs, "z.L1H2")
    table: Any = found.firings()
    for i, pair in enumerate(pairs):
        ends = known.attends(pair)[next(s for s in known.truth if s.layer == 1)]
        rows = table[table.example == i]
        assert rows["query"].tolist() == [len(ends) - 1] and rows["key"].tolist() == [ends[-1]]
    assert (table["directions"] == 1).all() and table["score"].to_numpy() == pytest.approx(400, rel=1e-4)
    summary: Any = found.summary().set_index(["side", "sender"])
    assert summary.loc[("key", "z.L0H1"), "share"] == pytest.approx(1, abs=1e-4)
    assert summary.loc[("key", "z.L0H1"), "kept"] == 4 and summary.loc[("key", "z.L0H0"), "kept"] == 0
    assert summary.loc[("query", "resid_pre.L0"), "share"] == pytest.approx(1, abs=1e-4)
    found.write(tmp_path / "channels.parquet")
    back = Channels.read(tmp_path / "channels.parquet")
    assert back.provenance == found.provenance and back.frame().equals(found.frame())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_terms_and_senders_sum_to_the_score(tiny, kind: str, monkeypatch) -> None:
    """With all directions: the model's own score. Senders: each one's output on the direction, and nothing is left."""
    monkeypatch.setattr("interp.circuits.weights.channels.FIRING", 0.3)
    model = tiny(kind)
    found = scores_of(model, TEXT)
    outputs = activations(model, TEXT)
    assert outputs
    channels = attention_channels(model, TEXT)
    table: Any = channels.frame()
    for row in channels.firings().itertuples():
        score = found[f"blocks.{row.layer}.attn.hook_attn_scores"][row.head, row.query, row.key]
        assert row.score == pytest.approx(float(score), abs=2e-3, rel=1e-3)
        assert found[f"blocks.{row.layer}.attn.hook_pattern"][row.head, row.query, row.key] > 0.3 and row.key > 0
        rows = table[(table.layer == row.layer) & (table["head"] == row.head) & (table["query"] == row.query)]
        for _, side in rows.groupby("side"):
            assert side["contribution"].sum() == pytest.approx(row.covered * row.score, abs=2e-3, rel=1e-3)
            assert len(side) == 2 + row.layer * (model.n_heads + 1) and side["share"].sum() == pytest.approx(
                1, abs=1e-3
            )
    assert channels.firings()["covered"].min() >= 1 - 1e-4


def test_directions_are_a_prefix_of_the_sorted_terms() -> None:
    terms = torch.tensor([1.0, 5.0, -2.0, 3.0])  # sum 7: 5 + 3 reach it
    assert smallest_prefix(terms, 1.0) == [1, 3] and smallest_prefix(terms, 0.7) == [1]
    assert smallest_prefix(torch.tensor([2.0, 1.0]), 1.0) == [0, 1]
    assert smallest_prefix(torch.tensor([2.0, 0.0]), 1.0) == [0]


def test_channels_of_a_random_model_are_many_and_nobody_s() -> None:
    """Its scores go by many directions, and no one sender makes them."""
    known = zoo.random()
    found = attention_channels(known.model, known.pairs(6))
    assert found.firings()["directions"].median() > 1
    heads: Any = found.frame()
    heads = heads[heads["sender"].str.startswith("z.")]
    assert abs(heads["share"].median()) < 0.1


def test_bad_input(tiny) -> None:
    model = tiny("llama")
    for wrong in ({"coverage": 0}, {"coverage": float("nan")}, {"upstream": 1.5}, {"coverage": "all"}):
        with pytest.raises(InterpError, match=next(iter(wrong))):
            attention_channels(model, TEXT, **wrong)
    with pytest.raises(PromptError, match="no prompts"):
        attention_channels(model, [])
    for site in ("z.L9H0", "mlp_out.L0"):
        with pytest.raises(InterpError, match="no head"):
            attention_channels(model, TEXT, site)
    with pytest.raises(InterpError, match="nothing to decompose"):
        attention_channels(model, model.tokenizer.bos_token)  # one token: it attends to itself alone
