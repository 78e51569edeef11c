"""Baseline scores of edges: random numbers, and the size of senders' outputs.

An attribution method has to beat them.
"""

from __future__ import annotations

import numpy as np
import torch

from interp.circuits.capture import capture
from interp.circuits.inputs import Pairs, token_batches
from interp.circuits.scores import EdgeScores
from interp.circuits.topology import architecture
from interp.circuits.wiring import Wiring, sender_hooks
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.pairs import encode_pairs, listed_prompts


def random_scores(model: Model, seed: int = 0) -> EdgeScores:
    """Scores drawn uniformly from [0, 1)."""
    graph = architecture(model)
    drawn = np.random.default_rng(seed).random(graph.allowed.shape)
    return EdgeScores(graph, drawn, {**model.provenance(), "method": "random", "seed": seed})


@in_session
def magnitude_scores(model: Model, pairs: Pairs, seed: int = 0) -> EdgeScores:
    """Score edges by how much the sender's output differs between the prompts.

    No gradients are used. The score is the mean over examples of the Euclidean norm over [positions × d_model] of clean
    − corrupt. It is the same for all edges of a sender; ``seed`` draws the order among them.
    """
    pairs = listed_prompts(pairs)
    prompts = encode_pairs(pairs, model.coder)
    wiring = Wiring.checked(model, prompts[0].clean)
    graph, names = wiring.graph, sender_hooks(wiring)
    size = torch.zeros(len(graph.senders), dtype=torch.float64)
    for batch in token_batches(prompts):
        clean = capture(model, [prompts[i].clean for i in batch], names)
        corrupt = capture(model, [prompts[i].corrupt for i in batch], names)
        change = {name: clean[name] - corrupt[name] for name in names}
        size[0] += _norms(change["blocks.0.hook_resid_pre"][None])[0]
        for layer in range(graph.n_layers):
            z = wiring.contributions(layer, change[f"blocks.{layer}.attn.hook_z"])
            size[graph.columns(layer, "z")] += _norms(z)
            if graph.mlps:
                size[graph.columns(layer, "mlp_out")] += _norms(change[f"blocks.{layer}.hook_mlp_out"][None])
    matrix = np.broadcast_to((size / len(prompts)).numpy(), graph.allowed.shape)
    ties = 1 + 1e-9 * np.random.default_rng(seed).random(graph.allowed.shape)
    recipe = {"method": "magnitude", "seed": seed}
    return EdgeScores(graph, matrix * ties, {**prompt_provenance(model, pairs, prompts), **recipe})


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Per sender, the sum over the batch of norms over position and d_model.

    Float64, on the CPU.
    """
    return x.flatten(2).double().norm(dim=2).sum(1).cpu()
