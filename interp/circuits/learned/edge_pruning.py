"""Edge pruning: a circuit of a chosen size, found by gradient descent on a gate for every edge at once.

Bhaskar et al. 2024 (arXiv 2406.16778). Every edge has a hard-concrete gate z: it carries z · current + (1 − z) · the
activation of the pair's corrupt run. Minimised: KL(model ‖ circuit) over next tokens, plus λ₁ (s − t) + λ₂ (s − t)²
with s the sparsity of the drawn gates and t a target that rises linearly from theirs at the start during the first
five sixths of the steps; λ₁ and λ₂ begin at 0 and rise by gradient ascent. As in the authors' GPT-2 scripts: Adam,
step 0.8 for gates and λ (warmed up over a fifteenth of the steps, then falling linearly to 0), batches of 32, a = 10
at the start, 3000 steps, no gates on nodes. Their target is the sparsity of drawn gates and not that of the result,
which is often less sparse: they go up to targets beyond 1. In the end as many edges are kept as are expected to be
open, those with the largest a; their loss reads all positions of the answer, which here is one token.

Native to grouped queries: an edge into k or v is one into a KV head. Memory and time:
`interp.circuits.learned.soft_forward`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture
from interp.circuits.circuit import Circuit
from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.inputs import token_batches
from interp.circuits.learned.hard_concrete import HardConcrete
from interp.circuits.learned.soft_forward import run_weighted
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, listed_prompts
from interp.recipes.inputs import provenance_of
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import progress
from interp.utils.provenance import now, prompt_hash

log = logging.getLogger("interp")
START = 10.0  # of every gate's a: open


@dataclass(frozen=True)
class Pruned:
    """What `prune_edges` found.

    ``scores``: the logit a of every edge's gate, which ranks edges beyond those kept. ``circuit``: the edges kept, with
    those scores. ``history``: by step, the KL in nats, the sparsity of the drawn gates, the target, λ₁ and λ₂.
    """

    scores: EdgeScores
    circuit: Circuit
    history: pd.DataFrame


def prune_edges(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
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
    """Gates on all edges by this module's recipe. ``sparsity``: the target, the share of edges to be closed.

    ``start``: a of every gate at the start. At the authors' 10 a gate is so far open that one draw in thousands has a
    gradient, which takes their thousands of steps; for a hundred, begin at 2. ``prune``: drop kept edges that are on
    no path from the input to the logits. Raises InterpError, PromptError or ModelError for bad input before the first
    step, and InterpError if nothing is left.
    """
    check_whole(1, steps=steps, batch_size=batch_size)
    check_seed(seed)
    check_positive(lr=lr)
    check_positive(1.2, sparsity=sparsity)
    check_positive(20, start=start)
    listed = listed_prompts(pairs)
    prompts = encode_pairs(listed, model.coder)
    if all(p.clean == p.corrupt for p in prompts):
        raise InterpError("clean and corrupt prompts are all the same: closing an edge would change nothing")
    wiring = Wiring(model)
    wiring.check(prompts[0].clean)
    fit = _Fit(wiring, prompts, sparsity, steps, lr, start, seed)
    with progress("prune edges", steps, show_progress) as advance:
        for batch in shuffled_batches(len(prompts), batch_size, steps, seed):
            fit.step([prompts[i] for i in batch])
            advance(1)
    made = {
        **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
        "method": "edge pruning", "evidence": "gates fitted to these prompts", "sparsity": sparsity,
        "steps": steps, "lr": lr, "start": start, "batch_size": batch_size, "seed": seed,
        "loss": "KL(model ‖ circuit) after the last token", "ablation": "counterfactual",
        "gates": "hard concrete, −0.1 to 1.1, temperature 2/3", **provenance_of(pairs),
    }  # fmt: skip
    return fit.result(made, prune)


class _Fit:
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
        self.pull = torch.zeros(2, dtype=dtype, device=self.model.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([
            {"params": [self.a], "lr": lr}, {"params": [self.pull], "lr": lr, "maximize": True},
        ])  # fmt: skip
        warm = max(1, steps // 15)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warm, max(0.0, (steps - i) / max(1, steps - warm)))
        )
        self.senders, self.history, self.begin = sender_hooks(wiring), [], 0.0

    def step(self, batch: Sequence[Encoded]) -> None:
        """One update: one draw of the gates for the whole batch."""
        done = min(1.0, len(self.history) / max(1.0, self.steps * 5 / 6))
        with torch.enable_grad(), without_weight_gradients(self.model):
            z = self.gates.sample(self.a, self.generator)
            if not self.history:  # a target below what gates begin with would first drive them open
                self.begin = float(1 - z.detach()[self.allowed].mean())
            target = self.begin + (self.sparsity - self.begin) * done
            leaf = z.detach().requires_grad_()  # one graph of the model at a time; the draw's is walked once, below
            divergence = 0.0
            for part in token_batches(batch):
                loss = self._divergence([batch[i] for i in part], leaf) / len(batch)
                divergence += require_finite(loss, "the divergence of model and circuit")
                loss.backward()
            gap = 1 - z[self.allowed].mean() - target
            (self.pull[0] * gap + self.pull[1] * gap**2).backward(retain_graph=True)
            z.backward(leaf.grad)
        facts = {"kl": divergence, "sparsity": float(gap.detach()) + target, "target": target}
        pull = self.pull.tolist()
        self.history.append({**facts, "lambda_1": pull[0], "lambda_2": pull[1]})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def _divergence(self, prompts: Sequence[Encoded], z: Float[Tensor, "receivers senders"]) -> Tensor:
        """KL(model ‖ circuit) after the last token, summed over prompts."""
        clean, corrupt = [p.clean for p in prompts], [p.corrupt for p in prompts]
        with torch.no_grad():
            whole = _log_probs(capture(self.model, clean, [])["logits"])
            ablated = capture(self.model, corrupt, self.senders)
        mine = _log_probs(run_weighted(self.wiring, clean, z, ablated))
        return (whole.exp() * (whole - mine)).sum()

    def result(self, made: dict[str, Any], prune: bool) -> Pruned:
        """As many edges as are expected to be open, by their a."""
        a = self.a.detach()
        n = round(float(self.gates.alive(a)[self.allowed].sum()))
        scores = EdgeScores(self.graph, a.double().cpu().numpy(), made)
        if n == 0:
            raise InterpError("every gate is closed: take a lower sparsity, or more steps")
        reached = 1 - n / len(self.graph)
        if reached < min(1.0, self.sparsity) - 0.1:
            log.warning(
                "edge pruning: %.1f%% of the edges stay, after %d steps, for a sparsity of %g: more steps are needed",
                100 * (1 - reached), self.steps, self.sparsity,
            )  # fmt: skip
        circuit = scores.top(n, absolute=False, prune=prune)
        circuit.provenance["selection"] = f"{n} edges, as many as gates are expected to be open"
        return Pruned(scores, circuit, pd.DataFrame(self.history))


def _log_probs(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
