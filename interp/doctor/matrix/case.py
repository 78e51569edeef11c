"""One family's tiny models, their inputs, and the measure of a difference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.doctor.families.text import FAMILIES, tiny_hf
from interp.model import dummy_inputs
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.install import stacks
from interp.model.load_model import load
from interp.model.loading import wrap
from interp.model.model import Model
from interp.model.protocols import Bridge
from interp.model.reading import Weights
from interp.prompts.images import output_of
from interp.zoo.tokenizer import SPECIALS, word_tokenizer

ALLOWED = 1e-4  # largest difference, relative to the largest value: float32 rounding in models of a few layers
WORDS = tuple(f"w{i}" for i in range(100 - len(SPECIALS)))
DECODERS = ("decoder", "hybrid")
PREFIXES = {
    "": "blocks.{}.attn",
    "vision": "vision_encoder.encoder_layers.{}.attn",
    "encoder": "encoder_blocks.{}.attn",
    "decoder": "decoder_blocks.{}.self_attn",
    "cross": "decoder_blocks.{}.cross_attn",
}


class DoesNotApply(Exception):
    """Raised by a check that does not apply to a family; its text says why."""


class FamilyCase:
    """One family's models with equal weights, each built when a check first needs it."""

    def __init__(self, family: str):
        self.family = family
        self.kind = FAMILIES[family].kind
        self.tokenizer = word_tokenizer(WORDS)

    @cached_property
    def eager(self) -> Any:
        """Hugging Face's eager attention, in float64 if the family supports it."""
        return tiny_hf(self.family)

    @cached_property
    def eager32(self) -> Any:
        """The same in float32, for padding.

        With padding, transformers' eager float64 mask overflows its float32 softmax.
        """
        return tiny_hf(self.family, torch.float32)

    @cached_property
    def ours(self) -> Model:
        """Through headstats, in float64 if the family supports it."""
        return load(tiny_hf(self.family), tokenizer=self.tokenizer)

    @cached_property
    def ours32(self) -> Model:
        """Through headstats, in float32."""
        return load(tiny_hf(self.family, torch.float32), tokenizer=self.tokenizer)

    @cached_property
    def theirs(self) -> Bridge:
        """A TransformerBridge as TransformerLens builds it."""
        return wrap(Weights(f"tiny {self.family}", tiny_hf(self.family), self.tokenizer)).bridge

    # ------------------------------------------------------------ inputs and outputs

    def tokens(self, batch: int = 3, length: int = 11) -> Tensor:
        """Random token ids without special tokens, the same every time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(len(SPECIALS), 100, (batch, length), generator=generator)

    def inputs(self) -> dict[str, Tensor]:
        """Inputs of a forward of the family."""
        if self.kind == "vision":
            return {"pixel_values": dummy_inputs.images(self.eager, 3)}
        if self.kind == "vision-language":
            return dummy_inputs.image_prompt(self.eager)
        if self.kind != "seq2seq":
            return {"input_ids": self.tokens()}
        decoder = {"decoder_input_ids": self.tokens(3, 6).flip(1)}
        if self.eager.main_input_name != "input_features":
            return {"input_ids": self.tokens(), **decoder}
        config, generator = self.eager.config, torch.Generator().manual_seed(2)
        shape = (3, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator, dtype=torch.float64), **decoder}

    def run(self, model: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
        """Run a Hugging Face model, a bridge or a Model.

        Returns logits, or the output in their place.
        """
        inputs = self.inputs() if inputs is None else inputs
        if self.kind in DECODERS and not options and list(inputs) == ["input_ids"]:
            output = model(inputs["input_ids"])
            return getattr(output, "logits", output)
        hf = getattr(getattr(model, "bridge", model), "original_model", model)
        first = next(hf.parameters())
        output = hf(**dummy_inputs.placed(inputs, first.device, first.dtype), **options)
        if self.kind == "vision":
            return output_of(output)
        return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state

    # ------------------------------------------------------------ kinds of attention

    def attentions(self) -> dict[str, tuple[str, int]]:
        """The hook prefix of every attention, with its stack and layer.

        For example ``blocks.1.attn``: "", 1.
        """
        blocks = stacks(self.ours.bridge)
        return {PREFIXES[stack].format(i): (stack, i) for stack, layers in blocks.items() for i in layers}

    @torch.no_grad()
    def stack_calls(self) -> dict[str, list[AttentionCall]]:
        """The attention calls of each layer of each stack in one forward."""
        recorded: dict[str, list[AttentionCall]] = {stack: [] for stack in self.ours.instruments}
        with ExitStack() as handlers:
            for stack, instrument in self.ours.instruments.items():
                handlers.enter_context(instrument.handled_by(_recording(recorded[stack])))
            self.run(self.ours)
        return recorded

    def calls(self) -> list[AttentionCall]:
        """The calls of all stacks as one list."""
        return [call for calls in self.stack_calls().values() for call in calls]

    def features(self) -> list[str]:
        """This family's attention features besides plain causal softmax.

        Negative controls can break these.
        """
        by_stack, calls = self.stack_calls(), self.calls()
        main = by_stack.get("") or calls
        has = {
            "both directions": not self.ours.stacks and all(map(_sees_right, main)),
            "three stacks": bool(self.ours.stacks),
            "grouped": any(c.k.shape[1] < c.q.shape[1] for c in calls),
            "window": any(c.window is not None for c in main),
            "softcap": any(c.softcap is not None for c in calls),
            "sinks": any(c.sinks is not None for c in calls),
            "bias": any(c.bias is not None for c in calls),
            "own scale": any(abs(c.scale * c.q.shape[-1] ** 0.5 - 1) > 1e-6 for c in calls),
        }
        return [name for name, present in has.items() if present]


def _recording(calls: list[AttentionCall]) -> Callable[[AttentionCall], Tensor]:
    """A handler that appends each attention call to ``calls`` and computes it."""

    def record(call: AttentionCall) -> Tensor:
        calls.append(call)
        return attend(call).out

    return record


def _sees_right(call: AttentionCall) -> bool:
    """Whether the first query may attend to the last key.

    A causal mask can come as a bias.
    """
    hidden = call.bias is not None and bool((call.bias[..., 0, -1] < -1e30).any())
    return not call.causal and not hidden


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value of ``theirs``.

    It is infinite for NaN or another shape.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    gap = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
    return gap if gap == gap else float("inf")
