"""Is a circuit learned by edge pruning more faithful, on pairs it has not seen, than one of its size by EAP-IG?

Run: python experiments/learned_circuits.py [--json experiments/results/learned_circuits.json] [--minutes 12]

Indirect objects, the embedded model. Edge pruning's gates for all edges are fitted to pairs of the split "train" until
the budget of minutes is spent, with the steps that the time of a first one promises; EAP-IG (inputs, 5 steps) scores
the same pairs. At several numbers of edges, among them that at which the fit stopped, both rankings' best edges, pruned
to paths from input to logits, are judged on pairs of the split "test", which share neither name nor template with
those, beside random circuits of as many edges: faithfulness under counterfactual ablation, logit difference and KL,
with 95% bootstrap intervals over pairs.

The authors' settings take 3000 steps of 32 pairs, and this some dozens of one, from gates that begin half closed: what
comes out says what a budget of minutes buys, and nothing about what their method can do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from watching import Watch

import interp
from interp.circuits import attribute_edges, faithfulness, prune_edges
from interp.errors import InterpError
from interp.utils.provenance import now, versions

SIZES = (200, 1500, 5000)
FIT = {"sparsity": 1.0, "lr": 0.8, "start": 1.0, "batch_size": 1}


def fitted(model: Any, pairs: Any, minutes: float) -> tuple[Any, dict[str, Any]]:
    """Edge pruning within a budget of time."""
    begun = time.perf_counter()
    prune_edges(model, pairs, steps=1, show_progress=False, **FIT)
    one = time.perf_counter() - begun
    steps = max(2, int((60 * minutes - one) / one))
    print(f"a step takes {one:.1f} s: {steps} steps", file=sys.stderr, flush=True)
    with Watch() as watch:
        found = prune_edges(model, pairs, steps=steps, **FIT)
    last = {k: float(v) for k, v in found.history.iloc[-1].items()}
    open_edges = round((1 - last["sparsity"]) * len(found.scores))  # of the last draw
    stopped = {"edges_drawn_open": open_edges, "edges_kept": int(found.circuit.provenance["selected_edges"])}
    return found.scores, {"steps": steps, **FIT, **stopped, "last": last, **watch.facts()}


def judged(model: Any, pairs: Any, scores: Any, absolute: bool, sizes: Any) -> list[dict[str, Any]]:
    """Faithfulness of the best edges of a ranking, by size, and of random circuits of as many."""
    rows = []
    for size in sizes:
        try:
            circuit = scores.top(size, absolute=absolute)
        except InterpError:
            rows.append({"asked": size, "edges": 0})  # no path from input to logits
            continue
        row: dict[str, Any] = {"asked": size, "edges": len(circuit)}
        for metric in ("logit_diff", "kl"):
            f = faithfulness(model, pairs, circuit, metric, n_random=5)
            row[metric] = {
                "faithfulness": [f.value, f.lo, f.hi], "random": [float(f.random.mean()), float(f.random.max())],
                "circuit": float(np.mean(f.circuit)), "whole": float(np.mean(f.whole)), "p": f.p,
            }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Fit, score, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=12, help="of fitting gates")
    parser.add_argument("--pairs", type=int, default=24, help="to fit on, and as many to judge on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = interp.load("smollm2")
    train, test = (interp.tasks.ioi(model, n=options.pairs, seed=0, split=s) for s in ("train", "test"))
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "made": now(), "model": model.provenance(), "device": "cpu",
        "versions": versions(), "pairs": options.pairs, "threads": options.threads, "methods": {},
    }  # fmt: skip
    with Watch() as watch:
        scores = attribute_edges(model, train, steps=5, show_progress=False)
    learned, facts = fitted(model, train, options.minutes)
    sizes = sorted({*SIZES, facts["edges_kept"]})
    by_gradient, by_fit = judged(model, test, scores, True, sizes), judged(model, test, learned, False, sizes)
    result["methods"]["eap-ig-inputs"] = {**watch.facts(), "circuits": by_gradient}
    result["methods"]["edge pruning"] = {**facts, "circuits": by_fit}
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
