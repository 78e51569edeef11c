"""Information-flow routes: how much of what a node reads comes from each sender, without a gradient or a second prompt.

Ferrando and Voita 2024 (arXiv 2403.00824). A vector w that is a sum of parts owes to part p

    proximity(p) = max(‖w‖₁ − ‖w − p‖₁, ε),    importance(p) = proximity(p) / Σ proximity

with ε = 1e-5, as in the authors' code (facebookresearch/llm-transparency-tool).

* `flow_scores` gives a score to every edge sender → receiver, as in hannamw/EAP-IG: w is the residual stream that the
  receiver reads, the parts are its senders' outputs, negative proximities count as 0 (no ε), and importances are
  averaged over positions and examples. q, k and v of a layer read the same stream and score the same; query groups
  play no part.
* `flow_routes` is the published graph of one prompt, over tokens: of attention, w is the residual stream behind it at a
  token, and the parts are what every head brings from every token, A[i, j] · W_O v_j, and the stream before it; of an
  MLP, the stream behind it, the MLP's output and the stream before it. From the last token of the last layer edges of
  more than a threshold are followed back.

Output biases are parts of their own: they count in w and in the sum, and belong to no edge. Norms are not looked
through: importances are taken in the raw residual stream. What they measure is a share of size, not a causal effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from headstats.patterns import pattern_rows
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture, capture_calls
from interp.circuits.inputs import token_batches
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError
from interp.model.attention_call import AttentionCall
from interp.model.model import Model
from interp.prompts.pairs import PromptPair, encode_pairs, listed_prompts
from interp.utils.provenance import now, prompt_hash

EPSILON = 1e-5
PART_BYTES = 64 * 2**20  # of parts with d_model numbers each that exist at one time


@torch.no_grad()
def flow_scores(model: Model, pairs: PromptPair | Iterable[PromptPair]) -> EdgeScores:
    """Importance of every edge in the clean prompts, between 0 and 1: see this module's first lines.

    Raises ModelError where edges are not defined, PromptError for bad prompts.
    """
    listed = listed_prompts(pairs)
    prompts = encode_pairs(listed, model.coder)
    wiring = Wiring(model)
    wiring.check(prompts[0].clean)
    total = torch.zeros(wiring.graph.allowed.shape, dtype=torch.float64)
    for batch in token_batches(prompts):
        total += _edge_sums(wiring, [prompts[i].clean for i in batch])
    made = {
        "method": "information flow routes", "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
        "evidence": "share of size, without intervention",
    }  # fmt: skip
    return EdgeScores(wiring.graph, (total / len(prompts)).numpy(), {**model.provenance(), **made})


def _edge_sums(wiring: Wiring, ids: list[Any]) -> Float[Tensor, "receivers senders"]:
    """Sum over prompts of the mean over positions of the importances."""
    graph = wiring.graph
    middle = ["hook_attn_out"] * (graph.mlps and not graph.parallel)
    names = [f"blocks.{i}.{n}" for i in range(graph.n_layers) for n in ("hook_resid_pre", *middle)]
    final = f"blocks.{graph.n_layers - 1}.hook_resid_post"
    acts = capture(wiring.model, ids, list(dict.fromkeys([*sender_hooks(wiring), *names, final])))
    streams: list[tuple[list[slice], Tensor]] = []  # rows that read the stream
    for layer in range(graph.n_layers):
        stream, mlp = acts[f"blocks.{layer}.hook_resid_pre"], [graph.rows(layer, "mlp_out")] if graph.mlps else []
        heads = slice(graph.rows(layer, "q").start, graph.rows(layer, "v").stop)
        streams.append(([heads, *mlp * graph.parallel], stream))
        if mlp and not graph.parallel:
            streams.append((mlp, stream + acts[f"blocks.{layer}.hook_attn_out"]))
    streams.append(([graph.rows(graph.n_layers - 1, "resid_post")], acts[final]))
    shape = acts[final].shape[:2]
    out = torch.zeros(graph.allowed.shape, dtype=torch.float64)
    for rows, stream in streams:
        known = torch.from_numpy(graph.allowed[rows[0].start])
        near = torch.zeros(len(graph.senders), *shape, dtype=torch.float64)
        for columns, parts in _parts(wiring, acts, known.numpy()):
            near[columns] = _proximity(stream, parts, 0.0).double().cpu()
        biases = _proximity(stream, _biases(wiring, known.numpy(), stream), 0.0).double().cpu()
        whole = near.sum(0) + biases.sum(0)
        mean = (near / whole.clamp(min=1e-30)).mean(2).sum(1)
        for some in rows:
            out[some] = torch.where(known, mean, 0.0)
    return out


def _parts(
    wiring: Wiring, acts: dict[str, Tensor], known: np.ndarray
) -> Iterator[tuple[slice, Float[Tensor, "senders batch position d_model"]]]:
    """The outputs of the senders that are read, some heads' at a time."""
    graph = wiring.graph
    for sender, column in graph.sender_number.items():
        if not known[column] or (sender.component == "z" and sender.head):
            continue
        if sender.component == "z":
            columns, layer = graph.columns(sender.layer or 0, "z"), sender.layer or 0
            yield columns, wiring.contributions(layer, acts[sender.hook_name])
        else:
            yield slice(column, column + 1), acts[sender.hook_name][None]


def _biases(wiring: Wiring, known: np.ndarray, like: Tensor) -> Float[Tensor, "biases batch position d_model"]:
    """The output biases of the attention layers that are read."""
    graph = wiring.graph
    layers = [i for i in range(graph.n_layers) if known[graph.columns(i, "z").start]]
    found = [b for b in map(wiring.output_bias, layers) if b is not None]
    return torch.stack(found)[:, None, None].expand(-1, *like.shape) if found else like.new_zeros(0, *like.shape)


def _proximity(
    whole: Float[Tensor, "... d_model"], parts: Float[Tensor, "parts ... d_model"], least: float
) -> Float[Tensor, "parts ..."]:
    return (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp(min=least)


# ---------------------------------------------------------------- over tokens


@torch.no_grad()
def flow_routes(model: Model, prompt: str, threshold: float, *, position: int = -1) -> pd.DataFrame:
    """The published graph of one prompt: the edges above ``threshold`` that lead to one position of the last layer.

    One row per edge, from the top: ``layer``, ``kind`` ("attention", "attention skip", "mlp", "mlp skip"), ``source``
    and ``target`` (positions), ``importance`` (of attention: summed over heads) and ``head``, the head that brings
    most (missing elsewhere). An attention edge from ``source`` enters the stream before the layer's attention there.
    The threshold has no default, since a published one was not found; the authors' tool lets its users move it.

    Raises InterpError for a threshold outside [0, 1), or one that keeps nothing; ModelError where edges are not
    defined, or attention and MLP are parallel (the published graph has them one behind the other).
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise InterpError(f"threshold={threshold!r}: importances lie between 0 and 1; choose one below 1")
    wiring = Wiring(model)
    graph, ids = wiring.graph, model.coder.encode(prompt)
    if graph.parallel:
        raise InterpError(
            f"{model.name}: attention and MLPs are parallel, for which routes over tokens are not defined"
        )
    wiring.check(ids)
    if not -len(ids) <= position < len(ids):
        raise InterpError(f"position {position} is outside a prompt of {len(ids)} tokens")
    names = [f"blocks.{i}.hook_{n}" for i in range(graph.n_layers) for n in ("resid_pre", "attn_out")]
    names += [f"blocks.{i}.hook_mlp_out" for i in range(graph.n_layers)] * graph.mlps
    with capture_calls(model) as calls:
        acts = capture(model, [ids], names)
    rows: list[dict[str, Any]] = []
    reached = {position % len(ids)}
    for layer in reversed(range(graph.n_layers)):
        reached = _through_mlp(acts, layer, reached, threshold, rows) if graph.mlps else reached
        reached = _through_attention(wiring, calls[layer], acts, layer, reached, threshold, rows)
    if not rows:
        raise InterpError(f"the threshold {threshold:g} keeps no edge: choose a smaller one")
    found = pd.DataFrame(rows).astype({"head": "Int64"})
    found.attrs.update(model.provenance(), method="information flow routes", threshold=threshold, prompt=prompt)
    return found


def _through_mlp(acts: Any, layer: int, reached: set[int], threshold: float, rows: list[dict[str, Any]]) -> set[int]:
    out = acts[f"blocks.{layer}.hook_mlp_out"][0]
    before = (acts[f"blocks.{layer}.hook_resid_pre"] + acts[f"blocks.{layer}.hook_attn_out"])[0]
    near = _proximity(before + out, torch.stack([out, before]), EPSILON)
    share = (near / near.sum(0)).tolist()
    left: set[int] = set()
    for i in sorted(reached):
        for kind, importance in (("mlp", share[0][i]), ("mlp skip", share[1][i])):
            if importance > threshold:
                left.add(i)
                rows.append(_edge(layer, kind, i, i, importance))
    return left


def _through_attention(
    wiring: Wiring, call: AttentionCall, acts: Any, layer: int, reached: set[int], threshold: float,
    rows: list[dict[str, Any]],
) -> set[int]:  # fmt: skip
    before = acts[f"blocks.{layer}.hook_resid_pre"][0]
    whole, left = before + acts[f"blocks.{layer}.hook_attn_out"][0], set()
    for i in sorted(reached):
        heads = attention_parts(wiring, call, layer, whole, i)
        own = [before[i], *([] if (bias := wiring.output_bias(layer)) is None else [bias])]
        skip = _proximity(whole[i], torch.stack(own), EPSILON)
        total = heads.sum() + skip.sum()
        brought, best = (heads.sum(0) / total).tolist(), heads.argmax(0).tolist()
        for j, importance in enumerate(brought):
            if importance > threshold:
                left.add(j)
                rows.append(_edge(layer, "attention", j, i, importance, best[j]))
        if float(skip[0] / total) > threshold:
            left.add(i)
            rows.append(_edge(layer, "attention skip", i, i, float(skip[0] / total)))
    return left


def attention_parts(
    wiring: Wiring, call: AttentionCall, layer: int, whole: Float[Tensor, "position d_model"], i: int
) -> Float[Tensor, "heads keys"]:
    """Proximity of what each head brings to token ``i`` from each token; keys in stretches of `PART_BYTES`."""
    weights = _row(call, i)[0]  # [heads, keys]
    group, n = wiring.graph.n_heads // wiring.graph.n_kv_heads, weights.shape[1]
    values = call.v[0].repeat_interleave(group, 0)  # [heads, keys, d_head]
    step = max(1, PART_BYTES // (len(weights) * whole.shape[1] * whole.element_size()))
    found = []
    for start in range(0, n, step):
        here = slice(start, start + step)
        z = (weights[:, here, None] * values[:, here]).transpose(0, 1)  # [keys, heads, d_head]
        found.append(_proximity(whole[i], wiring.contributions(layer, z), EPSILON))
    return torch.cat(found, 1)


def _row(call: AttentionCall, i: int) -> Float[Tensor, "batch heads keys"]:
    """One query's attention, from the kernel's logsumexp: no pattern is formed."""
    found = pattern_rows(
        call.q, call.k, None, torch.tensor([i], device=call.q.device),
        causal=call.causal, window=call.window, softcap=call.softcap, scale=call.scale, bias=call.bias,
        sinks=call.sinks, key_padding=call.key_padding,
    )  # fmt: skip
    return found[:, :, 0].to(call.v)


def _edge(
    layer: int, kind: str, source: int, target: int, importance: float, head: int | None = None
) -> dict[str, Any]:
    return {
        "layer": layer, "kind": kind, "source": source, "target": target, "importance": importance, "head": head,
    }  # fmt: skip
