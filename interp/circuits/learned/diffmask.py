"""Differential masking of heads (DiffMask+): find K heads that flip an answer.

The heads flip it when they are set to their counterfactual state. Chintam et al. 2023 (arXiv 2310.12611), after De Cao
et al. At the last token, the output of head i becomes (1 − m_i) · its output + m_i · its output in the pair's corrupt
run. m is a stretched binary concrete gate (−0.2 to 1, temperature 0.2), drawn for every example. As in the authors'
code, the loss is the sum of three terms:

* the mean over the vocabulary of KL(Bernoulli(σ(clean logits)) ‖ Bernoulli(σ(masked logits))), to change little else;
* P_clean(answer) / P_masked(foil), to predict the foil instead of the answer;
* λ (E[number of masked heads] − K), with λ ≥ 0 (from 1, at most 200) rising by gradient ascent until the budget holds.

The authors' settings: K = 10, Adam with step 0.001 for gates and λ, 200 epochs, batches of 32, gates' locations 0 at
the start. Masks go through the attention kernel (`headstats.Edit(gate=, replacement=)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture
from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.inputs import Pairs, token_batches
from interp.circuits.learned.hard_concrete import HardConcrete
from interp.circuits.learned.next_token import Unembedding
from interp.errors import InterpError, PromptError
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend, attend_gated
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import encode_pairs, listed_prompts
from interp.recipes.inputs import provenance_of
from interp.sites import Site
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import progress

MAX_LAMBDA = 200.0
SMALL = 1e-5  # added to probabilities within logarithms, as in the authors' code


@dataclass(frozen=True)
class HeadMasks:
    """P(masked) of every head, [layers, heads], with provenance.

    ``layers``: the numbers of the layers.
    """

    masked: Float[np.ndarray, "layers heads"]
    layers: list[int]
    provenance: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        layers, heads = self.masked.shape
        return f"HeadMasks({len(self.chosen())} of {layers * heads} heads masked; k={self.provenance.get('k', '?')})"

    def frame(self) -> pd.DataFrame:
        """Table with one row per head, most masked first: layer, head, masked."""
        i, h = np.meshgrid(self.layers, np.arange(self.masked.shape[1]), indexing="ij")
        table = pd.DataFrame({"layer": i.ravel(), "head": h.ravel(), "masked": self.masked.ravel()})
        return table.sort_values("masked", ascending=False, kind="stable").reset_index(drop=True)

    def chosen(self, threshold: float = 0.5) -> list[Site]:
        """Heads masked with at least probability ``threshold``, most masked first."""
        rows: Any = self.frame()
        return [Site("z", int(r.layer), int(r.head)) for r in rows.itertuples() if r.masked >= threshold]


@in_session
def differential_masks(
    model: Model,
    pairs: Pairs,
    k: int = 10,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    show_progress: bool | None = None,
) -> HeadMasks:
    """Find ``k`` heads that flip the answer to the foil.

    They do so when, at the last token, they are as in the corrupt run. ``steps`` is the number of updates (authors: 200
    epochs). At the authors' step of 0.001, gates converge slowly, so a fit of hundreds of steps needs a larger ``lr``.
    Raises InterpError, PromptError or ModelError for bad input before the first update.
    """
    check_whole(1, len(model.attention_layers) * model.n_heads, k=k)  # heads of the model
    check_whole(1, steps=steps, batch_size=batch_size)
    check_seed(seed)
    check_positive(lr=lr)
    pair_list = listed_prompts(pairs)
    prompts = encode_pairs(pair_list, model.coder)
    if any(p.foil is None for p in prompts):
        raise PromptError("every pair needs a foil: masks are fitted to make the model predict it, not the answer")
    if all(p.clean == p.corrupt for p in prompts):
        raise InterpError("clean and corrupt prompts are all the same, so masking a head changes nothing")
    Unembedding(model)  # raises ModelError unless the model is a decoder
    fit = _MaskFit(model, k, lr, seed)
    with progress("differential masks", steps, show_progress) as advance:
        for batch in shuffled_batches(len(prompts), batch_size, steps, seed):
            fit.step([prompts[i] for i in batch])
            advance(1)
    provenance = {
        **prompt_provenance(model, pair_list, prompts),
        "method": "differential masking of heads (DiffMask+)", "k": k, "steps": steps, "lr": lr, "seed": seed,
        "batch_size": batch_size, "lambda": float(fit.penalty.detach()), "loss": fit.loss, "position": "last",
        "expected_masked": float(fit.masked().sum()), **provenance_of(pairs),
    }  # fmt: skip
    return HeadMasks(fit.masked().double().cpu().numpy(), model.attention_layers, provenance)


class _MaskFit:
    """A fit of the locations of all gates, and of λ."""

    def __init__(self, model: Model, k: int, lr: float, seed: int):
        self.model, self.k, self.layers = model, k, model.attention_layers
        self.gates = HardConcrete(low=-0.2, high=1.0, temperature=0.2)
        self.generator = torch.Generator().manual_seed(seed)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        options: dict[str, Any] = {"dtype": dtype, "device": model.device, "requires_grad": True}
        self.location = torch.zeros(len(self.layers), model.n_heads, **options)
        self.penalty = torch.ones((), **options)  # λ
        self.optimizers = [
            torch.optim.Adam([self.location], lr=lr),
            torch.optim.Adam([self.penalty], lr=lr, maximize=True),
        ]
        self.loss = float("nan")

    def masked(self) -> Float[Tensor, "layers heads"]:
        """P(masked) of every head."""
        return self.gates.alive(self.location.detach())

    def step(self, batch: Sequence[Encoded]) -> None:
        """Update once, with one draw of the gates for every example."""
        total = 0.0
        with torch.enable_grad(), without_weight_gradients(self.model):
            for part in token_batches(batch):
                loss = self._loss([batch[i] for i in part]) / len(batch)
                total += require_finite(loss, "the loss of differential masking")
                loss.backward()
            (self.penalty * (self.gates.alive(self.location).sum() - self.k)).backward()
        self.loss = total
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.penalty.clamp_(0, MAX_LAMBDA)

    def _loss(self, prompts: Sequence[Encoded]) -> Tensor:
        """The first two terms of the loss, summed over prompts of one length."""
        corrupt = self._attention_outputs([p.corrupt for p in prompts])
        clean = _wide(capture(self.model, [p.clean for p in prompts], [])["logits"])
        draw = self.gates.sample(self.location.expand(len(prompts), -1, -1), self.generator)
        masked = _wide(self._run(prompts, draw, corrupt))
        row = torch.arange(len(prompts))
        answer, foil = ([getattr(p, name) for p in prompts] for name in ("answer", "foil"))
        log_ratio = clean.log_softmax(-1)[row, answer] - masked.log_softmax(-1)[row, foil]
        return bernoulli_kl(clean, masked).mean(-1).sum() + log_ratio.exp().sum()

    @torch.no_grad()
    def _attention_outputs(
        self, ids: Sequence[Sequence[int]]
    ) -> dict[int, Float[Tensor, "batch heads position d_head"]]:
        """By layer, the output of the attention kernel, where the masks act."""
        outputs: dict[int, Tensor] = {}

        def record(call: AttentionCall) -> Tensor:
            outputs[call.layer] = attend(call, backend=self.model.instrument.backend).out
            return outputs[call.layer]

        with self.model.instrument.handled_by(record):
            self.model.last_logits(ids)
        return outputs

    def _run(
        self, prompts: Sequence[Encoded], draw: Float[Tensor, "batch layers heads"], corrupt: dict[int, Tensor]
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of the clean prompts with heads masked at the last token."""
        row = {layer: i for i, layer in enumerate(self.layers)}

        def mask(call: AttentionCall) -> Tensor:
            ones = torch.ones(*call.q.shape[:3], dtype=call.q.dtype, device=call.q.device)
            at_end = (1 - draw[:, row[call.layer]]).to(ones)[..., None]
            gate = torch.cat([ones[..., :-1], at_end], dim=-1)
            return attend_gated(call, gate, corrupt[call.layer], backend=self.model.instrument.backend)

        with self.model.instrument.handled_by(mask):
            return self.model.last_logits([p.clean for p in prompts])


def bernoulli_kl(
    clean: Float[Tensor, "*rows vocab"], masked: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows vocab"]:
    """KL between the Bernoulli variables of two sets of logits.

    It is computed separately for each entry of the vocabulary.
    """
    p, q = clean.sigmoid(), masked.sigmoid()
    if_one = p * ((p + SMALL).log() - (q + SMALL).log())
    return if_one + (1 - p) * ((1 - p + SMALL).log() - (1 - q + SMALL).log())


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, or float64."""
    return logits if logits.dtype == torch.float64 else logits.float()
