"""Generate one batch: a forward of the prompts, then one of a token for each row, with a cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model.collect_statistics import stack_layers
from interp.model.generation.request import GenerationRequest
from interp.model.generation.result import Generation
from interp.model.generation.sampling import choose
from interp.model.hooks import hooks
from interp.model.loaded_model import LoadedModel
from interp.sites import COMPONENTS
from interp.utils.progress import Advance

INDICES = ("argmax",)  # statistics that name a key, which padding moves


@dataclass
class BatchRow:
    """One row of the batch: what it has written, its random numbers, and what is stored of each step."""

    out: Generation
    draws: torch.Generator
    padding: int
    stats: dict[str, list[np.ndarray]] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    is_done: bool = False


class Loop:
    """Runs one batch of a model.

    ``prompts``: token ids of each prompt, each of which has ``request.n`` rows. The prompts are padded on the left,
    and go through the model once, whatever the number of rows.
    """

    def __init__(
        self, model: LoadedModel, request: GenerationRequest, prompts: Sequence[Sequence[int]], rows: list[BatchRow]
    ):
        self.model, self.request, self.rows = model, request, rows
        self.hf = model.bridge.original_model
        self.parameters = inspect.signature(self.hf.forward).parameters
        self.eos = _end_tokens(model)
        self.reach = 8 + max([0, *(len(s.encode()) for s in request.stop)])  # tokens in which a stop string may stand
        self.tokens, self.mask = _padded(prompts, _padding_token(model), model.device)
        self.cache: Any = None
        self.seen: dict[str, Tensor] = {}  # activations of the last position in the latest forward
        self.collected: dict[int, Any] = {}

    @torch.no_grad()
    def run(self, advance: Advance) -> None:
        """Generate until every row has ended. What was written before an interruption stays in the rows."""
        with ExitStack() as stack:
            stack.enter_context(hooks(self.model, *self._watched_sites()))
            if (edited := self.model.instrument.edited) is not None:
                stack.enter_context(edited.generation()())
            if self.request.stats is not None:
                self.collected = stack.enter_context(self.model.instrument.collecting(self.request.stats))
            logits = self._forward(first=True)
            self._store(n_prompts := len(self.tokens))
            if (n := self.request.n) > 1:
                self._continue([i for i in range(n_prompts) for _ in range(n)])
                logits = logits.repeat_interleave(n, dim=0)
            for step in range(self.request.max_new_tokens):
                going, left = [row for row in self.rows if not row.is_done], self.request.max_new_tokens - 1 - step
                tokens = self._write(logits)
                advance(sum(1 + left * row.is_done for row in going))
                if all(row.is_done for row in self.rows):
                    return
                self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
                self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
                self._leave_ended()
                logits = self._forward()
                self._store(len(self.rows))

    # ------------------------------------------------------------ forwards

    def _forward(self, first: bool = False) -> Float[Tensor, "rows vocab"]:
        """The logits after the last token of every row; a model without a cache reads the whole text."""
        if not has_cache(self.model):
            return self._as_wide(self.model.forward(self.tokens)[:, -1])
        inputs: dict[str, Any] = {"attention_mask": self.mask, "use_cache": True}
        if "position_ids" in self.parameters:
            inputs["position_ids"] = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 1
        for name in ("past_key_values", "cache_params"):
            if self.cache is not None and name in self.parameters:
                inputs[name] = self.cache
        one = None if first or self.cache is None else 1
        prepared = self.hf.prepare_inputs_for_generation(
            self.tokens, next_sequence_length=one, is_first_iteration=first, **inputs
        )
        output = self.hf(**prepared, return_dict=True)
        caches = (getattr(output, name, None) for name in ("past_key_values", "cache_params"))
        self.cache = next((c for c in caches if c is not None), None)
        return self._as_wide(output.logits[:, -1])

    @staticmethod
    def _as_wide(logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float64 else logits.float()

    def _continue(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch, of which each may be named several times."""
        which = torch.tensor(rows, device=self.tokens.device)
        if self.cache is not None:
            self.cache.reorder_cache(which)
        if (edited := self.model.instrument.edited) is not None:
            edited.continue_rows(rows, self.cache)
        self.tokens, self.mask = self.tokens[which], self.mask[which]

    def _leave_ended(self) -> None:
        """Leave ended rows out of further forwards, once they are half of them."""
        going = [i for i, row in enumerate(self.rows) if not row.is_done]
        if len(going) <= len(self.rows) // 2:
            self.rows = [self.rows[i] for i in going]
            self._continue(going)

    # ------------------------------------------------------------ what a step gives

    def _write(self, logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        """Choose each row's next token and write it down."""
        tokens = choose(logits, self.request.sampling, [row.draws for row in self.rows])
        logprobs = logits.log_softmax(-1)
        probs = logprobs.exp()
        top = probs.topk(2, dim=-1).values
        numbers = torch.stack(
            [logprobs.gather(-1, tokens[:, None])[:, 0], torch.special.entr(probs).sum(-1), top[:, 0] - top[:, 1]]
        ).tolist()
        for row, token, logprob, entropy, margin in zip(self.rows, tokens.tolist(), *numbers, strict=True):
            if not row.is_done:
                row.out.ids.append(token)
                row.out.logprob.append(logprob)
                row.out.entropy.append(entropy)
                row.out.margin.append(margin)
                self._end(row)
        return tokens

    def _end(self, row: BatchRow) -> None:
        """Say whether and how a row has ended with its latest token."""
        out, end = row.out, ""
        if out.ids[-1] in self.eos:
            end = "eos"
        elif self.request.stop and stops(self.model, out.ids[-self.reach :], self.request.stop):
            end = "stop"
        if not end and len(out.ids) == self.request.max_new_tokens:
            end = "length"
        if end:
            out.end, row.is_done = end, True

    def _store(self, n: int) -> None:
        """Store what the latest forward, of ``n`` rows, says of its last position."""
        repeats = len(self.rows) // n
        if self.request.stats is not None:
            stacked = stack_layers(self.collected, self.model.n_layers)
            for name, values in stacked.items():
                for i, row in enumerate(self.rows):
                    if not row.is_done:
                        last = values[i // repeats][..., -1]
                        last = np.where(last >= 0, last - row.padding, -1) if name in INDICES else last
                        row.stats.setdefault(name, []).append(last)
        for name, x in self.seen.items():
            for i, row in enumerate(self.rows):
                if not row.is_done:
                    row.kept.setdefault(name, []).append(x[i // repeats])

    def _watched_sites(self) -> list[tuple[str, Any]]:
        pairs = []
        for site in self.request.keep:

            def keep(x: Tensor, hook: Any, name: str = str(site), head: int | None = site.head) -> None:
                last = x[:, -1] if head is None else x[:, -1, head]
                self.seen[name] = last.detach().cpu().clone()

            pairs.append((COMPONENTS[site.component].hook.format(layer=site.layer), keep))
        return pairs


def has_cache(model: LoadedModel) -> bool:
    """Whether a model decodes token by token, and takes padded prompts, as classes of transformers do."""
    return hasattr(model.bridge.original_model, "prepare_inputs_for_generation")


def stops(model: LoadedModel, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the text of tokens holds a stop string, which may be written with special tokens."""
    texts = [model.tokenizer.decode(list(ids), skip_special_tokens=skip) for skip in (True, False)]
    return any(s in text for s in stop for text in texts)


def _end_tokens(model: LoadedModel) -> set[int]:
    """The tokens that end a text, as the model's generation config and its tokenizer say."""
    config = getattr(model.bridge.original_model, "generation_config", None)
    of_config, of_tokenizer = getattr(config, "eos_token_id", None), getattr(model.tokenizer, "eos_token_id", None)
    listed = of_config if isinstance(of_config, list) else [of_config]
    return {token for token in (*listed, of_tokenizer) if token is not None}


def _padding_token(model: LoadedModel) -> int:
    """A token for padded places, which no row reads."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    return pad if pad is not None else next(iter(sorted(_end_tokens(model))), 0)


def _padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "prompts position"], Int[Tensor, "prompts position"]]:
    longest = max(map(len, prompts))
    tokens = [[pad] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
