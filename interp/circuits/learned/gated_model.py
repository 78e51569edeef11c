"""GatedModel: a model whose attention heads are multiplied by gates.

Gates act in the attention kernel, and have gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.learned.next_token import Sample, Unembedding
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend_gated
from interp.model.model import Model

TOKENS = 4096  # of a forward, over all copies of a batch


class GatedModel:
    """A model with gated heads, with one set of gates for each batch row."""

    def __init__(self, model: Model):
        self.model, self.unembedding = model, Unembedding(model)
        self.layers = model.attention_layers

    def hidden(
        self, ids: Tensor, gates: Float[Tensor, "batch layers heads"]
    ) -> Float[Tensor, "batch position d_model"]:
        """The input of the unembedding."""
        row = {layer: i for i, layer in enumerate(self.layers)}

        def gate(call: AttentionCall) -> Tensor:
            return attend_gated(call, gates[:, row[call.layer]].to(call.q), backend=self.model.instrument.backend)

        with self.model.instrument.handled_by(gate):
            return self.unembedding.hidden(ids)

    def log_probs(
        self, batch: Sequence[Sample], gates: Float[Tensor, "sets layers heads"], foils: bool = False
    ) -> Iterator[tuple[list[int], Float[Tensor, "sets rows"]]]:
        """Yield each sample's mean log-probability of its targets, per set of gates.

        Samples of one length are processed together; their indices come first. With ``foils``, the log-probability of
        the sample's foils is subtracted.
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
                positions = torch.tensor([batch[i].positions for i in rows], device=ids.device).repeat(sets, 1)
                at_targets = hidden[torch.arange(len(hidden), device=ids.device)[:, None], positions]
                columns = [tokens for i in rows for tokens in _tokens_to_read(batch[i], foils)]
                tokens = torch.tensor(columns, device=ids.device).repeat(sets, 1)
                log_probs = self.unembedding.log_probs(at_targets.flatten(0, 1), tokens)
                score = log_probs[:, 0] - log_probs[:, 1] if foils else log_probs[:, 0]
                yield rows, score.reshape(sets, len(rows), n_targets).mean(-1)


def _tokens_to_read(sample: Sample, foils: bool) -> list[list[int]]:
    """For each position of a sample: its target, and its foil with ``foils``."""
    if not foils or sample.foils is None:
        return [[target] for target in sample.targets]
    return [[target, foil] for target, foil in zip(sample.targets, sample.foils, strict=True)]
