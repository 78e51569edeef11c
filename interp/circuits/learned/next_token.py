"""Next-token log-probabilities with gradients, in bounded memory.

The logits of all positions never exist together. The model runs up to its unembedding. Logits are computed only for the
positions that are read, `LOGIT_BYTES` of them at a time in float32, and computed again in the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from interp.circuits.wiring import module_behind
from interp.errors import ModelError, PromptError
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.listing import listed
from interp.prompts.pairs import PromptPair, encode_pairs

LOGIT_BYTES = 64 * 2**20  # of float32 logits that exist at one time
INTO_UNEMBED = "unembed.hook_in"

Text = str | tuple[str, str] | PromptPair


@dataclass(frozen=True)
class Sample:
    """Token ids, and tokens to predict (targets) after some positions.

    ``foils``: other tokens for the same positions.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    foils: tuple[int, ...] | None = None


def listed_data(data: Text | Iterable[Text]) -> list[Any]:
    """Return one text, (prompt, completion) or PromptPair, or several, as a list; PromptError for anything else."""
    if isinstance(data, str | PromptPair) or (isinstance(data, tuple) and len(data) == 2):
        return [data]
    data = list(data) if isinstance(data, tuple) else data
    items = listed(data, (str, PromptPair, tuple), "texts, (prompt, completion) tuples or a PromptPair")
    if not items:
        raise PromptError("no data: pass texts, (prompt, completion) tuples, or PromptPairs")
    return items


def samples(data: Text | Iterable[Text], model: Model) -> list[Sample]:
    """Turn any mixture of three kinds of data into samples.

    The targets of a string are all tokens after the first; of ``(prompt, completion)``, all tokens of the completion;
    of a PromptPair, its answer after its clean prompt (the corrupt prompt is not read). Raises PromptError for data
    without targets.
    """
    return [_sample(i, item, model) for i, item in enumerate(listed_data(data))]


def _sample(index: int, item: Any, model: Model) -> Sample:
    if isinstance(item, PromptPair):
        pair = encode_pairs(item, model.coder)[0]
        refuse_vectors([pair.clean], "gates are trained on next tokens")
        foils = None if pair.foil is None else (pair.foil,)
        return Sample(pair.clean, (len(pair.clean) - 1,), (pair.answer,), foils)
    prompt: Any
    prompt, completion = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not all(isinstance(x, str) and x for x in (prompt, completion) if x is not None or completion is not None):
        raise PromptError(
            f"item {index}: a text, a (prompt, completion) tuple or a PromptPair expected, got {item!r:.80}"
        )
    ids, start = list(model.coder.encode(prompt)), 1
    if completion is not None:
        start = len(ids)
        ids += _completion(prompt, completion, model)
    if len(ids) > model.n_ctx:
        raise PromptError(f"item {index}: {len(ids)} tokens, more than {model.name}'s context of {model.n_ctx}")
    if len(ids) <= start:
        raise PromptError(
            f"item {index}: {item!r:.60} is {len(ids)} token(s), and none is left to be predicted: use longer texts, "
            "or a (prompt, completion) tuple"
        )
    return Sample(tuple(ids), tuple(range(start - 1, len(ids) - 1)), tuple(ids[start:]))


def _completion(prompt: str, completion: str, model: Model) -> list[int]:
    following = model.coder.following
    return model.coder.continuation(completion) if following is None else following(prompt, completion)[0]


def permuted(data: Sequence[Sample], seed: int) -> list[Sample]:
    """The same prompts with each other's targets: a control with nothing to learn.

    Targets are exchanged among samples with the same number of targets. Raises PromptError if no two samples have that.
    """
    rng, out = np.random.default_rng(seed), list(data)
    groups: dict[int, list[int]] = {}
    for i, s in enumerate(data):
        groups.setdefault(len(s.targets), []).append(i)
    if all(len(g) < 2 for g in groups.values()):
        raise PromptError("targets cannot be permuted: no two samples have the same number; use more, or PromptPairs")
    for members in groups.values():
        order = rng.permutation(members)
        for i, j in zip(order, np.roll(order, 1), strict=True):  # a cycle, so no sample keeps its own targets
            out[i] = Sample(data[i].ids, data[i].positions, data[j].targets, data[j].foils)
    return out


class Unembedding:
    """Log-probabilities of tokens from the input of a model's unembedding.

    Raises ModelError unless the model is a decoder.
    """

    def __init__(self, model: Model):
        if model.reads != "text" or model.stacks or model.masked or INTO_UNEMBED not in model.bridge.hook_dict:
            raise ModelError(f"{model.name}: next-token losses are defined for decoders that read text")
        self.model = model
        self.head = module_behind(model.bridge.unembed)
        parameters = inspect.signature(model.bridge.original_model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in parameters else {}
        config: Any = getattr(model.bridge.original_model, "config", None)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.factor = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with the model's own logits.

        Raises ModelError if the model changes them after its unembedding.
        """
        ids = torch.tensor([[3, 1, 4, 1, 5]], device=self.model.device).remainder(int(self.model.bridge.cfg.d_vocab))
        expected = self.model.bridge(ids[:, : self.model.n_ctx])[0]
        computed = self.logits(self.hidden(ids[:, : self.model.n_ctx])[0])
        gap = float((expected.float() - computed).abs().max())
        if not gap <= 1e-3 * max(1.0, float(expected.float().abs().max())):
            raise ModelError(f"{self.model.name}: its logits are not those of its unembedding (gap {gap:.1e})")

    def hidden(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_model"]:
        """The input of the unembedding, with gradients if they are enabled.

        Only one position is unembedded.
        """
        inputs: list[Tensor] = []

        def record(x: Tensor, hook: Any) -> Tensor:
            inputs.append(x)
            return x[:, :1]

        with hooks(self.model, (INTO_UNEMBED, record)):
            self.model.bridge(ids, **self.options)
        return inputs[0]

    def logits(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Logits in float32 (float64 for a float64 model)."""
        out = self.head(hidden) * self.factor
        out = out if out.dtype == torch.float64 else out.float()
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)

    def log_probs(
        self, hidden: Float[Tensor, " rows d_model"], tokens: Int[Tensor, " rows columns"]
    ) -> Float[Tensor, " rows columns"]:
        """Log-probabilities of the given tokens after each row."""
        step = max(1, LOGIT_BYTES // (4 * int(self.model.bridge.cfg.d_vocab)))
        parts = [
            checkpoint(self._log_probs, hidden[i : i + step], tokens[i : i + step], use_reentrant=False)
            for i in range(0, len(hidden), step)
        ]
        return torch.cat(parts)  # type: ignore[arg-type]

    def _log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
