"""Images as prompts.

They stand alone for a vision encoder, or among tokens for a vision–language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from interp.errors import PromptError
from interp.prompts.answers import single_token
from interp.prompts.coder import Coder, Encoded
from interp.prompts.listing import listed
from interp.prompts.model_input import ModelInput
from interp.prompts.pairs import Prompt, PromptPair
from interp.prompts.ranges import Span, check_token_ranges
from interp.prompts.spans import image_spans

BOOKKEEPING = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # processors add these for any model


@dataclass(frozen=True, eq=False)
class ImagePair(PromptPair):
    """Two prompts with images, to patch between.

    ``clean`` and ``corrupt`` are outputs of the model's processor: for a vision encoder an image, a tensor
    [channel, height, width], or ``{"pixel_values": …}`` of a batch of one; for a vision–language model the mapping
    with ``input_ids``, ``pixel_values`` and the processor's other outputs. ``answer`` and ``foil``: the name or number
    of a class; for a vision–language model the next token, as text or id. A custom metric need not read them.
    """

    clean: Any
    corrupt: Any
    answer: Any = 0
    foil: Any = None

    def span(self, name: str, words: str | None = None, **_options: Any) -> PromptPair:
        """Raise PromptError: an ImagePair finds its spans from the tokens.

        They are ``image`` and ``text``, or ``cls`` and ``patches``.
        """
        raise PromptError("an ImagePair finds its own spans: image and text, or cls and patches")


@dataclass(frozen=True)
class Layout:
    """How a vision encoder divides an image into positions.

    The first ``prefix`` positions are CLS and registers; patches follow row by row.
    """

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    prefix: int
    any_size: bool = False

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return height // self.patch[0], width // self.patch[1]

    def texts(self, height: int, width: int) -> list[str]:
        """A name for every position."""
        names = ["CLS", *(f"register {i}" for i in range(self.prefix - 1))][: self.prefix]
        rows, columns = self.grid(height, width)
        return [*names, *(f"patch {r},{c}" for r in range(rows) for c in range(columns))]

    def spans(self, height: int, width: int) -> dict[str, Span]:
        """The spans ``cls``, ``registers`` and ``patches`` that the encoder has."""
        n = self.prefix + self.grid(height, width)[0] * self.grid(height, width)[1]
        spans = {"cls": (0, 1), "registers": (1, self.prefix), "patches": (self.prefix, n)}
        return {
            name: (a, b) for name, (a, b) in spans.items() if b <= n and (name == "patches" or a < b <= self.prefix)
        }


def layout_of(config: Any, positions: int) -> Layout:
    """The layout of an encoder of this config.

    Its blocks get ``positions`` at the config's image size.
    """
    config = getattr(config, "vision_config", None) or config
    size, patch = _pair(config.image_size), _pair(config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    return Layout(config.num_channels, size, patch, positions - patches, config.model_type.startswith("dinov2"))


def _pair(x: Any) -> tuple[int, int]:
    return (int(x[0]), int(x[1])) if isinstance(x, Sequence) else (int(x), int(x))


@dataclass(frozen=True)
class ImageReader:
    """Reads images for one model.

    ``layout`` is None for a vision–language model, whose images become tokens.
    """

    name: str
    hf: Any
    layout: Layout | None
    coder: Coder | None
    n_ctx: int

    def prompts(self, items: Any) -> list[ModelInput | str | Prompt | PromptPair]:
        """Split an argument of ``Model.attention_stats`` into prompts.

        Prompts are images or processor outputs; text stays unchanged.
        """
        if self.layout is not None and isinstance(items, Mapping):
            items = items.get("pixel_values", items)
        if self.layout is not None and isinstance(items, Tensor) and items.ndim == 4:
            items = list(items)
        prompts = listed(items, (Mapping, Tensor, str, Prompt, PromptPair), "prompts or images")
        if not prompts:
            raise PromptError("there are no images: pass one, or a list of them")
        return [self._prompt(p) for p in prompts]

    def _prompt(self, item: Any) -> ModelInput | str | Prompt | PromptPair:
        """One prompt: text with its named spans, or an image with its own spans and those that an ImagePair names."""
        words = item.clean if isinstance(item, PromptPair) else item
        if self.layout is None and isinstance(words, str | Prompt):
            return item
        prompt = self.read(words)
        if isinstance(item, PromptPair) and item.spans:
            return prompt.with_spans(check_token_ranges(item.spans, len(prompt)))
        return prompt

    def read(self, item: Any) -> ModelInput:
        """Read one prompt with its image.

        Raises PromptError for an input that the model cannot read.
        """
        return self._read_image(item) if self.layout is not None else self._read_among_tokens(item)

    def _read_image(self, item: Any) -> ModelInput:
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
            allowed = f"multiples of {layout.patch}" if layout.any_size else f"{layout.size}"
            raise PromptError(f"{self.name} reads images of height and width {allowed}; this one is {height} × {width}")
        texts = layout.texts(height, width)
        spans = layout.spans(height, width)
        return ModelInput(range(len(texts)), {"pixel_values": pixels}, texts=texts, spans=spans, has_token_ids=False)

    def _read_among_tokens(self, item: Any) -> ModelInput:
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
        parameters = inspect.signature(self.hf.forward).parameters
        unread = [k for k, v in item.items() if k not in parameters and k not in BOOKKEEPING and v is not None]
        if unread:
            raise PromptError(f"{self.name} ({type(self.hf).__name__}) does not read {', '.join(unread)}: leave it out")
        extra_inputs = {
            k: v for k, v in item.items()
            if k in parameters and k not in ("input_ids", "attention_mask") and isinstance(v, Tensor)
        }  # fmt: skip
        tokens = ids[0].tolist()
        texts = self.coder.texts(tokens) if self.coder is not None else [str(i) for i in tokens]
        return ModelInput(tokens, extra_inputs, texts=texts, spans=self.spans_of(tokens))

    def spans_of(self, ids: Sequence[int]) -> dict[str, Span]:
        """Spans of the images and of the text after them.

        ``image`` (first to last image token), ``image_1``, … if in pieces, and ``text`` (what follows).
        """
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
        """Encode an ImagePair for the engine.

        Raises PromptError if its prompts cannot be compared.
        """
        clean, corrupt = self.read(pair.clean), self.read(pair.corrupt)
        if len(clean) != len(corrupt) or clean.shapes != corrupt.shapes:
            raise PromptError(
                f"pair {index}: clean and corrupt have {len(clean)} and {len(corrupt)} positions and inputs "
                f"{clean.shapes} and {corrupt.shapes}: positions do not correspond. Give images of one size in prompts "
                "of one length"
            )
        answer = self._output_index(index, pair.answer)
        foil = None if pair.foil is None else self._output_index(index, pair.foil)
        if answer == foil:
            raise PromptError(f"pair {index}: answer and foil are the same, {pair.answer!r}")
        differs = clean.digest != corrupt.digest
        changed = clean.spans.get("image", (0, 0))[0] if differs else None
        return Encoded(clean, corrupt, answer, foil, clean.texts, {**clean.spans, **pair.spans}, changed)

    def _output_index(self, index: int, target: Any) -> int:
        """The number of a class or token that is given by number or name."""
        if isinstance(target, int):
            return target
        if self.layout is None and self.coder is not None:
            return single_token(target, self.coder, f"pair {index}: answer or foil")
        classes = getattr(self.hf.config, "label2id", None) or {}
        if target not in classes:
            shown = ", ".join(map(repr, list(classes)[:5]))
            raise PromptError(
                f"pair {index}: {self.name} has no class {target!r}; give its number or name ({shown}, …)"
            )
        return int(classes[target])


def output_of(output: Any) -> Tensor:
    """The part of a vision encoder's output that metrics read [batch, features].

    These are class logits, the embedding or the pooled state.
    """
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return output.last_hidden_state[:, 0]
