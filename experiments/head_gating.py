"""Causal head gating on IOI, against exact ablation and toggling on other data.

Run: python experiments/head_gating.py [--json experiments/results/head_gating.json] [--steps 30] [--seeds 2]

Claim: the heads that learned gates call facilitating are those that exact ablation finds important, also on other data.

Causal head gating on indirect objects is fitted to pairs of the split "train" and judged on pairs of the split "test".
The two splits share no name and no template. Three fits use the same settings:

* ``model``: the embedded model as it is;
* ``permuted`` (null): the same model, with the answers of the pairs permuted, so that there is nothing to find;
* ``random`` (null): random weights, redrawn with the mean and standard deviation of each matrix.

For each fit the script reports

* the loss with gates, and the number of heads in each class;
* the rank correlation over all heads between facilitation and the exact effect of ablating each head alone (z set to 0,
  logit difference, test pairs, same weights);
* how well facilitation finds the 20 heads whose ablation hurts most (AUROC; chance is 0.5);
* among the 12 most facilitating heads and 12 others drawn at random, the number whose class is confirmed by toggling
  the gate on test pairs (sign-flip tests, false discovery rate at most 5%).

Result (results/head_gating.json: 8 pairs, one seed of 16 steps): the rank correlation is 0.29 and the AUROC 0.75; 3 of
the 12 most facilitating heads are confirmed, and 1 of the 12 others. Null: with permuted answers and with random
weights the correlations are 0.00 and 0.08, the AUROCs 0.55 and 0.63, and no head is confirmed.

The two measures answer different questions, so they agree only in part. A head that others can replace need not stay
open. A head that is needed only where others are closed does stay open.
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
from resource_meter import ResourceMeter

import interp
from interp.circuits import causal_head_gating
from interp.circuits.interchange.interchange import random_weights
from interp.utils.provenance import now, versions

TOP, JUDGED = 20, 12


def ranks(x: np.ndarray) -> np.ndarray:
    """Return ranks; equal values share the mean of their ranks."""
    _, group, size = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the probability that a true item outranks a false one; ties count half."""
    true, other = scores[truth][:, None], scores[~truth]
    return float((true > other).mean() + (true == other).mean() / 2)


def ablation_harm(model: interp.Model, pairs: Any) -> np.ndarray:
    """Return the fall of the logit difference when each head alone is ablated."""
    summary: Any = interp.ablate(model, pairs, model.sites("z"), using="zero", show_progress=False).summary()
    return -summary.sort_values(["layer", "head"])["raw"].to_numpy()


def fit_and_judge(
    model: interp.Model, train: Any, test: Any, permute: bool, fit: dict[str, Any], hurts: np.ndarray
) -> dict[str, Any]:
    """Fit gates, compare them with ablation, and toggle the gates of 24 heads."""
    with ResourceMeter() as meter:
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
        **meter.facts(),
    }  # fmt: skip


def main() -> None:
    """Fit three times, judge each fit, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=30, help="updates of each of the three fits")
    parser.add_argument("--seeds", type=int, default=2, help="number of sets of gates")
    parser.add_argument("--pairs", type=int, default=12, help="number of pairs to fit on; as many again to judge on")
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
    hurts = ablation_harm(model, test)
    for name in ("model", "permuted", "random"):
        with random_weights(model) if name == "random" else nullcontext():
            harm = ablation_harm(model, test) if name == "random" else hurts
            result["fits"][name] = fit_and_judge(model, train, test, name == "permuted", fit, harm)
        print(name, json.dumps(result["fits"][name]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
