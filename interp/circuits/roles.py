"""Name the heads of a circuit by evidence: their attention and their effects.

A head gets a role only if two conditions hold: at least the share ``attention`` of its attention is on the tokens that
the role is about, and its exact effect is at least the share ``effect`` of the whole model's. The first rule that holds
counts:

    ====================  ==================================================  =======================================
    role                  attention, mean over the queries concerned          effect
    ====================  ==================================================  =======================================
    induction             on the token after an earlier occurrence of the     of all its edges
                          query's token (queries that have one)
    duplicate token       on earlier occurrences of the query's token         of all its edges
                          (queries that have one)
    previous token        on the token before the query                       of all its edges
    name mover            at the last position, on the answer's token         of its edge to the logits; negative
                                                                              name mover if it is below −``effect``
    inhibition            at the last position, on tokens that occur twice    of its edges into queries of other heads
                          in the prompt
    sink                  on the first token                                  of all its edges, below ``effect``
    ====================  ==================================================  =======================================

Every other head is "unknown". Effects are shares of m(M) − m(∅): how much the metric falls, measured exactly, if the
edges in the table carry the corrupt activation in the clean run. Attention is that of the clean prompts. The numbers
are stored with the role, in ``circuit.evidence[site]``. A role states what these measurements show, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from headstats.patterns import pattern_rows
from jaxtyping import Bool
from torch import Tensor

from interp.circuits.attribution.nodes import attribute_sites
from interp.circuits.capture import capture_calls
from interp.circuits.choices import NodeMethod
from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.inputs import Pairs, token_batches
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import weight_options
from interp.model.layer_progress import by_layer
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.pairs import listed_prompts
from interp.sites import Site
from interp.utils.progress import Advance, progress

UNKNOWN = "unknown"
ROWS = 256  # queries of one layer whose attention patterns exist at one time


@dataclass(frozen=True)
class Rule:
    """A role, with the kind of attention and the kind of effect that it needs."""

    role: str
    attention: str
    effect: str


RULES = (
    Rule("induction", "after_earlier", "total"),
    Rule("duplicate token", "earlier", "total"),
    Rule("previous token", "previous", "total"),
    Rule("name mover", "answer", "direct"),
    Rule("inhibition", "repeated", "via_q"),
)


@in_session
def name_roles(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    *,
    attention: float = 0.4,
    effect: float = 0.05,
    heads: Sequence[Site | str] | None = None,
) -> Circuit:
    """Return the circuit with roles and evidence for its heads, or for ``heads``.

    The module docstring lists the rules. ``evidence[site]`` holds the attention shares, the effects, the thresholds and
    the number of ``pairs``. Roles that the circuit already has for these heads are replaced. Raises InterpError for
    thresholds outside (0, 1] and for sites that are not heads of the model.
    """
    for name, value in (("attention", attention), ("effect", effect)):
        if isinstance(value, bool) or not 0 < value <= 1:
            raise InterpError(f"{name}={value!r}: expected a share above 0 and at most 1")
    circuit.check(model)
    pairs = listed_prompts(pairs)
    sites = _heads_to_name(circuit, heads)
    evaluate = Evaluator(model, pairs, metric, "counterfactual")
    with progress("attention of heads", len(evaluate.prompts)) as advance:
        shares = attention_shares(evaluate, sites, advance)
    effects = effects_by_route(evaluate, sites)
    roles, evidence = dict(circuit.roles), dict(circuit.evidence)
    for site in sites:
        roles[site] = _role(shares[site], effects[site], attention, effect)
        evidence[site] = {
            "attention": shares[site], "effect": effects[site], "pairs": len(pairs),
            "thresholds": {"attention": attention, "effect": effect},
        }  # fmt: skip
    return circuit.annotated(roles=roles, evidence=evidence)


def _heads_to_name(circuit: Circuit, heads: Sequence[Site | str] | None) -> list[Site]:
    """The heads passed by the caller, or all heads of the circuit.

    Raises InterpError for other sites, or if there is none.
    """
    if heads is None:
        sites = [s for s in circuit.nodes() if s.component == "z"]
    else:
        sites = [Site.parse(s) if isinstance(s, str) else s for s in heads]
    no_head = next((s for s in sites if s.component != "z" or s not in circuit.graph.sender_number), None)
    if no_head is not None or not sites:
        raise InterpError(f"{no_head or 'the circuit'} has no head to name: only heads (sites of z) get roles")
    return sites


def _role(shares: dict[str, float], effects: dict[str, float], attention: float, effect: float) -> str:
    """The role of one head, from its attention shares and effects."""
    for rule in RULES:
        if shares[rule.attention] >= attention and effects[rule.effect] >= effect:
            return rule.role
        if rule.role == "name mover" and shares["answer"] >= attention and effects["direct"] <= -effect:
            return "negative name mover"
    is_sink = abs(effects["total"]) < effect and shares["first"] >= attention
    return "sink" if is_sink else UNKNOWN


# ---------------------------------------------------------------- where heads attend


def attention_shares(
    evaluate: Evaluator, heads: Sequence[Site], advance: Advance = lambda n: None
) -> dict[Site, dict[str, float]]:
    """Mean attention of heads on each kind of target key.

    The mean is over the queries of the clean prompts that have such keys. NaN if no query has one. The kernel rebuilds
    patterns from q and k, `ROWS` queries of a layer at a time.
    """
    total = {site: dict.fromkeys(_targets((0, 0), 0), 0.0) for site in heads}
    count = dict.fromkeys(_targets((0, 0), 0), 0)
    layers = sorted({s.layer or 0 for s in heads})
    for batch in token_batches(evaluate.prompts):
        prompts = [evaluate.prompts[i] for i in batch]
        refuse_vectors([p.clean for p in prompts], "roles are about equal tokens")
        ids = torch.tensor([list(p.clean) for p in prompts], device=evaluate.model.device)
        with torch.no_grad(), capture_calls(evaluate.model) as calls, by_layer(evaluate.model, advance, len(batch)):
            evaluate.model.last_logits(ids)
        targets = [_targets(p.clean, p.answer) for p in prompts]
        for name in count:
            count[name] += sum(int(t[name].any(1).sum()) for t in targets)
        for layer in layers:
            layer_heads = [s for s in heads if s.layer == layer]
            _add_shares(total, layer_heads, calls[layer], targets, ids.shape[1])
    return {
        site: {name: x / count[name] if count[name] else float("nan") for name, x in sums.items()}
        for site, sums in total.items()
    }


def _add_shares(
    total: dict[Site, dict[str, float]], heads: Sequence[Site], call: AttentionCall,
    targets: Sequence[dict[str, Bool[Tensor, "n n"]]], n: int,
) -> None:  # fmt: skip
    """Add the attention of heads of one layer to ``total``.

    The batch has prompts of n tokens.
    """
    for start in range(0, n, ROWS):
        rows = torch.arange(start, min(start + ROWS, n), device=call.q.device)
        pattern = pattern_rows(call.q, call.k, None, rows, **weight_options(call)).cpu()
        for row, masks in enumerate(targets):
            for name, mask in masks.items():
                for site in heads:
                    total[site][name] += float(pattern[row, site.head][mask[start : start + len(rows)]].sum())


def _targets(ids: Sequence[int], answer: int) -> dict[str, Bool[Tensor, "n n"]]:
    """Masks [query, key] of each kind of target.

    The first token is the sink, and no target of any other kind.
    """
    tokens, n = torch.tensor(list(ids)), len(ids)
    before = torch.ones(n, n, dtype=torch.bool).tril(-1)
    real = torch.arange(n) > 0
    earlier = (tokens[:, None] == tokens) & before & real & real[:, None]
    after = torch.zeros_like(earlier)
    after[:, 1:] = earlier[:, :-1]
    last = torch.zeros(n, n, dtype=torch.bool)
    last[-1:] = True
    repeated = ((tokens[:, None] == tokens).sum(1) > 1) & real
    previous = torch.ones(n, n, dtype=torch.bool).tril(-1).triu(-1)
    first = torch.zeros(n, n, dtype=torch.bool)
    first[1:, :1] = True
    return {
        "after_earlier": after & before, "earlier": earlier, "answer": last & (tokens == answer) & real,
        "repeated": last & repeated & (torch.arange(n) < n - 1), "previous": previous & real, "first": first,
    }  # fmt: skip


# ---------------------------------------------------------------- how heads affect the metric


def effects_by_route(evaluate: Evaluator, heads: Sequence[Site]) -> dict[Site, dict[str, float]]:
    """Exact effects of heads' edges, in total and by destination.

    Effects are shares of m(M) − m(∅); ``total`` is that of all edges. ``direct``: edges to the logits; ``via_q``,
    ``via_k``, ``via_v``: into heads' queries, keys, values; ``via_mlp``: into MLPs. Each set of edges carries the
    corrupt activation in a separate run. Raises InterpError if m(M) = m(∅).
    """
    graph, no_edges = evaluate.graph, np.zeros(evaluate.graph.allowed.shape, dtype=bool)
    whole, empty = float(evaluate.whole.mean()), float(evaluate(no_edges).mean())
    gap = whole - empty
    if not evaluate.has_gap(whole, empty):
        raise InterpError("the metric is the same in the clean and the corrupt run: no head can have an effect")
    routes = {"total": None, "direct": "resid_post", "via_q": "q", "via_k": "k", "via_v": "v", "via_mlp": "mlp_out"}
    route_rows = {
        name: np.array([component in (None, r.component) for r in graph.receivers])
        for name, component in routes.items()
    }
    effects: dict[Site, dict[str, float]] = {site: dict.fromkeys(routes, 0.0) for site in heads}
    masks: dict[tuple[Site, str], np.ndarray] = {}
    for site in heads:
        column = graph.sender_number[site]
        for name, rows in route_rows.items():
            cut = rows & graph.allowed[:, column]
            if cut.any():
                masks[site, name] = graph.allowed.copy()
                masks[site, name][cut, column] = False
    values = evaluate.many(np.stack(list(masks.values()))).mean(1)
    for (site, name), value in zip(masks, values.tolist(), strict=True):
        effects[site][name] = (float(evaluate.whole.mean()) - value) / float(gap)
    return effects


# ---------------------------------------------------------------- neurons


@in_session
def score_neurons(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    *,
    k: int = 20,
    method: NodeMethod = "atp",
) -> Circuit:
    """Return the circuit with scores of the ``k`` most important MLP neurons.

    They are the neurons of the circuit's MLPs with the largest attribution. ``circuit.neurons[site]`` is the mean over
    pairs of the estimate by `attribute_sites` with mode "noise": the change of the metric when the neuron is corrupted.
    Edges start and end at whole MLPs. Neuron scores only show what matters within an MLP; they have no influence when
    the model is run as the circuit. Raises InterpError for a circuit without MLPs.
    """
    circuit.check(model)
    layers = [s.layer for s in circuit.nodes() if s.component == "mlp_out"]
    if not layers or isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InterpError(f"k={k!r}, {len(layers)} MLPs: expected a circuit with an MLP, and a whole number from 1 on")
    sites = model.sites("mlp_post", layers=[x for x in layers if x is not None], positions="all")
    table: Any = attribute_sites(model, pairs, sites, metric, "noise", method=method).frame()
    means = table.groupby(["layer", "head"])["raw"].mean()
    best = means.reindex(means.abs().sort_values(ascending=False, kind="stable").index).head(k)
    neurons = {Site("mlp_post", int(layer), int(n)): float(x) for (layer, n), x in best.items()}
    return circuit.annotated(neurons=neurons)
