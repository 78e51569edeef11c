"""Information-flow routes against vectors written out one by one, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_circuits import original, outputs

import interp
from interp import zoo
from interp.circuits import flow_routes, flow_scores
from interp.circuits.attribution.flow import EPSILON, _proximity
from interp.circuits.topology import architecture
from interp.errors import InterpError, ModelError
from interp.model.hooks import hooks
from interp.sites import Site

PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")


def test_closed_forms() -> None:
    parts = torch.tensor([[3.0, -1, 0, 0], [0, 0, 2, 2], [0, 0, 0, 0]])
    whole = parts.sum(0)
    assert _proximity(whole, parts, 0).tolist() == [4, 4, 0]  # of disjoint support: the size of each
    assert _proximity(whole, -whole[None], EPSILON).tolist() == pytest.approx([EPSILON])
    assert _proximity(whole, whole[None] / 4, 0).tolist() == [2]


def seen(model: interp.Model, text: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    names = [n for n in model.bridge.hook_dict if n.endswith(("resid_pre", "resid_post", "attn_out", "mlp_out"))]
    names += [f"blocks.{i}.attn.hook_{n}" for i in range(model.n_layers) for n in ("pattern", "v")]

    def keep(name: str):
        return name, lambda x, hook: found.__setitem__(name, x.detach())

    with torch.no_grad(), hooks(model, *map(keep, names)):
        model.last_logits(torch.tensor([model.coder.encode(text)]))
    return found


def one_norm(x: torch.Tensor) -> float:
    return float(x.detach().abs().sum())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_edges_equal_parts_taken_away_one_by_one(tiny, kind: str) -> None:
    model = tiny(kind)
    graph, sent, acts = architecture(model), outputs(model, PAIR.clean), seen(model, PAIR.clean)
    scores, want = flow_scores(model, PAIR), np.zeros(graph.allowed.shape)
    biases = [getattr(original(model.bridge.blocks[i].attn.o), "bias", None) for i in range(model.n_layers)]
    for row, receiver in enumerate(graph.receivers):
        if receiver.head is not None and receiver != Site("q", receiver.layer, 0):  # reads what the first q reads
            np.testing.assert_array_equal(scores.matrix[row], scores.matrix[graph.rows(receiver.layer, "q").start])
            continue
        stream = acts[f"blocks.{receiver.layer}.hook_resid_pre"]
        if receiver == graph.output:
            stream = acts[receiver.hook_name]
        elif receiver.component == "mlp_out" and not graph.parallel:
            stream = stream + acts[f"blocks.{receiver.layer}.hook_attn_out"]
        for i in range(stream.shape[1]):
            w = stream[0, i]
            senders = {s: sent[s][0, i] for c, s in enumerate(graph.senders) if graph.allowed[row, c]}
            read = {s.layer for s in senders if s.component == "z"}
            others = [b for layer, b in enumerate(biases) if b is not None and layer in read]
            torch.testing.assert_close(sum(senders.values()) + sum(others), w)
            near = {s: max(one_norm(w) - one_norm(w - p), 0) for s, p in senders.items()}
            total = sum(near.values()) + sum(max(one_norm(w) - one_norm(w - b), 0) for b in others)
            for s, x in near.items():
                want[row, graph.sender_number[s]] += x / total / stream.shape[1]
        known = graph.allowed[row]
        np.testing.assert_allclose(scores.matrix[row, known], want[row, known], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_routes_equal_heads_and_tokens_taken_away_one_by_one(tiny, kind: str, monkeypatch) -> None:
    monkeypatch.setattr("interp.circuits.attribution.flow.PART_BYTES", 1)
    model = tiny(kind)
    acts, routes = seen(model, PAIR.clean), flow_routes(model, PAIR.clean, 0.0)
    n, heads = acts["blocks.0.hook_resid_pre"].shape[1], model.n_heads
    for layer in range(model.n_layers):
        before = acts[f"blocks.{layer}.hook_resid_pre"][0]
        after = before + acts[f"blocks.{layer}.hook_attn_out"][0]
        o = original(model.bridge.blocks[layer].attn.o)
        nothing = o(torch.zeros(1, heads * acts[f"blocks.{layer}.attn.hook_v"].shape[-1], dtype=before.dtype))[0]
        here = routes[routes["layer"] == layer]
        for i in sorted(set(here[here["kind"].str.startswith("attention")]["target"])):
            near = torch.zeros(heads, n)
            for head in range(heads):
                v = acts[f"blocks.{layer}.attn.hook_v"][0, :, head * model.n_kv_heads // heads]
                for j in range(i + 1):
                    z = torch.zeros(heads, v.shape[1], dtype=v.dtype)
                    z[head] = acts[f"blocks.{layer}.attn.hook_pattern"][0, head, i, j] * v[j]
                    p = o(z.flatten()[None])[0] - nothing
                    near[head, j] = one_norm(after[i]) - one_norm(after[i] - p)
            near = near.detach().clamp(min=EPSILON)
            skip = max(one_norm(after[i]) - one_norm(after[i] - before[i]), EPSILON)
            bias = max(one_norm(after[i]) - one_norm(after[i] - nothing), EPSILON) if o.bias is not None else 0
            total = float(near.sum()) + skip + bias
            rows = here[(here["kind"] == "attention") & (here["target"] == i)].set_index("source")
            for j in range(i + 1):
                assert rows["importance"][j] == pytest.approx(float(near[:, j].sum()) / total, abs=1e-6)
                assert rows["head"][j] == int(near[:, j].argmax())
            own = here[(here["kind"] == "attention skip") & (here["target"] == i)]["importance"].item()
            assert own == pytest.approx(skip / total, abs=1e-6)
    last = routes.iloc[0]
    assert (last["layer"], last["kind"], last["target"]) == (model.n_layers - 1, "mlp", n - 1)


def test_routes_lead_where_a_known_circuit_attends() -> None:
    known = zoo.induction()
    pair = known.pairs(1)[0]
    where = known.attends(pair)
    end = len(pair.clean.split())
    routes = flow_routes(known.model, pair.clean, 0.01)
    source = list(where.values())[1][end]
    found = routes[(routes["layer"] == 1) & (routes["source"] == source) & (routes["target"] == end)]
    assert found["head"].tolist() == [2] and found["importance"].item() > 0.01


def test_what_has_no_routes_is_refused(tiny) -> None:
    for bad in (-0.1, 1, True):
        with pytest.raises(InterpError, match="threshold="):
            flow_routes(tiny("llama"), PAIR.clean, bad)
    with pytest.raises(InterpError, match="parallel"):
        flow_routes(tiny("neox"), PAIR.clean, 0.1)
    with pytest.raises(InterpError, match="keeps no edge"):
        flow_routes(tiny("llama"), PAIR.clean, 0.999)
    with pytest.raises(InterpError, match="position 9 is outside"):
        flow_routes(tiny("llama"), PAIR.clean, 0.1, position=9)
    with pytest.raises(ModelError, match="attn_out = Σ W_O z"):
        flow_scores(tiny("gemma2"), PAIR)
