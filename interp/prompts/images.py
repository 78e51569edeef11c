"""Images as prompts: alone, for a vision encoder, or among tokens, for a vision–language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from interp.errors import PromptError
from interp.prompts.model_input import Given
from interp.prompts.pairs import Coder, Encoded, PromptPair, Span, single_token
from interp.prompts.spans import image_spans

BOOKKEEPING = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # what processors add for any model


@dataclass(frozen=True, eq=False)
class ImagePair(PromptPair):
    """Two prompts with images, to patch between.

    ``clean`` and ``corrupt`` are what the model's processor makes of them: for a vision encoder an image, a tensor
    [channel, height, width], or ``{"pixel_values": …}`` of a batch of one; for a vision–language model the mapping
    with ``input_ids``, ``pixel_values`` and what else the processor gives. ``answer`` and ``foil``: the name or number
    of a class; of a vision–language model the next token, as text or id. A metric of your own need not read them.
    """

    clean: Any
    corrupt: Any
    answer: Any = 0
    foil: Any = None

    def span(self, name: str, words: str | None = None, *, occurrence: int = 0) -> PromptPair:
        """Raises PromptError: spans of images are found from the tokens (``image``, ``text``; ``cls``, ``patches``)."""
        raise PromptError("an ImagePair finds its own spans: image and text, or cls and patches")


@dataclass(frozen=True)
class Layout:
    """How a vision encoder cuts an image: ``prefix`` positions (CLS, registers), then patches, row by row."""

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    prefix: int
    any_size: bool = False

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        return height // self.patch[0], width // self.patch[1]

    def texts(self, height: int, width: int) -> list[str]:
        """A name for every position."""
        names = ["CLS", *(f"register {i}" for i in range(self.prefix - 1))][: self.prefix]
        rows, columns = self.grid(height, width)
        return [*names, *(f"patch {r},{c}" for r in range(rows) for c in range(columns))]

    def spans(self, height: int, width: int) -> dict[str, Span]:
        """``cls``, ``registers`` and ``patches``, as far as there are any."""
        n = self.prefix + self.grid(height, width)[0] * self.grid(height, width)[1]
        found = {"cls": (0, 1), "registers": (1, self.prefix), "patches": (self.prefix, n)}
        return {
            name: (a, b) for name, (a, b) in found.items() if b <= n and (name == "patches" or a < b <= self.prefix)
        }


def layout_of(config: Any, positions: int) -> Layout:
    """The layout of an encoder of this config, to whose blocks its own image size gives so many positions."""
    config = getattr(config, "vision_config", None) or config
    size, patch = _pair(config.image_size), _pair(config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    return Layout(config.num_channels, size, patch, positions - patches, config.model_type.startswith("dinov2"))


def _pair(x: Any) -> tuple[int, int]:
    return (int(x[0]), int(x[1])) if isinstance(x, Sequence) else (int(x), int(x))


@dataclass(frozen=True)
class Pictures:
    """How one model reads images. ``layout`` is None for a vision–language model, whose images become tokens."""

    name: str
    hf: Any
    layout: Layout | None
    coder: Coder | None
    n_ctx: int

    def prompts(self, items: Any) -> list[Given | str]:
        """What ``Model.attention_stats`` takes, one by one: images, or processor outputs; text as it is."""
        if self.layout is not None and isinstance(items, Mapping):
            items = items.get("pixel_values", items)
        if self.layout is not None and isinstance(items, Tensor) and items.ndim == 4:
            items = list(items)
        listed = [items] if isinstance(items, Mapping | Tensor | str | PromptPair) else list(items)
        listed = [p.clean if isinstance(p, PromptPair) else p for p in listed]
        if not listed:
            raise PromptError("there are no images: pass one, or a list of them")
        return [p if isinstance(p, str) and self.layout is None else self.given(p) for p in listed]

    def given(self, item: Any) -> Given:
        """One prompt with its image. Raises PromptError for what the model cannot read."""
        return self._image(item) if self.layout is not None else self._among_tokens(item)

    def _image(self, item: Any) -> Given:
        layout = self.layout
        assert layout is not None
        pixels = item.get("pixel_values") if isinstance(item, Mapping) else item
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            raise PromptError(
                f"{self.name} reads images as float tensors [channel, height, width], as its image processor makes "
                f"them (AutoImageProcessor): got {type(pixels).__name__}"
            )
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        if pixels.ndim != 4 or len(pixels) != 1 or pixels.shape[1] != layout.channels:
            raise PromptError(
                f"{self.name} reads one image at a time as [{layout.channels}, height, width]; got "
                f"{tuple(pixels.shape)}"
            )
        height, width = (int(n) for n in pixels.shape[2:])
        fits = height % layout.patch[0] == 0 and width % layout.patch[1] == 0
        if not (fits if layout.any_size else (height, width) == layout.size):
            wanted = f"multiples of {layout.patch}" if layout.any_size else f"{layout.size}"
            raise PromptError(f"{self.name} reads images of height and width {wanted}; this one is {height} × {width}")
        texts = layout.texts(height, width)
        more = {"pixel_values": pixels}
        return Given(range(len(texts)), more, texts=texts, spans=layout.spans(height, width), tokens=False)

    def _among_tokens(self, item: Any) -> Given:
        if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), Tensor):
            raise PromptError(
                f"{self.name} reads an image among tokens: pass what its processor makes of both, "
                f"processor(images=…, text=…, return_tensors='pt'); got {type(item).__name__}"
            )
        ids = item["input_ids"]
        if ids.ndim != 2 or len(ids) != 1:
            raise PromptError(f"one prompt at a time: input_ids [1, position] expected, got {tuple(ids.shape)}")
        mask = item.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise PromptError("the prompt is padded: give it to the processor alone, without padding")
        if ids.shape[1] > self.n_ctx:
            raise PromptError(f"a prompt of {ids.shape[1]} tokens is longer than {self.name}'s context of {self.n_ctx}")
        takes = inspect.signature(self.hf.forward).parameters
        unread = [k for k, v in item.items() if k not in takes and k not in BOOKKEEPING and v is not None]
        if unread:
            raise PromptError(f"{self.name} ({type(self.hf).__name__}) does not read {', '.join(unread)}: leave it out")
        more = {
            k: v for k, v in item.items()
            if k in takes and k not in ("input_ids", "attention_mask") and isinstance(v, Tensor)
        }  # fmt: skip
        listed = ids[0].tolist()
        texts = self.coder.texts(listed) if self.coder is not None else [str(i) for i in listed]
        return Given(listed, more, texts=texts, spans=self.spans_of(listed))

    def spans_of(self, ids: Sequence[int]) -> dict[str, Span]:
        """``image`` (from the first image token to the last), ``image_1``, … if in pieces, ``text`` (what follows)."""
        config = self.hf.config
        token = getattr(config, "image_token_id", None)
        token = getattr(config, "image_token_index", None) if token is None else token
        if token is None or token not in ids:
            return {}
        spans = image_spans(ids, token)
        start, stop = min(a for a, _ in spans.values()), max(b for _, b in spans.values())
        spans["image"] = (start, stop)
        return {**spans, "text": (stop, len(ids))} if stop < len(ids) else spans

    def encode_pair(self, index: int, pair: PromptPair) -> Encoded:
        """An ImagePair as the engine takes it; PromptError if its prompts cannot be compared."""
        clean, corrupt = self.given(pair.clean), self.given(pair.corrupt)
        if len(clean) != len(corrupt) or clean.shapes != corrupt.shapes:
            raise PromptError(
                f"pair {index}: clean and corrupt have {len(clean)} and {len(corrupt)} positions and inputs "
                f"{clean.shapes} and {corrupt.shapes}: positions do not correspond. Give images of one size in prompts "
                "of one length"
            )
        answer, foil = self._wanted(index, pair.answer), None if pair.foil is None else self._wanted(index, pair.foil)
        if answer == foil:
            raise PromptError(f"pair {index}: answer and foil are the same, {pair.answer!r}")
        differs = clean.digest != corrupt.digest
        changed = clean.spans.get("image", (0, 0))[0] if differs else None
        return Encoded(clean, corrupt, answer, foil, clean.texts, {**clean.spans, **pair.spans}, changed)

    def _wanted(self, index: int, what: Any) -> int:
        """A class or token by number or name."""
        if isinstance(what, int):
            return what
        if self.layout is None and self.coder is not None:
            return single_token(what, self.coder, f"pair {index}: answer or foil")
        known = getattr(self.hf.config, "label2id", None) or {}
        if what not in known:
            shown = ", ".join(map(repr, list(known)[:5]))
            raise PromptError(f"pair {index}: {self.name} has no class {what!r}; give its number or name ({shown}, …)")
        return int(known[what])


def output_of(done: Any) -> Tensor:
    """What metrics read of a vision encoder's output [batch, features]: class logits, embedding, or pooled state."""
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(done, name, None)
        if isinstance(value, Tensor):
            return value
    return done.last_hidden_state[:, 0]
