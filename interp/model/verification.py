"""Check that a model's outputs through headstats are those that it had before.

This is done whenever a model is loaded.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from interp.errors import ModelError
from interp.model import dummy_inputs
from interp.model.install import stacks
from interp.model.loaded_model import LoadedModel
from interp.model.protocols import Bridge
from interp.prompts import images as pictures

PROBE_TOKENS = 8  # in each of two rows; few, since loading waits for two such forwards


def reads_of(hf: Any) -> str:
    """What a Hugging Face model reads.

    One of "text", "images", "images and text", or "pairs" (an encoder–decoder).
    """
    config, parameters = getattr(hf, "config", None), inspect.signature(hf.forward).parameters
    if getattr(config, "is_encoder_decoder", False):
        return "pairs"
    if "pixel_values" not in parameters:
        return "text"
    return "images and text" if "input_ids" in parameters else "images"


@torch.no_grad()
def probe(model: LoadedModel) -> tuple[Tensor, int]:
    """Run the model on fixed inputs.

    Returns its outputs and how many positions entered block 0. Before installation this uses TransformerLens' own eager
    attention. Raises ModelError if the forward fails.
    """
    vocab = int(model.bridge.cfg.d_vocab)
    length = min(PROBE_TOKENS, model.n_ctx)
    n_positions: list[int] = []

    def note(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        n_positions.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    blocks = getattr(model.bridge, "blocks", None)
    handle = None if blocks is None else blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        if model.reads == "images":
            images = dummy_inputs.images(model.bridge.original_model, 2).to(model.device, model.dtype)
            return pictures.output_of(model.bridge.original_model(pixel_values=images)), n_positions[0]
        if model.reads == "images and text":
            return _with_image(model), 0
        tokens = torch.arange(2 * length).reshape(2, length).mul(7919).add(11).remainder(min(vocab, 30_000))
        if model.reads == "pairs":
            return dummy_inputs.probe_logits(model, tokens.to(model.device)), 0
        return model.bridge(tokens.to(model.device)), length
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{model.name}: a first forward failed: {error}") from error
    finally:
        if handle is not None:
            handle.remove()


def _with_image(model: LoadedModel) -> Tensor:
    """Logits of a prompt with an image.

    Raises ModelError for a family whose prompts are unknown.
    """
    hf = model.bridge.original_model
    try:
        inputs = dummy_inputs.image_prompt(hf)
    except NotImplementedError as error:
        raise ModelError(
            f"{model.name} ({type(hf).__name__}) reads images in a way that interp has not been tried on ({error}); "
            "its numbers could not be trusted, so it is refused"
        ) from error
    return hf(**dummy_inputs.placed(inputs, model.device, model.dtype)).logits


def verify(model: LoadedModel, before: Tensor) -> None:
    """Raise ModelError if a layer bypasses headstats, or outputs have changed.

    ``before``: outputs of `probe` before installation.
    """
    after, _ = probe(model)
    architecture = type(model.bridge.original_model).__name__
    attentions = [(stack, i) for stack, layers in stacks(model.bridge).items() for i in layers]
    silent = [i for stack, i in attentions if model.instruments[stack].record(i).calls == 0]
    if silent:
        raise ModelError(
            f"{model.name} ({architecture}) computes attention outside the interface that interp intercepts: "
            f"no call arrived from {len(silent)} of {len(attentions)} layers (first: layer {silent[0]}). "
            "Its statistics and edits would be silently wrong, so it is refused."
        )
    scale = before.float().abs().max().item() or 1.0
    gap = (after.float() - before.float()).abs().max().item()
    # transformers' eager softmax rounds to float32 even in a float64 model
    allowed = {torch.float32: 1e-4, torch.float64: 1e-5}.get(before.dtype, 5e-2) * max(scale, 1.0)
    if not gap <= allowed:
        raise ModelError(
            f"{model.name} ({architecture}): logits through headstats differ from eager attention by {gap:.2e} "
            f"(allowed {allowed:.1e}); this architecture is not routed correctly and is refused."
        )


def count_hooks(bridge: Bridge) -> int:
    """Count the hooks that a user may have added.

    Hooks by which the libraries only observe are not counted. transformers adds hooks that record attentions and hidden
    states at the first forward that requests them, and a bridge's blocks capture inputs in order to show them at hook
    points.
    """
    observers = ("transformers.utils.output_capturing", "transformer_lens.model_bridge.")
    count, todo, visited = 0, [bridge], set()
    while todo:  # like bridge.modules(), but much faster: every sweep calls this
        module = todo.pop()
        if module is None or id(module) in visited:
            continue
        visited.add(id(module))
        attributes = module.__dict__
        todo += attributes["_modules"].values()
        for hook in (*attributes["_forward_hooks"].values(), *attributes["_forward_pre_hooks"].values()):
            count += not getattr(hook, "__module__", "").startswith(observers)
    return count
