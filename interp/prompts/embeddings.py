"""Prompts of vectors in place of tokens, for models with continuous inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.errors import PromptError
from interp.prompts.model_input import ModelInput
from interp.prompts.ranges import Span, check_token_ranges

NO_TOKEN = -1  # in the place of a token id: no model embeds it


class Embeddings(ModelInput):
    """A prompt of input vectors: what the model's forward takes as ``inputs_embeds``.

        vectors = torch.randn(6, model.d_model)                           # [position, d_model]
        prompt = interp.Embeddings(vectors, spans={"state": (1, 4)})      # ranges of positions
        other = interp.Embeddings(vectors.roll(1, 0))
        interp.patch(model, interp.PromptPair(prompt, other, answer=5, foil=7), model.sites("resid_pre"))

    The vectors take the place of the token embedding's output: what the model adds to it (positions, scale) is added
    to them too. ``texts`` names every position (default: ``vector 0``, …). It stands wherever a prompt of token ids
    does, except where a question is about words: probabilities of the prompt's own tokens, means by token, spans that
    are left out, learned circuits and roles.

    Raises PromptError unless ``vectors`` are finite floats [position, d_model] and the spans are ranges of them.
    """

    def __new__(
        cls, vectors: Tensor, spans: Mapping[str, Span] | None = None, texts: Sequence[str] | None = None
    ) -> Embeddings:
        """Store a copy of the vectors, without their gradient; see the class."""
        vectors = _checked(vectors).detach().clone()
        n = len(vectors)
        texts = [f"vector {i}" for i in range(n)] if texts is None else list(texts)
        if len(texts) != n or not all(isinstance(text, str) for text in texts):
            raise PromptError(f"texts must name each of the {n} positions, got {len(texts)} names")
        spans = check_token_ranges(spans or {}, n)
        extra_inputs = {"inputs_embeds": vectors[None]}
        return super().__new__(cls, [NO_TOKEN] * n, extra_inputs, texts=texts, spans=spans, has_token_ids=False)  # type: ignore[return-value]

    @property
    def vectors(self) -> Tensor:
        """The vectors [position, d_model]."""
        return self.extra_inputs["inputs_embeds"][0]

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice) or not range(len(self))[index]:
            return tuple(self)[index]
        places = range(len(self))[index]
        return Embeddings(self.vectors[list(places)], None, [self.texts[i] for i in places])

    def __repr__(self) -> str:
        spans = f", spans={self.spans}" if self.spans else ""
        return f"Embeddings({len(self)} positions × {self.vectors.shape[1]}{spans})"

    def __getnewargs__(self) -> Any:
        return self.vectors, self.spans, self.texts


def _checked(vectors: Any) -> Tensor:
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point() or vectors.ndim != 2 or not len(vectors):
        what = f"{vectors.dtype} {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else f"{vectors!r:.60}"
        raise PromptError(f"Embeddings takes a tensor of floats [position, d_model] of one prompt, got {what}")
    if not torch.isfinite(vectors).all():
        raise PromptError("Embeddings takes finite numbers, and some of these vectors are NaN or infinite")
    return vectors


def refuse_vectors(prompts: Sequence[Any], what: str) -> None:
    """Raise PromptError if one of the encoded prompts is of vectors; ``what``: what needs its words."""
    number = next((i for i, ids in enumerate(prompts) if isinstance(ids, Embeddings)), None)
    if number is not None:
        raise PromptError(f"prompt {number} is of vectors (interp.Embeddings), which have no token ids: {what}")


def first_changed(clean: Sequence[int], corrupt: Sequence[int]) -> int | None:
    """Return the first position whose vectors differ, for two prompts of vectors of equal length; None for others."""
    if not (isinstance(clean, Embeddings) and isinstance(corrupt, Embeddings) and len(clean) == len(corrupt)):
        return None
    differs = (clean.vectors != corrupt.vectors).any(-1).nonzero()
    return int(differs[0, 0]) if len(differs) else None
