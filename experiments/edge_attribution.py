"""What edge attribution costs on the embedded model, and beside TransformerLens where that goes.

Run: python experiments/edge_attribution.py [CASE …] [--json experiments/results/edge_attribution.json]

* ``ioi``: EAP-IG, 5 steps, all edges, 64 IOI pairs.
* ``long``: EAP-IG, 5 steps, all edges, one pair of 2,048 tokens.
* ``peer``: EAP beside TransformerLens' ``attribution_patching`` on a GPT-2 of random weights (it refuses grouped
  queries), the same prompts in turn; a time counts only if every edge agrees within 1e-4 of the largest score.

Each case is a process of its own, whose resident memory is watched from the moment the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from watching import Watch

import interp
from interp.circuits import EdgeScores, attribute_edges
from interp.circuits.topology import architecture
from interp.sites import Edge, Site
from interp.utils.provenance import now, versions

THREADS, ROUNDS, TOLERANCE = 2, 3, 1e-4


def ioi() -> dict[str, Any]:
    """64 IOI pairs."""
    model = interp.load("smollm2")
    pairs = list(interp.tasks.ioi(model, n=64, seed=0))
    with Watch() as watch:
        scores = attribute_edges(model, pairs, steps=5, show_progress=False)
    return {"pairs": 64, "steps": 5, "edges": len(scores), "target_s": 180, "target_mib": 4096, **watch.facts()}


def long() -> dict[str, Any]:
    """One pair of 2,048 tokens."""
    model, draw = interp.load("smollm2"), random.Random(0)
    words = ["red", "blue", "green", "cat", "dog", "house", "tree", "river", "stone", "light"]
    text = " ".join(draw.choice(words) for _ in range(2046))
    pair = interp.PromptPair(f"{text} John", f"{text} Mary", " Mary", " John")
    tokens = len(model.coder.encode(pair.clean))
    with Watch() as watch:
        scores = attribute_edges(model, pair, steps=5, show_progress=False)
    return {"tokens": tokens, "steps": 5, "edges": len(scores), "target_mib": 8192, **watch.facts()}


def peer() -> dict[str, Any]:
    """EAP of both libraries on prompts of 16 tokens, in turn."""
    from transformer_lens.tools.analysis import attribution_patching as tl
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from interp.model.embedded import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=256, n_layer=6, n_head=8, n_positions=64)
    model = interp.load(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    pairs = list(interp.tasks.ioi(model, n=4, seed=0))
    names = {"embed": "resid_pre", "attn_head_out": "z", "mlp_in": "mlp_out", "logits": "resid_post"}

    def site(node: Any) -> Site:
        component = names.get(node.kind, node.kind.removesuffix("_input"))
        return Site(component, 0 if node.kind == "embed" else node.layer, node.head)

    def theirs() -> list[dict[Any, float]]:
        found = []
        for pair in pairs:
            tokens = [torch.tensor([model.coder.encode(t)]) for t in (pair.clean, pair.corrupt)]
            answer, foil = (model.coder.continuation(w)[0] for w in (pair.answer, pair.foil or ""))
            config = tl.EdgeAttributionConfig(granularity="edge")
            metric = lambda x, a=answer, f=foil: x[0, -1, a] - x[0, -1, f]  # noqa: E731
            found.append(tl.attribution_patch(model.bridge, *tokens, metric, config).edge_scores)
        return found

    def ours() -> EdgeScores:
        return attribute_edges(model, pairs, method="eap", mode="denoise", show_progress=False)

    ours(), theirs()  # once, for what is done once
    seconds: dict[str, list[float]] = {"interp": [], "transformer_lens": []}
    scores, listed = ours(), theirs()
    for _ in range(ROUNDS):
        for name, run in (("interp", ours), ("transformer_lens", theirs)):
            with Watch() as watch:
                run()
            seconds[name].append(watch.seconds)
    want = dict.fromkeys(architecture(model).edges(), 0.0)
    for found in listed:
        for (sender, receiver), score in found.items():
            want[Edge(site(sender), site(receiver))] += score / len(pairs)
    largest = max(map(abs, want.values()))
    gap = max(abs(scores[e] - x) for e, x in want.items()) / largest
    if not gap < TOLERANCE:
        raise SystemExit(f"interp and TransformerLens differ by {gap:.1e} of the largest score")
    ours_s, theirs_s = (statistics.median(s) for s in seconds.values())
    return {
        "peer": "transformer_lens attribution_patching, granularity='edge'", "pairs": len(pairs), "edges": len(scores),
        "model": repr(model), "gap": gap, "seconds": seconds, "ratio": theirs_s / ours_s,
    }  # fmt: skip


CASES = {"ioi": ioi, "long": long, "peer": peer}


def main() -> None:
    """Run the cases, print and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help="run the one case in this process, and print JSON alone")
    options = parser.parse_args()
    if wrong := set(options.cases) - set(CASES):
        parser.error(f"no such cases: {', '.join(sorted(wrong))}; there are {', '.join(CASES)}")
    if options.here:
        torch.set_num_threads(THREADS)
        print(json.dumps(CASES[options.cases[0]]()))
        return
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    for case in options.cases or CASES:
        command = [sys.executable, __file__, case, "--here"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[case] = json.loads(done.stdout.splitlines()[-1]) | {
            "made": now(), "command": " ".join(["python", *sys.argv]), "device": "cpu", "threads": THREADS,
            "versions": versions(),
        }  # fmt: skip
        shown = {k: v for k, v in result[case].items() if k not in ("versions", "command", "made")}
        print(case, json.dumps(shown), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
