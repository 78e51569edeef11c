"""The metric of many circuits on the same prompts under one recipe of ablation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batching import equal_length_batches
from interp.circuits.running import run_circuit, sender_hooks
from interp.circuits.together import run_circuits
from interp.circuits.wiring import Wiring, capture
from interp.engine import Engine
from interp.errors import InterpError, PromptError
from interp.means import Means
from interp.metrics import Metric, MetricFn, as_metric
from interp.model import Model
from interp.prompts import Encoded, PromptPair, encode_pairs
from interp.provenance import now, prompt_hash
from interp.recipes import check_metric, provenance_of, readout
from interp.sites import COMPONENTS, Site, Sites

Ablation = Literal["counterfactual", "zero", "mean", "resample"]
RECIPES = {
    "counterfactual": "edges outside the circuit carry the activation of the pair's corrupt run",
    "zero": "edges outside the circuit carry 0",
    "mean": "edges outside the circuit carry the activation's mean over all tokens of all clean prompts of the set",
    "resample": "edges outside the circuit carry the activation of another example's clean run, of the same length",
}
TOKENS = 1024  # of a batch


def token_batches(prompts: Sequence[Encoded], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Numbers of prompts of one length, at most so many tokens together."""
    for batch in equal_length_batches([p.clean for p in prompts]):
        step = max(1, tokens // len(prompts[batch[0]]))
        yield from (batch[i : i + step] for i in range(0, len(batch), step))


class Evaluator:
    """``evaluate(mask)`` is the metric [examples], float64, of the clean prompts run with the edges in the mask.

    ``whole`` is that of the model itself. Raises InterpError, PromptError or ModelError for bad input.
    """

    def __init__(
        self,
        model: Model,
        pairs: PromptPair | Iterable[PromptPair],
        metric: Metric | MetricFn | str,
        using: Ablation,
        seed: int = 0,
    ) -> None:
        if using not in RECIPES:
            raise InterpError(f"unknown ablation {using!r}: choose one of {', '.join(map(repr, RECIPES))}")
        listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
        self.model, self.metric = model, as_metric(metric)
        self.prompts = encode_pairs(listed, model.coder)
        check_metric(self.metric, self.prompts)
        self.wiring = Wiring(model)
        self.graph = self.wiring.graph
        self.wiring.check(self.prompts[0].clean)
        self.recipe = {
            **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
            "metric": self.metric.name, "using": using, "ablation": RECIPES[using], "ablation_seed": seed,
            "normalisation": "(m(C) − m(∅)) / (m(M) − m(∅)), ratio of means over examples", **provenance_of(pairs),
        }  # fmt: skip
        sends = sender_hooks(self.wiring)
        donors = _donors(self.prompts, seed) if using == "resample" else [p.corrupt for p in self.prompts]
        fixed = _constants(model, self.prompts, sends, using)
        self.batches: list[tuple[list[int], dict[str, Tensor], Any]] = []
        self.whole = np.zeros(len(self.prompts))
        for batch in token_batches(self.prompts):
            clean = capture(model, [self.prompts[i].clean for i in batch], [])["logits"]
            read = readout([self.prompts[i] for i in batch], list(clean))
            ablated = fixed or capture(model, [donors[i] for i in batch], sends)
            self.batches.append((batch, ablated, read))
            self.whole[batch] = self.metric(clean, read).double().cpu().numpy()

    def __call__(self, kept: Bool[np.ndarray, "receivers senders"]) -> Float[np.ndarray, " examples"]:
        """The metric by example."""
        out, mask = np.zeros(len(self.prompts)), torch.from_numpy(kept)
        for batch, ablated, read in self.batches:
            logits = run_circuit(self.wiring, [self.prompts[i].clean for i in batch], mask, ablated)
            out[batch] = self.metric(logits, read).double().cpu().numpy()
        return self._known(out)

    def many(self, kept: Bool[np.ndarray, "circuits receivers senders"]) -> Float[np.ndarray, "circuits examples"]:
        """The same of several circuits, as many in one forward as `TOKENS` allow."""
        out, masks = np.zeros((len(kept), len(self.prompts))), torch.from_numpy(kept)
        for batch, ablated, read in self.batches:
            ids = [self.prompts[i].clean for i in batch]
            step = max(1, TOKENS // (len(ids) * len(ids[0])))
            for start in range(0, len(kept), step):
                for i, logits in enumerate(run_circuits(self.wiring, ids, masks[start : start + step], ablated), start):
                    out[i, batch] = self.metric(logits, read).double().cpu().numpy()
        return self._known(out)

    def _known(self, values: np.ndarray) -> np.ndarray:
        if np.isnan(values).any():
            raise InterpError(f"metric {self.metric.name!r} returned NaN for {int(np.isnan(values).sum())} examples")
        return values


def _constants(model: Model, prompts: Sequence[Encoded], sends: Sequence[str], using: Ablation) -> dict[str, Tensor]:
    """What zero or mean ablation sends, by hook name: the same for every example."""
    if using == "zero":
        return {name: torch.zeros((), device=model.device, dtype=model.dtype) for name in sends}
    if using != "mean":
        return {}
    sites = [Site("resid_pre", 0), *model.sites("z")]
    sites += [Site("mlp_out", i) for i in range(model.n_layers) if f"blocks.{i}.hook_mlp_out" in sends]
    means = Means(Engine(model, "naive"), [p.clean for p in prompts], Sites(sites), "mean")
    found = {}
    for (component, layer), total in means.totals.items():
        mean = total[0] / means.count[0]
        found[COMPONENTS[component].hook.format(layer=layer)] = mean.to(model.device, model.dtype)
    return found


def _donors(prompts: Sequence[Encoded], seed: int) -> list[tuple[int, ...]]:
    """For each example another one's clean prompt of the same length, each used once."""
    generator = np.random.default_rng(seed)
    donors: list[tuple[int, ...]] = [p.clean for p in prompts]
    lengths: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(i)
    for length, members in lengths.items():
        if len(members) < 2:
            raise PromptError(
                f"using='resample': only one prompt has {length} tokens (pair {members[0]}), so that there is no other "
                "to draw from: give more pairs of that length, or another ablation"
            )
        order = generator.permutation(members).tolist()
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            donors[here] = prompts[there].clean
    return donors
