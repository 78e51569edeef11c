"""A model whose attention heads are multiplied by gates, inside the attention kernel, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import headstats
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.learned.next_token import Sample, Unembedding
from interp.model.attention_call import AttentionCall
from interp.model.instrument import attend
from interp.model.model import Model

TOKENS = 4096  # of all copies of a batch that go through the model together


class Gated:
    """A model whose heads are multiplied by gates, a set of them for each batch row."""

    def __init__(self, model: Model):
        self.model, self.unembedding = model, Unembedding(model)
        self.layers = model.attention_layers

    def hidden(
        self, ids: Tensor, gates: Float[Tensor, "batch layers heads"]
    ) -> Float[Tensor, "batch position d_model"]:
        """What enters the unembedding."""
        row = {layer: i for i, layer in enumerate(self.layers)}

        def gate(call: AttentionCall) -> Tensor:
            edit = headstats.Edit(gate=gates[:, row[call.layer]].to(call.q))
            return attend(call, backend=self.model.instrument.backend, edit=edit).out

        with self.model.instrument.handled_by(gate):
            return self.unembedding.hidden(ids)

    def log_probs(
        self, batch: Sequence[Sample], gates: Float[Tensor, "sets layers heads"], foils: bool = False
    ) -> Iterator[tuple[list[int], Float[Tensor, "sets rows"]]]:
        """Mean log-probability of each sample's targets (``foils``: less that of its foils) under each set of gates.

        Some samples of one length at a time, with their numbers.
        """
        lengths: dict[tuple[int, int], list[int]] = {}
        for i, sample in enumerate(batch):
            lengths.setdefault((len(sample.ids), len(sample.positions)), []).append(i)
        sets = len(gates)
        for (length, n_targets), members in lengths.items():
            step = max(1, TOKENS // (length * sets))
            for start in range(0, len(members), step):
                rows = members[start : start + step]
                ids = torch.tensor([batch[i].ids for i in rows], device=self.model.device)
                hidden = self.hidden(ids.repeat(sets, 1), gates.repeat_interleave(len(rows), 0))
                where = torch.tensor([batch[i].positions for i in rows], device=ids.device).repeat(sets, 1)
                chosen = hidden[torch.arange(len(hidden), device=ids.device)[:, None], where]
                tokens = [(batch[i].targets, batch[i].foils if foils else ()) for i in rows]
                wanted = torch.tensor([[t, *f] for t, f in _columns(tokens)], device=ids.device).repeat(sets, 1)
                found = self.unembedding.log_probs(chosen.flatten(0, 1), wanted)
                score = found[:, 0] - found[:, 1] if foils else found[:, 0]
                yield rows, score.reshape(sets, len(rows), n_targets).mean(-1)


def _columns(tokens: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    for targets, foils in tokens:
        for i, target in enumerate(targets):
            yield target, tuple(foils[i : i + 1])
