"""Information-flow routes: each sender's share in a node's input.

They take neither gradients nor a second prompt. Ferrando and Voita 2024 (arXiv 2403.00824). In a vector w that is a sum
of parts, part p has

    proximity(p) = max(‖w‖₁ − ‖w − p‖₁, ε),    importance(p) = proximity(p) / Σ proximity

with ε = 1e-5, as in the authors' code (facebookresearch/llm-transparency-tool).

* `flow_scores` scores every edge sender → receiver, as in hannamw/EAP-IG: w is the residual stream that the receiver
  reads, and the parts are its senders' outputs. Negative proximities count as 0 (no ε), and importances are averaged
  over positions and examples. q, k and v of a layer read the same stream and have the same scores; query groups play no
  role.
* `flow_routes` is the published graph of one prompt, over tokens. For attention, w is the residual stream after it at a
  token; the parts are what every head moves from every token, A[i, j] · W_O v_j, and the stream before attention. For
  an MLP, w is the stream after it, and the parts are the MLP's output and the stream before it. Edges with more
  importance than a threshold are followed back from the last token of the last layer.

Output biases are separate parts: they count in w and in the sum, and belong to no edge. Importances are computed in the
raw residual stream, without the norms that read it. They measure a share of size, not a causal effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from headstats.patterns import pattern_rows
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture, capture_calls
from interp.circuits.inputs import Pairs, token_batches
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import weight_options
from interp.model.layer_progress import by_layer
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.pairs import encode_pairs, encode_prompt, listed_of_any_kind, listed_prompts
from interp.utils.progress import progress

EPSILON = 1e-5
PART_BYTES = 64 * 2**20  # of parts, d_model numbers each, that exist at one time


@in_session
@torch.no_grad()
def flow_scores(model: Model, pairs: Pairs) -> EdgeScores:
    """Score every edge by its importance in the clean prompts, between 0 and 1.

    The module docstring defines importance. Raises ModelError if the model's edges are not defined, and PromptError for
    bad prompts.
    """
    pair_list = listed_prompts(pairs)
    prompts = encode_pairs(pair_list, model.coder)
    wiring = Wiring.checked(model, prompts[0].clean)
    total = torch.zeros(wiring.graph.allowed.shape, dtype=torch.float64)
    with progress("information flow", len(prompts)) as advance:
        for batch in token_batches(prompts):
            with by_layer(model, advance, len(batch)):
                total += _edge_sums(wiring, [prompts[i].clean for i in batch])
    recipe = {"method": "information flow routes", "evidence": "share of size, without intervention"}
    return EdgeScores(
        wiring.graph, (total / len(prompts)).numpy(), {**prompt_provenance(model, pair_list, prompts), **recipe}
    )


def _edge_sums(wiring: Wiring, ids: list[Any]) -> Float[Tensor, "receivers senders"]:
    """Sum over prompts of the mean over positions of the importances."""
    graph = wiring.graph
    read_in_block = ["hook_resid_pre"]
    if graph.mlps and not graph.parallel:
        read_in_block.append("hook_attn_out")
    names = [f"blocks.{i}.{n}" for i in range(graph.n_layers) for n in read_in_block]
    final = f"blocks.{graph.n_layers - 1}.hook_resid_post"
    acts = capture(wiring.model, ids, list(dict.fromkeys([*sender_hooks(wiring), *names, final])))
    out = torch.zeros(graph.allowed.shape, dtype=torch.float64)
    for rows, stream in _streams(wiring, acts):
        is_read = torch.from_numpy(graph.allowed[rows[0].start])
        proximity = torch.zeros(len(graph.senders), *stream.shape[:2], dtype=torch.float64)
        for columns, parts in _parts(wiring, acts, is_read.numpy()):
            proximity[columns] = _proximity(stream, parts, 0.0).double().cpu()
        biases = _proximity(stream, _biases(wiring, is_read.numpy(), stream), 0.0).double().cpu()
        whole = proximity.sum(0) + biases.sum(0)
        mean = (proximity / whole.clamp(min=1e-30)).mean(2).sum(1)
        for receivers in rows:
            out[receivers] = torch.where(is_read, mean, 0.0)
    return out


def _streams(
    wiring: Wiring, acts: dict[str, Tensor]
) -> Iterator[tuple[list[slice], Float[Tensor, "batch position d_model"]]]:
    """Each residual stream that receivers read, with the rows of those receivers."""
    graph = wiring.graph
    for layer in range(graph.n_layers):
        stream = acts[f"blocks.{layer}.hook_resid_pre"]
        heads = slice(graph.rows(layer, "q").start, graph.rows(layer, "v").stop)
        if not graph.mlps:
            yield [heads], stream
        elif graph.parallel:
            yield [heads, graph.rows(layer, "mlp_out")], stream
        else:
            yield [heads], stream
            yield [graph.rows(layer, "mlp_out")], stream + acts[f"blocks.{layer}.hook_attn_out"]
    last = graph.n_layers - 1
    yield [graph.rows(last, "resid_post")], acts[f"blocks.{last}.hook_resid_post"]


def _parts(
    wiring: Wiring, acts: dict[str, Tensor], is_read: np.ndarray
) -> Iterator[tuple[slice, Float[Tensor, "senders batch position d_model"]]]:
    """The outputs of the senders that are read, with their columns.

    All heads of a layer come together.
    """
    graph = wiring.graph
    for sender, column in graph.sender_number.items():
        if not is_read[column] or (sender.component == "z" and sender.head):
            continue
        if sender.component == "z":
            columns, layer = graph.columns(sender.layer or 0, "z"), sender.layer or 0
            yield columns, wiring.contributions(layer, acts[sender.hook_name])
        else:
            yield slice(column, column + 1), acts[sender.hook_name][None]


def _biases(wiring: Wiring, is_read: np.ndarray, like: Tensor) -> Float[Tensor, "biases batch position d_model"]:
    """The output biases of the attention layers that are read."""
    graph = wiring.graph
    layers = [i for i in range(graph.n_layers) if is_read[graph.columns(i, "z").start]]
    biases = [b for b in map(wiring.output_bias, layers) if b is not None]
    return torch.stack(biases)[:, None, None].expand(-1, *like.shape) if biases else like.new_zeros(0, *like.shape)


def _proximity(
    whole: Float[Tensor, "... d_model"], parts: Float[Tensor, "parts ... d_model"], least: float
) -> Float[Tensor, "parts ..."]:
    """‖w‖₁ − ‖w − p‖₁ of each part p of w, at least ``least``."""
    return (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp(min=least)


# ---------------------------------------------------------------- over tokens


@in_session
@torch.no_grad()
def flow_routes(model: Model, prompt: str, threshold: float, *, position: int = -1) -> pd.DataFrame:
    """Trace the published graph of one prompt back from one position.

    The result has the edges above ``threshold`` that lead to this position of the last layer. Table with one row per
    edge, from the last layer down: ``layer``, ``kind`` ("attention", "attention skip", "mlp", "mlp skip"), ``source``
    and ``target`` (positions), ``importance`` (for attention: summed over heads) and ``head``, the head that
    contributes most (missing for other kinds). An attention edge starts at the stream before the layer's attention at
    position ``source``. The threshold has no default because we know of no published one; the authors' tool lets its
    users move it.

    Raises InterpError for a threshold outside [0, 1) or one that keeps no edge, ModelError if the model's edges are not
    defined, and InterpError if attention and MLP are parallel (in the published graph they follow one another).
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise InterpError(f"threshold={threshold!r}: expected a number from 0 to below 1, the range of importances")
    wiring = Wiring(model)
    graph, ids = wiring.graph, encode_prompt(listed_of_any_kind([prompt])[0], model.coder)
    if graph.parallel:
        raise InterpError(f"{model.name}: attention and MLPs are parallel, so routes over tokens are not defined")
    wiring.check(ids)
    if not -len(ids) <= position < len(ids):
        raise InterpError(f"position {position} is outside a prompt of {len(ids)} tokens")
    names = [f"blocks.{i}.hook_{n}" for i in range(graph.n_layers) for n in ("resid_pre", "attn_out")]
    if graph.mlps:
        names += [f"blocks.{i}.hook_mlp_out" for i in range(graph.n_layers)]
    with capture_calls(model) as calls:
        acts = capture(model, [ids], names)
    rows: list[dict[str, Any]] = []
    reached = {position % len(ids)}
    for layer in reversed(range(graph.n_layers)):
        reached = _through_mlp(acts, layer, reached, threshold, rows) if graph.mlps else reached
        reached = _through_attention(wiring, calls[layer], acts, layer, reached, threshold, rows)
    if not rows:
        raise InterpError(f"the threshold {threshold:g} keeps no edge: choose a smaller one")
    table = pd.DataFrame(rows).astype({"head": "Int64"})
    table.attrs.update(model.provenance(), method="information flow routes", threshold=threshold, prompt=prompt)
    return table


def _through_mlp(
    acts: dict[str, Tensor], layer: int, reached: set[int], threshold: float, rows: list[dict[str, Any]]
) -> set[int]:
    """Follow the routes at ``reached`` positions back through an MLP.

    Appends edges to ``rows``, and returns the positions that are left.
    """
    out = acts[f"blocks.{layer}.hook_mlp_out"][0]
    before = (acts[f"blocks.{layer}.hook_resid_pre"] + acts[f"blocks.{layer}.hook_attn_out"])[0]
    proximity = _proximity(before + out, torch.stack([out, before]), EPSILON)
    share = (proximity / proximity.sum(0)).tolist()
    left: set[int] = set()
    for i in sorted(reached):
        for kind, importance in (("mlp", share[0][i]), ("mlp skip", share[1][i])):
            if importance > threshold:
                left.add(i)
                rows.append(_edge(layer, kind, i, i, importance))
    return left


def _through_attention(
    wiring: Wiring, call: AttentionCall, acts: dict[str, Tensor], layer: int, reached: set[int], threshold: float,
    rows: list[dict[str, Any]],
) -> set[int]:  # fmt: skip
    """Follow the routes at ``reached`` positions back through attention.

    Otherwise as `_through_mlp`.
    """
    before = acts[f"blocks.{layer}.hook_resid_pre"][0]
    whole, left = before + acts[f"blocks.{layer}.hook_attn_out"][0], set()
    bias = wiring.output_bias(layer)
    for i in sorted(reached):
        heads = attention_parts(wiring, call, layer, whole, i)
        other_parts = [before[i]] if bias is None else [before[i], bias]
        skip = _proximity(whole[i], torch.stack(other_parts), EPSILON)
        total = heads.sum() + skip.sum()
        by_key, best_head = (heads.sum(0) / total).tolist(), heads.argmax(0).tolist()
        for j, importance in enumerate(by_key):
            if importance > threshold:
                left.add(j)
                rows.append(_edge(layer, "attention", j, i, importance, best_head[j]))
        if float(skip[0] / total) > threshold:
            left.add(i)
            rows.append(_edge(layer, "attention skip", i, i, float(skip[0] / total)))
    return left


def attention_parts(
    wiring: Wiring, call: AttentionCall, layer: int, whole: Float[Tensor, "position d_model"], i: int
) -> Float[Tensor, "heads keys"]:
    """Proximity of what each head moves to token ``i`` from each token.

    Keys are processed in chunks of `PART_BYTES`.
    """
    weights = _row(call, i)[0]  # [heads, keys]
    group, n = wiring.graph.n_heads // wiring.graph.n_kv_heads, weights.shape[1]
    values = call.v[0].repeat_interleave(group, 0)  # [heads, keys, d_head]
    step = max(1, PART_BYTES // (len(weights) * whole.shape[1] * whole.element_size()))
    chunks = []
    for start in range(0, n, step):
        keys = slice(start, start + step)
        z = (weights[:, keys, None] * values[:, keys]).transpose(0, 1)  # [keys, heads, d_head]
        chunks.append(_proximity(whole[i], wiring.contributions(layer, z), EPSILON))
    return torch.cat(chunks, 1)


def _row(call: AttentionCall, i: int) -> Float[Tensor, "batch heads keys"]:
    """One query's attention, computed by the kernel without the whole pattern.

    It uses the kernel's logsumexp.
    """
    if any(e.edit.gate is not None or e.edit.replacement is not None for edits in call.without_masks() for e in edits):
        raise InterpError("routes are read from attention weights, and an edit gates or replaces a head's output")
    pattern = pattern_rows(call.q, call.k, None, torch.tensor([i], device=call.q.device), **weight_options(call))
    return pattern[:, :, 0].to(call.v)


def _edge(
    layer: int, kind: str, source: int, target: int, importance: float, head: int | None = None
) -> dict[str, Any]:
    """A row of the table of `flow_routes`."""
    return {
        "layer": layer, "kind": kind, "source": source, "target": target, "importance": importance, "head": head,
    }  # fmt: skip
