"""Differential masking of heads (DiffMask+): the K heads that, put into their counterfactual state, flip an answer.

Chintam et al. 2023 (arXiv 2310.12611), after De Cao et al. At the last token, head i's output becomes (1 − m_i) · its
own + m_i · that of the pair's corrupt run, with m a stretched binary concrete gate (−0.2 to 1, temperature 0.2), drawn
for every example. Minimised, as in the authors' code:

mean over the vocabulary of KL(Bernoulli(σ(clean logits)) ‖ Bernoulli(σ(masked logits))), to change little else,
+ P_clean(answer) / P_masked(foil), to say the foil in place of the answer,
+ λ (E[number of masked heads] − K), with λ ≥ 0 (from 1, at most 200) rising by gradient ascent until the budget holds.

Their settings: K = 10, Adam with step 0.001 for gates and λ, 200 epochs, batches of 32, gates' locations 0 at the
start. Masks go through the attention kernel (`headstats.Edit(gate=, replacement=)`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import headstats
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture
from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.inputs import token_batches
from interp.circuits.learned.hard_concrete import HardConcrete
from interp.circuits.learned.next_token import Unembedding
from interp.errors import InterpError, PromptError
from interp.model.attention_call import AttentionCall
from interp.model.instrument import attend
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, listed_prompts
from interp.recipes.inputs import provenance_of
from interp.sites import Site
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import progress
from interp.utils.provenance import now, prompt_hash

MOST = 200.0  # of λ
SMALL = 1e-5  # added to probabilities within logarithms, as in the authors' code


@dataclass(frozen=True)
class HeadMasks:
    """P(masked) of every head, [layers, heads], the budget ``k`` and what made them; ``layers``: their numbers."""

    masked: Float[np.ndarray, "layers heads"]
    layers: list[int]
    provenance: dict[str, Any]

    def frame(self) -> pd.DataFrame:
        """One row per head, most masked first: layer, head, masked."""
        i, h = np.meshgrid(self.layers, np.arange(self.masked.shape[1]), indexing="ij")
        table = pd.DataFrame({"layer": i.ravel(), "head": h.ravel(), "masked": self.masked.ravel()})
        return table.sort_values("masked", ascending=False, kind="stable").reset_index(drop=True)

    def chosen(self, threshold: float = 0.5) -> list[Site]:
        """Heads that are masked with at least this probability, most masked first."""
        rows: Any = self.frame()
        return [Site("z", int(r.layer), int(r.head)) for r in rows.itertuples() if r.masked >= threshold]


def differential_masks(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    k: int = 10,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    show_progress: bool | None = None,
) -> HeadMasks:
    """Which ``k`` heads flip answer to foil when, at the last token, they are as in the corrupt run.

    ``steps``: updates (authors: 200 epochs). At their step of 0.001 the gates of a budget settle slowly: hundreds of
    steps need a larger ``lr``. Raises InterpError, PromptError or ModelError for bad input before the first of them.
    """
    check_whole(1, len(model.attention_layers) * model.n_heads, k=k)  # heads of the model
    check_whole(1, steps=steps, batch_size=batch_size)
    check_seed(seed)
    check_positive(lr=lr)
    listed = listed_prompts(pairs)
    prompts = encode_pairs(listed, model.coder)
    if any(p.foil is None for p in prompts):
        raise PromptError("every pair needs a foil: masks are to make the model say it in place of the answer")
    if all(p.clean == p.corrupt for p in prompts):
        raise InterpError("clean and corrupt prompts are all the same: masking a head would change nothing")
    Unembedding(model)  # refuses what is no decoder
    fit = _Fit(model, k, lr, seed)
    with progress("differential masks", steps, show_progress) as advance:
        for batch in shuffled_batches(len(prompts), batch_size, steps, seed):
            fit.step([prompts[i] for i in batch])
            advance(1)
    made = {
        **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
        "method": "differential masking of heads (DiffMask+)", "k": k, "steps": steps, "lr": lr, "seed": seed,
        "batch_size": batch_size, "lambda": float(fit.pull.detach()), "loss": fit.loss, "position": "last",
        "expected_masked": float(fit.masked().sum()), **provenance_of(pairs),
    }  # fmt: skip
    return HeadMasks(fit.masked().double().cpu().numpy(), model.attention_layers, made)


class _Fit:
    def __init__(self, model: Model, k: int, lr: float, seed: int):
        self.model, self.k, self.layers = model, k, model.attention_layers
        self.gates = HardConcrete(low=-0.2, high=1.0, temperature=0.2)
        self.generator = torch.Generator().manual_seed(seed)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        options: dict[str, Any] = {"dtype": dtype, "device": model.device, "requires_grad": True}
        self.location = torch.zeros(len(self.layers), model.n_heads, **options)
        self.pull = torch.ones((), **options)
        self.optimizers = [
            torch.optim.Adam([self.location], lr=lr),
            torch.optim.Adam([self.pull], lr=lr, maximize=True),
        ]
        self.loss = float("nan")

    def masked(self) -> Float[Tensor, "layers heads"]:
        """P(masked) of every head."""
        return self.gates.alive(self.location.detach())

    def step(self, batch: Sequence[Encoded]) -> None:
        """One update, a draw for every example."""
        total = 0.0
        with torch.enable_grad(), without_weight_gradients(self.model):
            for part in token_batches(batch):
                loss = self._flip([batch[i] for i in part]) / len(batch)
                total += require_finite(loss, "the loss of differential masking")
                loss.backward()
            (self.pull * (self.gates.alive(self.location).sum() - self.k)).backward()
        self.loss = total
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.pull.clamp_(0, MOST)

    def _flip(self, prompts: Sequence[Encoded]) -> Tensor:
        """Both parts of the loss, summed over prompts of one length."""
        other = self._outputs([p.corrupt for p in prompts])
        clean = _wide(capture(self.model, [p.clean for p in prompts], [])["logits"])
        draw = self.gates.sample(self.location.expand(len(prompts), -1, -1), self.generator)
        masked = _wide(self._run(prompts, draw, other))
        row = torch.arange(len(prompts))
        answer, foil = ([getattr(p, name) for p in prompts] for name in ("answer", "foil"))
        log_ratio = clean.log_softmax(-1)[row, answer] - masked.log_softmax(-1)[row, foil]
        return bernoulli_kl(clean, masked).mean(-1).sum() + log_ratio.exp().sum()

    @torch.no_grad()
    def _outputs(self, ids: Sequence[Sequence[int]]) -> dict[int, Float[Tensor, "batch heads position d_head"]]:
        """By layer, what attention gives for other prompts, where the masks act: inside the kernel's call."""
        found: dict[int, Tensor] = {}

        def keep(call: AttentionCall) -> Tensor:
            found[call.layer] = attend(call, backend=self.model.instrument.backend).out
            return found[call.layer]

        with self.model.instrument.handled_by(keep):
            self.model.last_logits(ids)
        return found

    def _run(
        self, prompts: Sequence[Encoded], draw: Float[Tensor, "batch layers heads"], other: dict[int, Tensor]
    ) -> Float[Tensor, "batch vocab"]:
        row = {layer: i for i, layer in enumerate(self.layers)}

        def mask(call: AttentionCall) -> Tensor:
            own = torch.ones(*call.q.shape[:3], dtype=call.q.dtype, device=call.q.device)
            at_end = (1 - draw[:, row[call.layer]]).to(own)[..., None]
            gate = torch.cat([own[..., :-1], at_end], dim=-1)
            edit = headstats.Edit(gate=gate, replacement=other[call.layer])
            return attend(call, backend=self.model.instrument.backend, edit=edit).out

        with self.model.instrument.handled_by(mask):
            return self.model.last_logits([p.clean for p in prompts])


def bernoulli_kl(
    clean: Float[Tensor, "*rows vocab"], masked: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows vocab"]:
    """KL between Bernoulli variables of two sets of logits, each entry of the vocabulary by itself."""
    p, q = clean.sigmoid(), masked.sigmoid()
    kept = p * ((p + SMALL).log() - (q + SMALL).log())
    return kept + (1 - p) * ((1 - p + SMALL).log() - (1 - q + SMALL).log())


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
