"""Does edge attribution find the known induction head of the embedded model, and the previous-token heads it needs?

Run: python experiments/induction_circuit.py [--json experiments/results/induction_circuit.json] [--pairs 16]

Heads are named by what they attend to, in the same prompts (`headstats`: mass on the previous token; whether the last
word reads most the word after its earlier occurrence). Edges are scored by EAP-IG on inputs, 5 steps. Reported: the
rank of each head among all heads by the largest |score| of its edges; the smallest circuit (pruned top n) that contains
it; the rank, among the edges into the key of the induction head's group, of those from previous-token heads. A control
shuffles the scores among edges, 20 times. The null is a model of the same kind with random weights (four layers), three
seeds: the gain of the best circuit over random ones of the same size on pairs that were not scored, in standard errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import headstats
import numpy as np
import torch
from watching import Watch

import interp
from interp.circuits import EdgeScores, attribute_edges
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.evaluation.faithfulness import random_circuit
from interp.errors import InterpError
from interp.prompts.pairs import encode_pairs
from interp.sites import Site
from interp.utils.provenance import now, versions

INDUCTION = Site("z", 18, 6)
SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
EDGES = 500  # of the null's circuits


def heads_by_attention(model: Any, pairs: Any) -> dict[str, np.ndarray]:
    """[layers, heads]: mean mass on the previous token; in how many prompts the last word reads what followed it."""
    stats = model.attention_stats(pairs, headstats.StatSpec(previous=True))
    follows = [
        np.isin(stats.values["argmax"][i][..., -1], range(*encoded.spans["B1"]))
        for i, encoded in enumerate(encode_pairs(pairs, model.coder))
    ]
    return {"previous": stats.per_head("previous"), "induction": np.mean(follows, axis=0)}


def rank_of_heads(scores: EdgeScores) -> list[Site]:
    """Heads by the largest |score| of their outgoing edges, best first."""
    best = dict(zip(scores.graph.senders, np.nanmax(np.abs(scores.matrix), axis=0), strict=True))
    return sorted((s for s in best if s.component == "z"), key=lambda s: -best[s])


def smallest(scores: EdgeScores, site: Site) -> int | None:
    """The least n of `SIZES` whose pruned top-n circuit holds a node."""
    for n in SIZES:
        try:
            if site in scores.top(n).nodes():
                return n
        except InterpError:  # no path yet
            continue
    return None


def found(model: Any, pairs: Any) -> dict[str, Any]:
    """The embedded model's induction circuit."""
    with Watch() as watch:
        scores = attribute_edges(model, pairs, steps=5, show_progress=False)
    attends = heads_by_attention(model, pairs)
    previous = [Site("z", *map(int, at)) for at in np.argwhere(attends["previous"] > 0.5)]
    ranked = rank_of_heads(scores)
    key = Site("k", INDUCTION.layer, (INDUCTION.head or 0) // (model.n_heads // model.n_kv_heads))
    into = np.abs(scores.matrix[scores.graph.receiver_number[key]])
    order = [scores.graph.senders[i] for i in np.argsort(-np.where(np.isnan(into), -np.inf, into))]
    shuffled, generator = [], np.random.default_rng(0)
    for _ in range(20):
        matrix = scores.matrix.copy()
        matrix[scores.graph.allowed] = generator.permutation(matrix[scores.graph.allowed])
        shuffled.append(smallest(EdgeScores(scores.graph, matrix, {}), INDUCTION))
    early = [s for s in previous if (s.layer or 0) < (INDUCTION.layer or 0)]
    return {
        "induction_head": {
            "head": str(INDUCTION), "attends_to_what_followed": float(attends["induction"][18, 6]),
            "rank_of_270_heads": ranked.index(INDUCTION) + 1, "smallest_circuit": smallest(scores, INDUCTION),
            "smallest_circuit_shuffled": shuffled,
        },
        "previous_token_heads": [
            {"head": str(s), "previous": float(attends["previous"][s.layer or 0, s.head or 0]),
             "rank_of_270_heads": ranked.index(s) + 1, "smallest_circuit": smallest(scores, s),
             f"rank_into_{key}": order.index(s) + 1}
            for s in early
        ],
        "senders_into_key": [str(s) for s in order[:8]], "best_heads": [str(s) for s in ranked[:10]],
        "pairs": len(pairs), **watch.facts(),
    }  # fmt: skip


def null(seed: int, tokenizer: Any) -> dict[str, Any]:
    """A random model: what its best circuit gains on pairs that were scored, and on others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=144, intermediate_size=384, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = interp.load(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
    pairs = list(interp.tasks.induction(model, n=48, seed=seed))
    scores = attribute_edges(model, pairs[:8], steps=5, show_progress=False).helpful()
    best = scores.top(EDGES, absolute=False).mask()
    evaluate = Evaluator(model, pairs, interp.logit_diff, "counterfactual")
    generator = np.random.default_rng(seed)
    chance = np.mean([evaluate(random_circuit(scores.graph, int(best.sum()), generator)) for _ in range(5)], axis=0)
    gain = evaluate(best) - chance
    seen, unseen = (float(x.mean() / (x.std(ddof=1) / np.sqrt(len(x)))) for x in (gain[:8], gain[8:]))
    return {"seed": seed, "edges": int(best.sum()), "t_scored_pairs": seen, "t_other_pairs": unseen}


def main() -> None:
    """Find, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(2)
    model = interp.load("smollm2")
    result = {
        "command": " ".join(["python", *sys.argv]), "made": now(), "model": model.provenance(), "device": "cpu",
        "versions": versions(), **found(model, list(interp.tasks.induction(model, n=options.pairs, seed=0))),
        "null": [null(seed, model.tokenizer) for seed in range(3)],
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "model")}, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
