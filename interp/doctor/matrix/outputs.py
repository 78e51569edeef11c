"""Checks of outputs: logits, padding, packed rows, cached steps, generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from interp.doctor.matrix.case import ALLOWED, DECODERS, DoesNotApply, FamilyCase, difference
from interp.model import dummy_inputs
from interp.model.hf_classes import key_value_cache
from interp.model.model import Model
from interp.zoo.tokenizer import SPECIALS


@torch.no_grad()
def logits(case: FamilyCase) -> float:
    """Logits (or embeddings, or hidden states) of a batch equal eager's."""
    return max(
        difference(case.run(case.ours), case.run(case.eager)),
        difference(case.run(case.ours32), case.run(case.eager32)),
    )


def left_padding(case: FamilyCase) -> float:
    """Logits of a batch padded on the left equal eager's at real tokens."""
    return _padding(case, "left")


def right_padding(case: FamilyCase) -> float:
    """Logits of a batch padded on the right equal eager's at real tokens."""
    return _padding(case, "right")


@torch.no_grad()
def _padding(case: FamilyCase, side: str) -> float:
    """Compare logits of a padded batch.

    For an encoder–decoder the source is padded and all logits count.
    """
    inputs = case.inputs()
    if "input_ids" not in inputs:
        raise DoesNotApply("it reads no tokens that could be padded")
    if case.kind == "vision-language":
        inputs, real = _padded(inputs, side), None
    else:
        real = torch.ones(3, 11, dtype=torch.long)
        for row, pad in enumerate((0, 3, 7)):
            real[row, slice(0, pad) if side == "left" else slice(11 - pad, 11)] = 0
        inputs["attention_mask"] = real
    if case.kind in DECODERS:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    theirs, ours = case.run(case.eager32, inputs), case.run(case.ours32, inputs)
    if case.kind == "seq2seq":
        return difference(ours, theirs)
    real = inputs["attention_mask"].bool()
    return difference(ours[real], theirs[real])


def _padded(inputs: dict[str, Tensor], side: str, pad: int = 4) -> dict[str, Tensor]:
    """Add padding tokens before or after a prompt with an image, and its mask."""
    n = inputs["input_ids"].shape[1]
    out = dict(inputs, attention_mask=torch.ones(1, n, dtype=torch.long))
    for name, value in out.items():
        if value.shape == (1, n) and not value.is_floating_point():
            fill = value.new_full((1, pad), SPECIALS.index("<eos>") if name == "input_ids" else 0)
            out[name] = torch.cat([fill, value] if side == "left" else [value, fill], dim=1)
    return out


@torch.no_grad()
def packed(case: FamilyCase) -> float:
    """Sequences in one row, separated by position_ids, do not see each other."""
    if case.kind not in DECODERS:
        raise DoesNotApply("only decoders pack sequences by position_ids")
    tokens, lengths = case.tokens(1), (4, 2, 5)
    parts = tokens.split(lengths, dim=1)
    inputs = {"input_ids": tokens, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    alone = torch.cat([case.eager32(part).logits for part in parts], dim=1)
    theirs = case.eager32(**inputs, use_cache=False).logits
    gap = difference(case.ours32.bridge.original_model(**inputs, use_cache=False).logits, theirs)
    if gap <= ALLOWED < difference(theirs, alone):
        raise DoesNotApply("neither Hugging Face nor interp separates packed sequences of this family")
    return max(gap, difference(theirs, alone))


@torch.no_grad()
def cached(case: FamilyCase) -> float:
    """Decoding token by token with a key/value cache gives the logits of one forward.

    For a hybrid, and after an image, it gives those of Hugging Face's steps: a recurrent layer may compute single steps
    differently from a scan, and a prompt may be read in both directions.
    """
    if case.kind in ("encoder", "vision"):
        raise DoesNotApply("an encoder does not decode")
    if case.kind == "seq2seq":
        return difference(_steps_of_decoder(case, case.ours), case.run(case.eager))
    if case.kind == "vision-language":
        return difference(_steps_after_image(case, case.ours), _steps_after_image(case, case.eager))
    tokens = case.tokens(2, 9)
    pieces = tokens.split([4, 1, 1, 1, 1, 1], dim=1)

    def stepped(model: Any) -> Tensor:
        cache = key_value_cache(case.eager.config)
        steps = [model(piece, past_key_values=cache, use_cache=True) for piece in pieces]
        return torch.cat([getattr(step, "logits", step) for step in steps], 1)

    hybrid = case.kind == "hybrid"
    return difference(stepped(case.ours), stepped(case.eager) if hybrid else case.eager(tokens).logits)


def _steps_of_decoder(case: FamilyCase, model: Model) -> Tensor:
    """An encoder–decoder's logits, one token of the target at a time."""
    hf = model.bridge.original_model
    inputs = dummy_inputs.placed(case.inputs(), model.device, model.dtype)
    target, cache, encoded, logits = inputs.pop("decoder_input_ids"), None, {}, []
    for token in target.split(1, dim=1):
        output = hf(**(inputs | encoded), decoder_input_ids=token, past_key_values=cache, use_cache=True)
        cache, encoded = output.past_key_values, {"encoder_outputs": (output.encoder_last_hidden_state,)}
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _steps_after_image(case: FamilyCase, model: Any) -> Tensor:
    """Logits of a prompt with an image and of three tokens decoded after it."""
    hf = getattr(getattr(model, "bridge", model), "original_model", model)
    first = next(hf.parameters())
    inputs = dummy_inputs.placed(case.inputs(), first.device, first.dtype)
    output = hf(**inputs, use_cache=True, return_dict=True)
    logits = [output.logits]
    for n, token in enumerate((20, 30, 40), start=1):
        cache = getattr(output, "past_key_values", None)
        cache = output.language_model_outputs.past_key_values if cache is None else cache  # BLIP-2
        step = {"input_ids": torch.tensor([[token]]), "past_key_values": cache, "use_cache": True}
        if case.family == "blip2":  # its forward needs an image every time, so its language model continues alone
            mask = torch.ones(1, inputs["input_ids"].shape[1] + n, dtype=torch.long)
            output = hf.language_model(**step, attention_mask=mask)
        else:
            output = hf(**step)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def halve_head(x: Tensor, hook: Any) -> Tensor:
    """A hook on q, v or z that halves head 1.

    Shape [batch, position, heads, d_head]; of v with a single head it halves that one.
    """
    x = x.clone()
    x[:, :, min(1, x.shape[2] - 1)] *= 0.5
    return x


@torch.no_grad()
def generation(case: FamilyCase) -> float:
    """``generate`` respects a hook, for decoders on a left-padded batch.

    A decoder's steps must equal TransformerLens' logits without cache or padding; those of other models must equal
    eager attention with the same head halved by hand.
    """
    if case.kind in ("encoder", "vision"):
        raise DoesNotApply("an encoder generates nothing")
    if case.kind not in DECODERS:
        return _generated_otherwise(case)
    tokens, steps = case.tokens(2, 9), 4
    real = torch.ones_like(tokens)
    real[1, :3] = 0
    edits = [("blocks.1.attn.hook_z", halve_head)]
    with case.ours32.bridge.hooks(fwd_hooks=edits):
        generated = case.ours32.bridge.original_model.generate(
            input_ids=tokens, attention_mask=real, do_sample=False, max_new_tokens=steps, min_new_tokens=steps,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    worst = 0.0
    for row, pad in enumerate((0, 3)):
        for step in range(steps):
            so_far = generated.sequences[row : row + 1, pad : tokens.shape[1] + step]
            expected = case.theirs.run_with_hooks(so_far, fwd_hooks=edits)[0, -1]
            worst = max(worst, difference(generated.logits[step][row], expected))
    return worst


def _generated_otherwise(case: FamilyCase) -> float:
    inputs = case.inputs()
    inputs.pop("decoder_input_ids", None)
    if "input_features" in inputs:
        raise DoesNotApply("Whisper generates by a custom procedure, over pieces of sound")
    prefix = "decoder_blocks.1.self_attn" if case.kind == "seq2seq" else "blocks.1.attn"
    options: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    options |= dummy_inputs.placed(inputs, case.ours32.device, torch.float32)
    with case.ours32.bridge.hooks(fwd_hooks=[(f"{prefix}.hook_z", halve_head)]):
        ours = case.ours32.bridge.original_model.generate(**options)
    with _halved_by_hand(case, prefix):
        theirs = case.eager32.generate(**options)
    if not torch.equal(ours.sequences, theirs.sequences):
        return float("inf")
    plain = case.eager32.generate(**options)
    if difference(plain.logits[0], theirs.logits[0]) < 1e-6:
        raise AssertionError("halving a head changes nothing")
    return max(difference(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@contextmanager
def _halved_by_hand(case: FamilyCase, prefix: str) -> Iterator[None]:
    """Halve head 1's part of an eager attention's output inside the block.

    It changes the input of the output projection.
    """
    stack, layer, attn = prefix.split(".")
    blocks = case.ours32.bridge.adapter.component_mapping[stack]
    part = blocks.submodules[attn]
    projection = case.eager32.get_submodule(f"{blocks.name}.{layer}.{part.name}.{part.submodules['o'].name}")

    def halve(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        width = x.shape[-1] // case.ours32.n_heads
        x[..., width : 2 * width] *= 0.5
        return (x, *args[1:])

    handle = projection.register_forward_pre_hook(halve)
    try:
        yield
    finally:
        handle.remove()
