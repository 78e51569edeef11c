"""Inputs on which the doctor tests a model, and the outputs it compares.

The inputs are prompts, padded batches and dummy images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.model import dummy_inputs
from interp.model.dummy_inputs import probe_inputs as source_and_target
from interp.model.model import Model
from interp.model.verification import reads_of
from interp.prompts.images import output_of

PROMPTS = (
    "When John and Mary went to the store, John gave a drink to",
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
)


def batches(hf: Any, tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """Build inputs of a Hugging Face model, by a name that describes them."""
    first = next(hf.parameters())
    reads = reads_of(hf)
    if reads == "images":
        inputs = {"two images": {"pixel_values": dummy_inputs.images(hf, 2)}}
    elif reads == "images and text":
        inputs = {"a prompt with an image": dummy_inputs.image_prompt(hf)}
    elif reads == "pairs":
        tokens = torch.arange(24).reshape(2, 12).mul(7919).add(11).remainder(int(hf.config.vocab_size))
        inputs = {"a source and a target": source_and_target(hf, tokens)}
    else:
        inputs = _text_batches(tokenizer)
    return {name: dummy_inputs.placed(batch, first.device, first.dtype) for name, batch in inputs.items()}


def _text_batches(tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """One prompt without padding, and all prompts padded on the left and on the right."""
    ids = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    longest = max(map(len, ids))
    batches = {"one prompt": {"input_ids": torch.tensor([ids[0]])}}
    for side in ("left", "right"):
        tokens = torch.zeros(len(ids), longest, dtype=torch.long)
        real = torch.zeros_like(tokens)
        for row, prompt_ids in enumerate(ids):
            n = len(prompt_ids)
            columns = slice(longest - n, longest) if side == "left" else slice(0, n)
            tokens[row, columns], real[row, columns] = torch.tensor(prompt_ids), 1
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        batches[f"padded on the {side}"] = {"input_ids": tokens, "attention_mask": real, "position_ids": positions}
    return batches


@torch.no_grad()
def outputs(hf: Any, batch: dict[str, Tensor]) -> Tensor:
    """Run a batch and return its outputs at positions that are not padding.

    These are logits, or the output in their place.
    """
    output = hf(**batch)
    if "input_ids" not in batch and "decoder_input_ids" not in batch:
        return output_of(output)
    values = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    real = batch.get("attention_mask")
    return values if real is None or "decoder_input_ids" in batch else values[real.bool()]


def prompt(model: Model) -> Sequence[int]:
    """One prompt as the engine takes it: text, or text with an image.

    For a masked model the text has the mask token. Token ids where the tokenizer knows few words of the text.
    """
    if model.pictures is not None:
        hf = model.bridge.original_model
        inputs = dummy_inputs.images(hf)[0] if model.reads == "images" else dummy_inputs.image_prompt(hf)
        return model.pictures.read(inputs)
    unknown: Any = None if model.tokenizer is None else model.tokenizer.unk_token_id
    if model.tokenizer is None or (ids := model.coder.encode(PROMPTS[0])).count(unknown) * 2 > len(ids):
        last = int(model.bridge.cfg.d_vocab) - 1  # three tokens again and again: heads that look for repeats find some
        tokens = [0, *(max(0, last - i % 3) for i in range(min(8, model.n_ctx) - 1))]
        mask_token: Any = getattr(model.tokenizer, "mask_token_id", None)
        if not model.masked or mask_token is None:
            return tokens
        return [*(last - 3 if i == mask_token else i for i in tokens[:-1]), mask_token]
    mask = f" {model.tokenizer.mask_token}" if model.masked else ""
    return model.coder.encode(PROMPTS[0] + mask)
