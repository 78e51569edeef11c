"""Collect attention statistics from span to span while a model runs.

The kernel sums a query's weights over the keys of each span. Means over the queries of each span are taken layer by
layer, so that no n×n pattern is built and the numbers of single tokens are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import headstats
import numpy as np
import torch
from headstats.stats import BY_NAME
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import ModelError, PromptError
from interp.model.attention_call import AttentionCall
from interp.model.segment_masks import BY_SEGMENT
from interp.model.token_numbers import TokenNumbers
from interp.prompts.division import Division

MEAN = "mean over the query span's tokens of "
BETWEEN = {
    "segments": "the sum of p_ij over the keys j of the key span (probability)",
    "segment_value_norms": "the sum of p_ij norm(v_j) over the keys j of the key span; norm is Euclidean (of v)",
    "segment_outputs": "the sum of p_ij v_j over the keys j of the key span, before the gate: a vector (of v)",
    "argmax": "whether the key with the largest weight is in the key span (share of the queries)",
    "topk_mass": "the sum of those of the k largest weights whose keys are in the key span (probability)",
    "topk_keys": "the number of keys of the key span among those with the k largest weights (keys)",
}


@dataclass(frozen=True)
class SpanReader:
    """Reads statistics by the spans of one batch of prompts, through `Instrument.collecting`.

    ``queries``, ``keys``: how each prompt's queries and keys are divided; they differ in cross-attention alone.
    """

    queries: Sequence[Division]
    keys: Sequence[Division]
    reads_segments: bool
    targets: Int[Tensor, "batch query targets"] | None = None
    features: Float[Tensor, "batch key features"] | None = None

    def arguments(self, call: AttentionCall) -> dict[str, Tensor]:
        """Return further arguments of `headstats.attend` for a layer's attention.

        Raises ModelError for a layer whose queries and keys are not the prompt's tokens.
        """
        m, n = len(self.queries[0].numbers), len(self.keys[0].numbers)
        if (call.q.shape[0], call.q.shape[2], call.k.shape[2]) != (len(self.queries), m, n):
            raise ModelError(
                f"layer {call.layer}: its attention has {call.q.shape[2]} queries and {call.k.shape[2]} keys in "
                f"{call.q.shape[0]} rows, and the {len(self.queries)} prompt(s) have {m} and {n} tokens: spans of the "
                "prompts do not divide them"
            )
        given = {"targets": self.targets, "key_features": self.features}
        if self.reads_segments:
            given["k_segments"] = torch.tensor([division.numbers for division in self.keys])
        return {name: x.to(call.q.device) for name, x in given.items() if x is not None}

    def reduced(self, stats: headstats.AttentionStats) -> list[dict[str, np.ndarray]]:
        """Return for each prompt its means over spans, by name: [heads, query span, key span, …] or [heads, span]."""
        return [self._of_prompt(i, stats.as_dict()) for i in range(len(self.queries))]

    def _of_prompt(self, i: int, stats: dict[str, Any]) -> dict[str, np.ndarray]:
        queries, n_keys = self.queries[i].rows, len(self.keys[i].names)
        values: dict[str, Tensor] = {}
        for name, x in stats.items():
            if name in BY_SEGMENT:
                values[name] = _means(x[i][:, :, :n_keys], queries)
            elif name == "argmax":
                values[name] = _means(self._by_key_span(i, x[i][..., None]), queries)
            elif name == "topk":
                values["topk_mass"] = _means(self._by_key_span(i, x.indices[i], x.values[i]), queries)
                values["topk_keys"] = _means(self._by_key_span(i, x.indices[i]), queries)
            elif name == "targets":
                assert self.targets is not None  # the statistic exists
                values[name] = _means_of_present(x[i], self.targets[i].to(x.device) >= 0, queries)
            else:
                of_keys = BY_NAME[name].axis == "key"
                values[name] = _means(x[i], self.keys[i].rows if of_keys else queries)
        return {name: x.cpu().numpy() for name, x in values.items()}

    def _by_key_span(
        self, i: int, keys: Int[Tensor, "heads query k"], weights: Float[Tensor, "heads query k"] | None = None
    ) -> Float[Tensor, "heads query key_span"]:
        """Sum the weights (None: count) of some keys of each query by the spans that hold them; -1 is no key."""
        division = self.keys[i]
        spans = torch.tensor(division.numbers, device=keys.device)[keys.clamp_min(0)]
        is_key = (keys >= 0).float()
        weights = is_key if weights is None else weights * is_key
        zeros = torch.zeros(*keys.shape[:2], len(division.names), dtype=weights.dtype, device=keys.device)
        return zeros.scatter_add(2, spans, weights)


def _means(x: Float[Tensor, "heads token *rest"], rows: Sequence[list[int]]) -> Float[Tensor, "heads span *rest"]:
    """The mean over the tokens of each span."""
    return torch.stack([x[:, of_span].mean(1) for of_span in rows], 1)


def _means_of_present(
    x: Float[Tensor, "heads query targets"], is_present: Tensor, rows: Sequence[list[int]]
) -> Float[Tensor, "heads span targets"]:
    """The mean over those queries of each span that have a target; NaN where none has."""
    sums = [(x[:, of_span] * is_present[of_span]).sum(1) / is_present[of_span].sum(0) for of_span in rows]
    return torch.stack(sums, 1)


def check_spec(
    spec: headstats.StatSpec, targets: TokenNumbers | None, features: TokenNumbers | None
) -> tuple[headstats.StatSpec, bool]:
    """Return the spec, with what the arguments decide settled, and whether it asks for statistics by segment.

    Raises PromptError for a statistic without its argument, for an argument that no statistic reads, and for none.
    """
    for name, numbers in (("targets", targets), ("key_features", features)):
        requested = getattr(spec, name)
        if requested and numbers is None:
            raise PromptError(f"StatSpec({name}=True) needs {name}=")
        if requested is False and numbers is not None:
            raise PromptError(f"{name}= is given, and StatSpec({name}=False) leaves it unread")
        spec = replace(spec, **{name: numbers is not None})
    spec = replace(spec, segments=spec.segments is not False)
    if not spec.requested():
        raise PromptError("spec asks for no statistic: StatSpec(segments=True), the mass on each span, is one")
    return spec, any(getattr(spec, name) for name in BY_SEGMENT)


def definitions(names: Sequence[str]) -> dict[str, str]:
    """Return the definition and the unit of columns, by name."""
    texts = {}
    for name in names:
        kernel_name = name.partition("[")[0]
        if name in BETWEEN:
            texts[name] = MEAN + BETWEEN[name]
        else:
            s = BY_NAME[kernel_name]
            whose = "those of the span's tokens, as queries, that have a target" if kernel_name == "targets" else (
                f"the span's tokens, as {'queries' if s.axis == 'query' else 'keys'}"
            )  # fmt: skip
            texts[name] = f"mean over {whose}, of {s.definition} ({s.unit})"
    return texts
