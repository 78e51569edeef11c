"""Names for the nodes of a circuit, from evidence: where a head attends, and what it does to the metric.

A head is named only if both hold: a share of attention of at least ``attention`` on the tokens that a role is about,
and an exact effect of at least ``effect`` of the whole model's. Rules, the first that holds:

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
    inhibition            at the last position, on tokens that the prompt     of its edges into queries of other heads
                          holds twice
    sink                  on the first token                                  of all its edges, below ``effect``
    ====================  ==================================================  =======================================

Everything else is "unknown". Effects are shares of m(M) − m(∅): by how much the metric falls, exactly, if the edges
named carry the corrupt activation in the clean run. Attention is that of the clean prompts. The numbers are stored with
the role: ``circuit.evidence[site]``. A name says what these measurements say, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from headstats.patterns import pattern_rows
from jaxtyping import Bool
from torch import Tensor

from interp.circuits.attribution.nodes import attribute_sites
from interp.circuits.capture import capture_calls
from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.inputs import token_batches
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.attention_call import AttentionCall
from interp.model.model import Model
from interp.prompts.pairs import PromptPair
from interp.sites import Site

UNKNOWN = "unknown"
ROWS = 256  # queries whose patterns exist at one time, of one layer
Pairs = PromptPair | Iterable[PromptPair]


@dataclass(frozen=True)
class Rule:
    """A role: the attention it needs, and the effect."""

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
    """The circuit with roles and their evidence for its heads (or some of them): see this module's first lines.

    ``evidence[site]`` holds the attention shares, the effects, the thresholds and ``pairs``, how many there were. Roles
    that the circuit had for these heads are replaced. Raises InterpError for thresholds outside (0, 1], or for sites
    that are no heads of the model.
    """
    for name, value in (("attention", attention), ("effect", effect)):
        if isinstance(value, bool) or not 0 < value <= 1:
            raise InterpError(f"{name}={value!r}: a share above 0 and at most 1")
    circuit.check(model)
    listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    chosen = [Site.parse(s) if isinstance(s, str) else s for s in (circuit.nodes() if heads is None else heads)]
    chosen = [s for s in chosen if s.component == "z"] if heads is None else chosen
    wrong = next((s for s in chosen if s.component != "z" or s not in circuit.graph.sender_number), None)
    if wrong is not None or not chosen:
        raise InterpError(f"{wrong or 'the circuit'} has no head to name: roles are given to heads (sites of z)")
    evaluate = Evaluator(model, listed, metric, "counterfactual")
    looks, does = attention_shares(evaluate, chosen), effects_by_route(evaluate, chosen)
    roles, evidence = dict(circuit.roles), dict(circuit.evidence)
    for site in chosen:
        roles[site] = _role(looks[site], does[site], attention, effect)
        evidence[site] = {
            "attention": looks[site], "effect": does[site], "pairs": len(listed),
            "thresholds": {"attention": attention, "effect": effect},
        }  # fmt: skip
    return circuit.annotated(roles=roles, evidence=evidence)


def _role(looks: dict[str, float], does: dict[str, float], attention: float, effect: float) -> str:
    for rule in RULES:
        if looks[rule.attention] >= attention and does[rule.effect] >= effect:
            return rule.role
        if rule.role == "name mover" and looks["answer"] >= attention and does["direct"] <= -effect:
            return "negative name mover"
    idle = abs(does["total"]) < effect and looks["first"] >= attention
    return "sink" if idle else UNKNOWN


# ---------------------------------------------------------------- where heads attend


def attention_shares(evaluate: Evaluator, heads: Sequence[Site]) -> dict[Site, dict[str, float]]:
    """Mean attention of heads on the keys of each rule, over the queries of the clean prompts that have such keys.

    NaN where no query has one. Patterns are rebuilt by the kernel from q and k, `ROWS` queries of a layer at a time.
    """
    total = {site: dict.fromkeys(_targets((0, 0), 0), 0.0) for site in heads}
    count = dict.fromkeys(_targets((0, 0), 0), 0)
    layers = sorted({s.layer or 0 for s in heads})
    for batch in token_batches(evaluate.prompts):
        prompts = [evaluate.prompts[i] for i in batch]
        ids = torch.tensor([list(p.clean) for p in prompts], device=evaluate.model.device)
        with torch.no_grad(), capture_calls(evaluate.model) as calls:
            evaluate.model.last_logits(ids)
        targets = [_targets(p.clean, p.answer) for p in prompts]
        for name in count:
            count[name] += sum(int(t[name].any(1).sum()) for t in targets)
        for layer in layers:
            here = [s for s in heads if s.layer == layer]
            _add_shares(total, here, calls[layer], targets, ids.shape[1])
    return {
        site: {name: x / count[name] if count[name] else float("nan") for name, x in found.items()}
        for site, found in total.items()
    }


def _add_shares(
    total: dict[Site, dict[str, float]], heads: Sequence[Site], call: AttentionCall,
    targets: Sequence[dict[str, Bool[Tensor, "n n"]]], n: int,
) -> None:  # fmt: skip
    for start in range(0, n, ROWS):
        rows = torch.arange(start, min(start + ROWS, n), device=call.q.device)
        pattern = pattern_rows(
            call.q, call.k, None, rows, causal=call.causal, window=call.window, softcap=call.softcap,
            scale=call.scale, bias=call.bias, sinks=call.sinks, key_padding=call.key_padding,
        ).cpu()  # fmt: skip
        for row, wanted in enumerate(targets):
            for name, mask in wanted.items():
                for site in heads:
                    total[site][name] += float(pattern[row, site.head][mask[start : start + len(rows)]].sum())


def _targets(ids: Sequence[int], answer: int) -> dict[str, Bool[Tensor, "n n"]]:
    """For each kind of target, which keys (columns) it has for each query (rows). The first token counts as a sink."""
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


# ---------------------------------------------------------------- what heads do


def effects_by_route(evaluate: Evaluator, heads: Sequence[Site]) -> dict[Site, dict[str, float]]:
    """Exact effects of heads' edges, all (``total``) and by where they lead, as shares of m(M) − m(∅).

    ``direct``: to the logits; ``via_q``, ``via_k``, ``via_v``: into heads' queries, keys, values; ``via_mlp``. Each set
    of edges carries the corrupt activation in a run of its own. InterpError if m(M) = m(∅).
    """
    graph, nothing = evaluate.graph, np.zeros(evaluate.graph.allowed.shape, dtype=bool)
    gap = evaluate.whole.mean() - evaluate(nothing).mean()
    if not abs(gap) > 1e-9 * max(np.abs(evaluate.whole).mean(), 1e-9):
        raise InterpError("the metric is the same in the clean and the corrupt run: no head can have an effect")
    routes = {"total": None, "direct": "resid_post", "via_q": "q", "via_k": "k", "via_v": "v", "via_mlp": "mlp_out"}
    leads = {
        name: np.array([component in (None, r.component) for r in graph.receivers])
        for name, component in routes.items()
    }
    found: dict[Site, dict[str, float]] = {site: {} for site in heads}
    asked, masks = [], []
    for site in heads:
        column = graph.sender_number[site]
        for name, rows in leads.items():
            cut = rows & graph.allowed[:, column]
            if not cut.any():
                found[site][name] = 0.0
                continue
            mask = graph.allowed.copy()
            mask[cut, column] = False
            asked.append((site, name))
            masks.append(mask)
    values = evaluate.many(np.stack(masks)).mean(1)
    for (site, name), value in zip(asked, values.tolist(), strict=True):
        found[site][name] = (float(evaluate.whole.mean()) - value) / float(gap)
    return {site: {name: by_name[name] for name in routes} for site, by_name in found.items()}


# ---------------------------------------------------------------- neurons


def score_neurons(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    *,
    k: int = 20,
    method: Any = "atp",
) -> Circuit:
    """The circuit with the ``k`` neurons of its MLPs whose attribution is largest: ``circuit.neurons[site]``.

    Scores are estimates by `attribute_sites` (mode "noise": the metric's change when the neuron is corrupted), their
    mean over pairs. Edges start and end at whole MLPs: neurons say what within one matters, and play no part when the
    model is run as the circuit. Raises InterpError for a circuit without MLPs.
    """
    circuit.check(model)
    layers = [s.layer for s in circuit.nodes() if s.component == "mlp_out"]
    if not layers or isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InterpError(f"k={k!r}, {len(layers)} MLPs: a circuit with an MLP, and a number from 1 on, are needed")
    sites = model.sites("mlp_post", layers=[x for x in layers if x is not None], positions="all")
    table: Any = attribute_sites(model, pairs, sites, metric, "noise", method=method).frame()
    means = table.groupby(["layer", "head"])["raw"].mean()
    best = means.reindex(means.abs().sort_values(ascending=False, kind="stable").index).head(k)
    neurons = {Site("mlp_post", int(layer), int(n)): float(x) for (layer, n), x in best.items()}
    return circuit.annotated(neurons=neurons)
