"""On what the doctor tries a model: prompts, padded batches, made-up images and sounds; and what it compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.model import dummy_inputs as made_up
from interp.model.dummy_inputs import probe_inputs
from interp.model.model import Model
from interp.model.verification import reads_of
from interp.prompts.images import output_of

PROMPTS = (
    "When John and Mary went to the store, John gave a drink to",
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
)


def batches(hf: Any, tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """Inputs of a Hugging Face model by what they are."""
    first = next(hf.parameters())
    reads = reads_of(hf)
    if reads == "images":
        found = {"two images": {"pixel_values": made_up.images(hf, 2)}}
    elif reads == "images and text":
        found = {"a prompt with an image": made_up.image_prompt(hf)}
    elif reads == "pairs":
        tokens = torch.arange(24).reshape(2, 12).mul(7919).add(11).remainder(int(hf.config.vocab_size))
        found = {"a source and a target": probe_inputs(hf, tokens)}
    else:
        found = _of_text(tokenizer)
    return {name: made_up.placed(batch, first.device, first.dtype) for name, batch in found.items()}


def _of_text(tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """The prompts alone, padded left and padded right."""
    ids = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    longest = max(map(len, ids))
    made = {"one prompt": {"input_ids": torch.tensor([ids[0]])}}
    for side in ("left", "right"):
        tokens = torch.zeros(len(ids), longest, dtype=torch.long)
        real = torch.zeros_like(tokens)
        for row, own in enumerate(ids):
            where = slice(longest - len(own), longest) if side == "left" else slice(0, len(own))
            tokens[row, where], real[row, where] = torch.tensor(own), 1
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        made[f"padded on the {side}"] = {"input_ids": tokens, "attention_mask": real, "position_ids": positions}
    return made


@torch.no_grad()
def outputs(hf: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or what a model has in their place, at real positions."""
    done = hf(**batch)
    if "input_ids" not in batch and "decoder_input_ids" not in batch:
        return output_of(done)
    found = done.logits if getattr(done, "logits", None) is not None else done.last_hidden_state
    real = batch.get("attention_mask")
    return found if real is None or "decoder_input_ids" in batch else found[real.bool()]


def prompt(model: Model) -> Sequence[int]:
    """One prompt as the engine takes it: text (with the mask token, if the model fills it in), or with an image."""
    if model.pictures is not None:
        hf = model.bridge.original_model
        made = made_up.images(hf)[0] if model.reads == "images" else made_up.image_prompt(hf)
        return model.pictures.read(made)
    if model.tokenizer is None:
        return [i % int(model.bridge.cfg.d_vocab) for i in range(min(8, model.n_ctx))]
    mask = f" {model.tokenizer.mask_token}" if model.masked else ""
    return model.coder.encode(PROMPTS[0] + mask)
