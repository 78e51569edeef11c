"""Edge pruning: find a circuit of a target size by gates on all edges.

The gates are fitted together by gradient descent. Bhaskar et al. 2024 (arXiv 2406.16778). Every edge has a
hard-concrete gate z: it carries z · current + (1 − z) · the activation of the pair's corrupt run. The loss is KL(model
‖ circuit) over next tokens, plus λ₁ (s − t) + λ₂ (s − t)². Here s is the sparsity of the drawn gates. The target t
rises linearly from their sparsity at the start during the first five sixths of the steps. λ₁ and λ₂ start at 0 and rise
by gradient ascent. As in the authors' GPT-2 scripts: Adam, step 0.8 for gates and λ (warmed up over a fifteenth of the
steps, then falling linearly to 0), batches of 32, a = 10 at the start, 3000 steps, no gates on nodes.

The authors' target is the sparsity of the drawn gates and not that of the result, which is often less sparse; they use
targets beyond 1. At the end, as many edges are kept as are expected to be open: those with the largest a. The authors'
loss reads all positions of the answer, which is one token here.

Grouped queries are supported: an edge into k or v is an edge into a KV head. For memory and time, see
`interp.circuits.learned.soft_forward`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture
from interp.circuits.circuit import Circuit
from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.inputs import Pairs, token_batches
from interp.circuits.learned.hard_concrete import HardConcrete
from interp.circuits.learned.soft_forward import run_weighted
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import encode_pairs, listed_prompts
from interp.recipes.inputs import provenance_of
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import progress

log = logging.getLogger("interp")
START = 10.0  # a of every gate at the start: open


@dataclass(frozen=True)
class Pruned:
    """The result of `prune_edges`.

    ``scores``: the logit a of every edge's gate, which also ranks the edges outside the circuit. ``circuit``: the edges
    kept, with those scores. ``history``: by step, the KL in nats, the sparsity of the drawn gates, the target, λ₁, λ₂.
    """

    scores: EdgeScores
    circuit: Circuit
    history: pd.DataFrame = field(repr=False)


@in_session
def prune_edges(
    model: Model,
    pairs: Pairs,
    *,
    sparsity: float = 0.97,
    steps: int = 3000,
    lr: float = 0.8,
    start: float = START,
    batch_size: int = 32,
    seed: int = 0,
    prune: bool = True,
    show_progress: bool | None = None,
) -> Pruned:
    """Learn gates on all edges, and return the circuit of the edges that stay open.

    The module docstring describes the method. ``sparsity``: the target, the share of edges to close. ``start``: a of
    every gate at the start. At the authors' 10, a gate is so far open that only one draw in thousands has a gradient,
    and a fit takes their thousands of steps; for a hundred steps, start at 2. ``prune``: drop the edges of the circuit
    that are on no path from the input to the logits. Raises InterpError, PromptError or ModelError for bad input before
    the first step, and InterpError if no edge is left.
    """
    check_whole(1, steps=steps, batch_size=batch_size)
    check_seed(seed)
    check_positive(lr=lr)
    check_positive(1.2, sparsity=sparsity)
    check_positive(20, start=start)
    pair_list = listed_prompts(pairs)
    prompts = encode_pairs(pair_list, model.coder)
    if all(p.clean == p.corrupt for p in prompts):
        raise InterpError("clean and corrupt prompts are all the same, so closing an edge changes nothing")
    wiring = Wiring.checked(model, prompts[0].clean)
    fit = _PruningFit(wiring, prompts, sparsity, steps, lr, start, seed)
    with progress("prune edges", steps, show_progress) as advance:
        for batch in shuffled_batches(len(prompts), batch_size, steps, seed):
            fit.step([prompts[i] for i in batch])
            advance(1)
    provenance = {
        **prompt_provenance(model, pair_list, prompts),
        "method": "edge pruning", "evidence": "gates fitted to these prompts", "sparsity": sparsity,
        "steps": steps, "lr": lr, "start": start, "batch_size": batch_size, "seed": seed,
        "loss": "KL(model ‖ circuit) after the last token", "ablation": "counterfactual",
        "gates": "hard concrete, −0.1 to 1.1, temperature 2/3", **provenance_of(pairs),
    }  # fmt: skip
    return fit.result(provenance, prune)


class _PruningFit:
    """A fit of the logits a of all gates, and of λ₁ and λ₂."""

    def __init__(
        self,
        wiring: Wiring,
        prompts: Sequence[Encoded],
        sparsity: float,
        steps: int,
        lr: float,
        start: float,
        seed: int,
    ) -> None:
        self.wiring, self.model, self.graph = wiring, wiring.model, wiring.graph
        self.sparsity, self.steps, self.gates = sparsity, steps, HardConcrete()
        self.generator = torch.Generator().manual_seed(seed)
        self.allowed = torch.from_numpy(self.graph.allowed).to(self.model.device)
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        noise = 0.01 * torch.randn(self.allowed.shape, generator=self.generator, dtype=dtype)
        self.a = (start + noise).to(self.model.device).requires_grad_()
        self.lambdas = torch.zeros(2, dtype=dtype, device=self.model.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([
            {"params": [self.a], "lr": lr}, {"params": [self.lambdas], "lr": lr, "maximize": True},
        ])  # fmt: skip
        warm = max(1, steps // 15)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warm, max(0.0, (steps - i) / max(1, steps - warm)))
        )
        self.senders, self.history, self.first_sparsity = sender_hooks(wiring), [], 0.0

    def step(self, batch: Sequence[Encoded]) -> None:
        """Update once, with one draw of the gates for the whole batch."""
        ramp = min(1.0, len(self.history) / max(1.0, self.steps * 5 / 6))
        with torch.enable_grad(), without_weight_gradients(self.model):
            z = self.gates.sample(self.a, self.generator)
            if not self.history:  # a target below the first draw's sparsity would first push the gates open
                self.first_sparsity = float(1 - z.detach()[self.allowed].mean())
            target = self.first_sparsity + (self.sparsity - self.first_sparsity) * ramp
            leaf = z.detach().requires_grad_()  # one graph of the model at a time; z's own graph is used once, below
            divergence = 0.0
            for part in token_batches(batch):
                loss = self._divergence([batch[i] for i in part], leaf) / len(batch)
                divergence += require_finite(loss, "the divergence of model and circuit")
                loss.backward()
            gap = 1 - z[self.allowed].mean() - target
            (self.lambdas[0] * gap + self.lambdas[1] * gap**2).backward(retain_graph=True)
            z.backward(leaf.grad)
        facts = {"kl": divergence, "sparsity": float(gap.detach()) + target, "target": target}
        lambdas = self.lambdas.tolist()
        self.history.append({**facts, "lambda_1": lambdas[0], "lambda_2": lambdas[1]})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def _divergence(self, prompts: Sequence[Encoded], z: Float[Tensor, "receivers senders"]) -> Tensor:
        """KL(model ‖ circuit) after the last token, summed over prompts."""
        clean, corrupt = [p.clean for p in prompts], [p.corrupt for p in prompts]
        with torch.no_grad():
            of_model = _log_probs(capture(self.model, clean, [])["logits"])
            ablated = capture(self.model, corrupt, self.senders)
        of_circuit = _log_probs(run_weighted(self.wiring, clean, z, ablated))
        return (of_model.exp() * (of_model - of_circuit)).sum()

    def result(self, provenance: dict[str, Any], prune: bool) -> Pruned:
        """The circuit of as many edges as are expected to be open, by largest a."""
        a = self.a.detach()
        n = round(float(self.gates.alive(a)[self.allowed].sum()))
        scores = EdgeScores(self.graph, a.double().cpu().numpy(), provenance)
        if n == 0:
            raise InterpError("every gate is closed: use a lower sparsity, or more steps")
        sparsity = 1 - n / len(self.graph)
        if sparsity < min(1.0, self.sparsity) - 0.1:
            log.warning(
                "edge pruning: %.1f%% of the edges stay after %d steps, for a target sparsity of %g: use more steps",
                100 * (1 - sparsity), self.steps, self.sparsity,
            )  # fmt: skip
        circuit = scores.top(n, absolute=False, prune=prune)
        circuit.provenance["selection"] = f"{n} edges, as many as gates are expected to be open"
        return Pruned(scores, circuit, pd.DataFrame(self.history))


def _log_probs(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities in float32, or float64."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
