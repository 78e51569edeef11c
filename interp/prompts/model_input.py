"""A prompt with further inputs, and with names for its positions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from interp.prompts.ranges import Span
from interp.utils.provenance import tensor_bytes


class ModelInput(tuple[int, ...]):
    """Token ids or patch numbers, with the other inputs of a forward.

    ``extra_inputs``: tensors by the name that the model's forward has for them (``pixel_values``, ``image_grid_thw``,
    …); those of several prompts are concatenated along the first axis. ``has_token_ids``: whether the ids are tokens,
    not the numbers of patches. ``texts`` names every position, ``spans`` stretches of them.

    Two are equal if their ids and the contents of their tensors are equal.
    """

    extra_inputs: Mapping[str, Any]
    texts: tuple[str, ...]
    spans: Mapping[str, Span]
    has_token_ids: bool
    digest: bytes

    def __new__(
        cls,
        ids: Sequence[int],
        extra_inputs: Mapping[str, Any],
        *,
        texts: Sequence[str] = (),
        spans: Mapping[str, Span] | None = None,
        has_token_ids: bool = True,
    ) -> ModelInput:
        """Store the arguments and a digest of the tensors; see the class."""
        self = super().__new__(cls, ids)
        self.extra_inputs, self.texts, self.spans = dict(extra_inputs), tuple(texts), dict(spans or {})
        self.has_token_ids = has_token_ids
        hashed = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(extra_inputs.items()):
            hashed.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor_bytes(tensor))
        self.digest = hashed.digest()
        return self

    def with_spans(self, spans: Mapping[str, Span]) -> ModelInput:
        """Return the same prompt with further named spans."""
        merged = {**self.spans, **spans}
        texts, has_token_ids = self.texts, self.has_token_ids
        return ModelInput(self, self.extra_inputs, texts=texts, spans=merged, has_token_ids=has_token_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelInput) and tuple(self) == tuple(other) and self.digest == other.digest

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.digest))

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Names and shapes of the extra inputs, which all prompts of one batch must share."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.extra_inputs.items()))


def as_hashable(ids: Sequence[int]) -> tuple[int, ...]:
    """Ids as a hashable sequence; a ModelInput keeps its extra inputs."""
    return ids if isinstance(ids, ModelInput) else tuple(ids)


def as_listed(ids: Sequence[int]) -> list[int | str]:
    """Ids as a list that tells prompts apart: in the place of ids that are no tokens or patches, a digest."""
    return [ids.digest.hex()] if isinstance(ids, ModelInput) and "inputs_embeds" in ids.extra_inputs else list(ids)
