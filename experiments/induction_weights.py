"""Composition and channels from an induction head to previous-token heads.

Run: python experiments/induction_weights.py [--json experiments/results/induction_weights.json] [--pairs 8]

Claim: weights alone, and the few directions that carry an attention score, lead from the key of an induction head to
the previous-token heads that it reads.

*Composition*: how much of what each earlier head writes is read by the key of the induction head L18H6 of the embedded
model, at distances of 4 to 12 tokens (RoPE). The unit is standard deviations above randomly rotated outputs; the mean
over distances is reported.

*Channels* (sparse attention decomposition): at each firing of L18H6 on induction prompts, how many singular directions
carry its score, and what share of them each earlier head wrote on the key's side.

Previous-token heads are those whose mean mass on the previous token of the same prompts is above 0.5.

Result (results/induction_weights.json, 6 pairs, 28 firings): of 162 earlier heads, L16H0 is second by composition
(z = 272) and writes 40% of the channels on the key's side, more than any other sender. A median of 3 singular
directions carries the score. The other previous-token heads rank 10 to 27 by composition.

Null: for the keys of all other heads of layers 17 and 18 that do not attend by induction, the median rank of L16H0 is
151, and those of the other previous-token heads are 58 to 80. With 20 random orthonormal bases in the place of the
singular one, a median of 5 directions carries the score.
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
from resource_meter import ResourceMeter

import interp
from interp.circuits import WeightCircuits, attention_channels
from interp.circuits.weights.channels import smallest_prefix
from interp.model.hooks import hooks
from interp.utils.provenance import now, versions

LAYER, HEAD = 18, 6
OFFSETS = (4, 8, 12)


def composition(weights: WeightCircuits, layer: int) -> np.ndarray:
    """Return z of the composition of every earlier head with the keys of a layer.

    The shape is [heads, earlier layers, heads].
    """
    total = 0.0
    for offset in OFFSETS:
        table: Any = weights.composition("k", offset=offset, layers=[layer])
        table = table.sort_values(["head", "sender_layer", "sender_head"])
        total = total + table["z"].to_numpy().reshape(weights.graph.n_heads, layer, weights.graph.n_heads)
    return np.asarray(total) / len(OFFSETS)


def rank(values: np.ndarray, site: tuple[int, int]) -> int:
    """Return the rank of one value; 1 is the largest."""
    return int((values > values[site]).sum()) + 1


def median_directions(model: interp.Model, weights: WeightCircuits, pairs: Any, firings: Any) -> dict[str, Any]:
    """Return how many directions carry the scores, in the singular and random bases."""
    norm, generator = weights.norms[LAYER], torch.Generator().manual_seed(0)
    counts: dict[str, list[int]] = {"singular": [], "random": []}
    for row in firings.itertuples():
        stream: list[Any] = []
        with (
            torch.no_grad(),
            hooks(model, (f"blocks.{LAYER}.hook_resid_pre", lambda x, hook, s=stream: s.append(x[0]))),
        ):
            model.last_logits([model.coder.encode(pairs[row.example].clean)])
        x = norm.scaled(stream[0])
        sides = [
            x[place] @ w + b
            for place, (w, b) in zip(
                (row.query, row.key), weights.rotated(LAYER, HEAD, int(row.query - row.key)), strict=True
            )
        ]
        counts["singular"].append(int(row.directions))
        for _ in range(20):
            basis, _ = torch.linalg.qr(torch.randn(len(sides[0]), len(sides[0]), generator=generator))
            counts["random"].append(len(smallest_prefix((sides[0] @ basis) * (sides[1] @ basis), 1.0)))
    return {name: float(np.median(x)) for name, x in counts.items()}


def main() -> None:
    """Compute composition and channels and their baselines, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = interp.load("smollm2")
    pairs = list(interp.tasks.induction(model, n=options.pairs, seed=0))
    stats = model.attention_stats(pairs, headstats.StatSpec(previous=True))
    mass = stats.per_head("previous")
    previous = [(int(i), int(h)) for i, h in np.argwhere(mass > 0.5) if i < LAYER - 1]
    with ResourceMeter() as meter:
        weights = WeightCircuits(model)
        z = {layer: composition(weights, layer) for layer in (LAYER - 1, LAYER)}
        channels = attention_channels(model, pairs, f"z.L{LAYER}H{HEAD}", show_progress=False)
    summary: Any = channels.summary()
    key = summary[summary["side"] == "key"].reset_index(drop=True)
    others = [(layer, h) for layer in z for h in range(model.n_heads) if (layer, h) not in ((18, 6), (17, 3), (17, 4))]
    heads = key[key["sender"].str.startswith("z.")].reset_index(drop=True)
    order = {s: i + 1 for i, s in enumerate(heads["sender"])}
    result = {
        "command": " ".join(["python", *sys.argv]), "made": now(), "model": model.provenance(), "device": "cpu",
        "versions": versions(), "pairs": len(pairs), "receiver": f"k of L{LAYER}H{HEAD}", "senders": len(order),
        "firings": len(channels.firings()),
        "median_directions": median_directions(model, weights, pairs, channels.firings()),
        "key_side": key.head(8)[["sender", "share", "kept"]].to_dict("records"),
        "query_side": summary[summary["side"] == "query"].head(4)[["sender", "share", "kept"]].to_dict("records"),
        "composition_top": [
            {"head": f"L{i // model.n_heads}H{i % model.n_heads}", "z": float(z[LAYER][HEAD].ravel()[i])}
            for i in np.argsort(-z[LAYER][HEAD].ravel())[:8]
        ],
        "previous_token_heads": [
            {"head": f"L{i}H{h}", "previous": float(mass[i, h]), "composition_z": float(z[LAYER][HEAD][i, h]),
             "composition_rank": rank(z[LAYER][HEAD], (i, h)),
             "rank_for_other_heads_median": float(np.median([rank(z[a][b], (i, h)) for a, b in others])),
             "channel_rank": order.get(f"z.L{i}H{h}"),
             "channel_share": float(heads["share"][order[f"z.L{i}H{h}"] - 1])}
            for i, h in previous
        ],
        **meter.facts(),
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "model")}, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
