"""Which heads of the embedded model do learned gates call facilitating, and do exact ablations and other data agree?

Run: python experiments/head_gating.py [--json experiments/results/head_gating.json] [--steps 30] [--seeds 2]

Causal head gating on indirect objects, fitted to pairs of the split "train" and judged on pairs of the split "test",
which share neither name nor template with those. Three fits with the same settings: as given; with the pairs' answers
permuted (the same model, nothing to be found); with random weights (redrawn with the matrices' mean and deviation).
Of each fit: the loss with gates; how many heads are called what; the rank correlation over all heads of facilitation
with the exact effect of ablating each head alone (z set to 0, logit difference, test pairs, same weights), and how well
facilitation finds the 20 heads whose ablation hurts most (AUROC; chance is 0.5); and of the 12 most facilitating heads
and 12 others drawn at random, in how many the class is confirmed by toggling the gate on test pairs (sign-flip tests,
false discoveries at most 5%).

A head that others can stand in for need not stay open, and one that is needed only where others are shut does: the two
measures answer different questions, and agree in part.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from watching import Watch

import interp
from interp.circuits import causal_head_gating
from interp.circuits.interchange.interchange import random_weights
from interp.utils.provenance import now, versions

TOP, JUDGED = 20, 12


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks; what is equal has the mean of its ranks."""
    _, group, size = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """P(what is true outranks what is not), ties counting half."""
    true, other = scores[truth][:, None], scores[~truth]
    return float((true > other).mean() + (true == other).mean() / 2)


def harm(model: Any, pairs: Any) -> np.ndarray:
    """By how much the logit difference falls when each head alone is ablated, exactly: all heads in order."""
    lost: Any = interp.ablate(model, pairs, model.sites("z"), using="zero", show_progress=False).summary()
    return -lost.sort_values(["layer", "head"])["raw"].to_numpy()


def judged(model: Any, train: Any, test: Any, permute: bool, fit: dict[str, Any], hurts: np.ndarray) -> dict[str, Any]:
    """Fit, compare with ablation, toggle."""
    with Watch() as watch:
        gates = causal_head_gating(model, train, permute_targets=permute, show_progress=False, **fit)
    table: Any = gates.summary().sort_values(["layer", "head"])
    helps = table["facilitation"].to_numpy()
    most = np.zeros(len(hurts), dtype=bool)
    most[np.argsort(-hurts)[:TOP]] = True
    order = np.argsort(-helps)
    rest = np.random.default_rng(0).permutation(order[JUDGED:])[:JUDGED]
    sites = [interp.Site("z", int(i) // model.n_heads, int(i) % model.n_heads) for i in (*order[:JUDGED], *rest)]
    evidence: Any = gates.toggle(model, test, sites, show_progress=False)
    share = {"most_facilitating": slice(0, JUDGED), "others": slice(JUDGED, None)}
    return {
        "losses_nats": {k: float(np.mean(v)) for k, v in gates.provenance["losses"].items()}, "stuck": gates.stuck(),
        "classes": {str(k): int(v) for k, v in table["class"].value_counts().items()},
        "rank_correlation_with_ablation": float(np.corrcoef(ranks(helps), ranks(hurts))[0, 1]),
        f"auroc_of_{TOP}_heads_that_hurt_most": auroc(helps, most),
        "confirmed": {name: int(evidence["confirmed"].to_numpy()[rows].sum()) for name, rows in share.items()},
        "most_facilitating": [
            {"head": str(s), "facilitation": float(helps[i]), "ablation_hurts": float(hurts[i]),
             "toggle": float(evidence["difference"][row]), "confirmed": bool(evidence["confirmed"][row])}
            for row, (s, i) in enumerate(zip(sites[:JUDGED], order[:JUDGED], strict=True))
        ],
        "ablation_hurts_most": [
            {"head": str(interp.Site("z", int(i) // model.n_heads, int(i) % model.n_heads)), "hurts": float(hurts[i]),
             "facilitation": float(helps[i])} for i in np.argsort(-hurts)[:JUDGED]
        ],
        **watch.facts(),
    }  # fmt: skip


def main() -> None:
    """Fit three times, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=30, help="updates of each of the three fits")
    parser.add_argument("--seeds", type=int, default=2, help="sets of gates")
    parser.add_argument("--pairs", type=int, default=12, help="to fit on, and as many to judge on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = interp.load("smollm2")
    train, test = (interp.tasks.ioi(model, n=options.pairs, seed=0, split=s) for s in ("train", "test"))
    fit = {"steps": options.steps, "n_seeds": options.seeds, "batch_size": 6, "lr": 1.0, "lr_end": 0.1,
           "start": (0.9, 0.98)}  # fmt: skip
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "made": now(), "model": model.provenance(), "device": "cpu",
        "versions": versions(), "pairs": options.pairs, "fit": fit, "fits": {},
    }  # fmt: skip
    hurts = harm(model, test)
    for name in ("model", "permuted", "random"):
        with random_weights(model) if name == "random" else nullcontext():
            own = harm(model, test) if name == "random" else hurts
            result["fits"][name] = judged(model, train, test, name == "permuted", fit, own)
        print(name, json.dumps(result["fits"][name]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
