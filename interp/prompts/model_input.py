"""A prompt that is more than token ids: what a model reads beside them, and what its positions are called."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from interp.prompts.pairs import Span
from interp.utils.provenance import tensor_bytes


class Given(tuple[int, ...]):
    """Token ids, or the numbers of an image's patches, with the other inputs of a forward.

    ``more``: tensors by the name that the model's forward has for them (``pixel_values``, ``image_grid_thw``, …); those
    of several prompts are put one after the other along the first axis. ``tokens``: whether the ids are tokens, and
    not just the numbers of patches. ``texts`` names every position, ``spans`` stretches of them.

    Two are equal if their ids and the contents of their tensors are.
    """

    more: Mapping[str, Any]
    texts: tuple[str, ...]
    spans: Mapping[str, Span]
    tokens: bool
    digest: bytes

    def __new__(
        cls,
        ids: Sequence[int],
        more: Mapping[str, Any],
        *,
        texts: Sequence[str] = (),
        spans: Mapping[str, Span] | None = None,
        tokens: bool = True,
    ) -> Given:
        """Holds what it is given; see the class."""
        self = super().__new__(cls, ids)
        self.more, self.texts, self.spans, self.tokens = dict(more), tuple(texts), dict(spans or {}), tokens
        hashed = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(more.items()):
            hashed.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor_bytes(tensor))
        self.digest = hashed.digest()
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and tuple(self) == tuple(other) and self.digest == other.digest

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.digest))

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes of what is beside the ids: prompts of one batch have them in common."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.more.items()))


def frozen(ids: Sequence[int]) -> tuple[int, ...]:
    """Ids as something hashable that keeps what is beside them."""
    return ids if isinstance(ids, Given) else tuple(ids)
