"""Generating: what a model writes after prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import headstats

from interp.interventions import AttentionChange, AttentionEdit, AttentionMask
from interp.model.edited import edited
from interp.model.facts import ModelFacts
from interp.model.generation.generate import generate
from interp.model.generation.request import generation_request
from interp.model.generation.result import Generations
from interp.model.generation.sampling import Sampling
from interp.model.loaded_model import LoadedModel
from interp.model.session import in_session
from interp.prompts.pairs import Prompt, PromptPair
from interp.sites import Site


class Generating(ModelFacts):
    """The part of `Model` that generates text."""

    @in_session
    def generate(
        self: LoadedModel,
        prompts: str | Prompt | PromptPair | Iterable[Any],
        max_new_tokens: int = 64,
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        edits: AttentionChange | Sequence[AttentionChange] = (),
        stats: headstats.StatSpec | None = None,
        keep: str | Site | Sequence[str | Site] = (),
        batch_size: int = 32,
    ) -> Generations:
        """Generate ``n`` texts after each prompt.

            out = model.generate("The sky is", max_new_tokens=20)                     # the most probable tokens
            out = model.generate(prompts, 64, n=8, temperature=0.6, top_p=0.95, seed=0)
            out.texts, out.frame()    # example, sample, step, token, id, logprob, entropy, margin
            model.generate(prompts, edits=[interp.AttentionEdit(keys="image", gain=0.5, phase="decoding")])

        ``temperature=0`` takes the most probable token. A sample's random numbers depend on seed, prompt and number of
        the sample, not on the batch, whose size only rounds the logits. ``stop``: texts that end a row. ``edits``: as
        in `edited`, around the generation; edits of prompt tokens stay in force, because the cache keeps what they
        changed. ``stats``: statistics with one number for a query, of the row that each token was read from. ``keep``:
        sites whose activations of that row are kept, like ``"resid_post.L12"``. The prompt goes through the model once
        for all its samples. ``batch_size``: rows in one forward; prompts of unequal lengths are padded on the left.
        Ctrl-C returns what is written so far.

        Raises InterpError for settings without effect, PromptError for prompts that leave no room in the model's
        context, ModelError for a model that generates no text.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        request = generation_request(self, max_new_tokens, n, sampling, stop, stats, keep, batch_size)
        changes = [edits] if isinstance(edits, AttentionEdit | AttentionMask) else list(edits)
        if not changes:
            return generate(self, prompts, request)
        with edited(self, changes):
            return generate(self, prompts, request)
