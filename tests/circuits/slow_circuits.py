"""Slow and obvious: inputs split edge by edge through hooks, gradients by autograd alone, circuits by many forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import interp
from interp.circuits.topology import architecture
from interp.model.hooks import hooks
from interp.sites import Edge, Site


def original(bridge: Any) -> Any:
    return bridge._modules.get("_original_component") or bridge.original_component


def activations(model: interp.Model, text: str) -> dict[str, Tensor]:
    """What enters block 0, every z and every MLP's output, by hook name."""
    seen: dict[str, Tensor] = {}
    names = [n for n in model.bridge.hook_dict if n.endswith(("attn.hook_z", "hook_mlp_out"))]
    names.append("blocks.0.hook_resid_pre")

    def keep(name):
        return name, lambda x, hook: seen.__setitem__(name, x.detach())

    with torch.no_grad(), hooks(model, *map(keep, names)):
        model.last_logits(torch.tensor([model.coder.encode(text)]))
    return seen


def outputs(model: interp.Model, text: str) -> dict[Site, Tensor]:
    """What each sender adds to the residual stream [batch, position, d_model]."""
    seen, found = activations(model, text), {}
    for sender in architecture(model).senders:
        x = seen[sender.hook_name]
        if sender.component == "z":
            alone = torch.zeros_like(x)
            alone[:, :, sender.head] = x[:, :, sender.head]
            o = original(model.bridge.blocks[sender.layer].attn.o)
            x = (o(alone.flatten(2)) - o(torch.zeros_like(alone).flatten(2))).detach()
        found[sender] = x
    return found


def logit_diff(model: interp.Model, pair: interp.PromptPair, text: str, added: dict[Site, Tensor], fixed=None):
    """The metric when each receiver reads the residual stream plus ``added[receiver]``; nothing else is touched.

    ``fixed``: the name of a hook, and what its activation is set to.
    """
    stream: dict[tuple[int, str], Tensor] = {}
    pairs: list[tuple[str, Any]] = []
    blocks = model.bridge.blocks
    parallel = "blocks.0.hook_resid_mid" not in model.bridge.hook_dict

    def keep(layer, what):
        return lambda x, hook: stream.__setitem__((layer, what), x)

    def rewrite(layer, component):
        def hook(x, hook):
            heads = []
            for head in range(x.shape[2]):
                more = added.get(Site(component, layer, head))
                if more is None:
                    heads.append(x[:, :, head])
                    continue
                read = original(blocks[layer].ln1)(stream[layer, "pre"] + more)
                projected = original(getattr(blocks[layer].attn, component))(read)
                heads.append(projected.unflatten(-1, (x.shape[2], -1))[:, :, head])
            return torch.stack(heads, 2)

        return hook

    def mlp(layer):
        def hook(x, hook):
            more = added.get(Site("mlp_out", layer))
            norm = original(blocks[layer].ln2 if hasattr(blocks[layer], "ln2") else blocks[layer].ln1)
            return x if more is None else norm(stream[layer, "pre" if parallel else "mid"] + more)

        return hook

    if fixed is not None:
        pairs.append((fixed[0], lambda x, hook: fixed[1]))
    for layer in range(model.n_layers):
        pairs.append((f"blocks.{layer}.hook_resid_pre", keep(layer, "pre")))
        pairs += [(f"blocks.{layer}.attn.hook_{c}", rewrite(layer, c)) for c in "qkv"]
        if f"blocks.{layer}.hook_mlp_out" in model.bridge.hook_dict:
            if not parallel:
                pairs.append((f"blocks.{layer}.hook_resid_mid", keep(layer, "mid")))
            pairs.append((f"blocks.{layer}.mlp.hook_in", mlp(layer)))
    last = Site("resid_post", model.n_layers - 1)
    if last in added:
        pairs.append((last.hook_name, lambda x, hook: x + added[last]))
    with hooks(model, *pairs):
        logits = model.last_logits(torch.tensor([model.coder.encode(text)]))[0]
    answer, foil = (model.coder.continuation(w)[0] for w in (pair.answer, pair.foil))
    return logits[answer] - logits[foil]


def edge_scores(model, pair, texts, fixed=(None,), mode="noise") -> dict[Edge, float]:
    """(source − base) · mean gradient, edge by edge; a text and an activation set (or None) per run of the mean."""
    sent = {run: outputs(model, getattr(pair, run)) for run in ("clean", "corrupt")}
    base, source = ("clean", "corrupt") if mode == "noise" else ("corrupt", "clean")
    graph = architecture(model)
    zero = torch.zeros_like(sent["clean"][graph.input])
    total = dict.fromkeys(graph.edges(), 0.0)
    for text, setting in zip(texts, fixed, strict=True):
        leaves = {r: zero.clone().requires_grad_() for r in graph.receivers}
        value = logit_diff(model, pair, text, leaves, setting)
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        grads = dict(zip(leaves, found, strict=True))
        for edge in total:
            change = sent[source][edge.sender] - sent[base][edge.sender]
            total[edge] += float((change * grads[edge.receiver]).sum()) / len(texts)
    return total


def metric_as_circuit(model, pair: interp.PromptPair, kept: set[Edge], ablated: dict[Site, Tensor]) -> float:
    """The logit difference of the clean prompt when every receiver reads ``ablated`` along the edges that are not kept.

    One full forward for each layer's attention, each MLP and the logits, in order: it tells what the senders before
    send when all receivers before them read what they should, from which follows what the next receivers read.
    """
    graph = architecture(model)
    added: dict[Site, Tensor] = {}
    stages = [[r for r in graph.receivers if r.layer == i and r.component in "qkv"] for i in range(graph.n_layers)]
    for layer in reversed(range(graph.n_layers)):
        stages.insert(layer + 1, [r for r in graph.receivers if r == Site("mlp_out", layer)])
    for stage in [*stages, [graph.output]]:
        current = outputs_in(model, pair, added)
        for receiver in stage:
            cut = [e.sender for e in graph.edges() if e.receiver == receiver and e not in kept]
            if cut:
                added[receiver] = sum(ablated[s] - current[s] for s in cut)  # type: ignore[assignment]
    with torch.no_grad():
        return float(logit_diff(model, pair, pair.clean, added))


def outputs_in(model, pair: interp.PromptPair, added: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """As `outputs` of the clean prompt, while receivers read ``added``."""
    seen: dict[str, Tensor] = {}
    names = [n for n in model.bridge.hook_dict if n.endswith(("attn.hook_z", "hook_mlp_out"))]
    with torch.no_grad():
        with hooks(model, *((n, lambda x, hook, n=n: seen.__setitem__(n, x)) for n in names)):
            logit_diff(model, pair, pair.clean, added)
        found = {s: x for s, x in outputs(model, pair.clean).items() if s.component == "resid_pre"}
        for name, x in seen.items():
            layer = int(name.split(".")[1])
            if name.endswith("mlp_out"):
                found[Site("mlp_out", layer)] = x
                continue
            o = original(model.bridge.blocks[layer].attn.o)
            for head in range(x.shape[2]):
                alone = torch.zeros_like(x)
                alone[:, :, head] = x[:, :, head]
                found[Site("z", layer, head)] = o(alone.flatten(2)) - o(torch.zeros_like(alone).flatten(2))
    return found
