"""Checks of weights and inputs that would give wrong numbers without an error."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor

from interp.errors import ModelError, PromptError
from interp.model.loaded_model import LoadedModel
from interp.prompts.embeddings import Embeddings
from interp.prompts.text_encoder import no_tokenizer

IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "input_features")


def refuse_nan_weights(model: torch.nn.Module) -> None:
    """Raise ModelError, which names the weight, if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        # A sum is several times faster than isfinite, and finite only if every weight is. It may overflow: check again.
        if weight.is_floating_point() and not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            n_bad = int((~torch.isfinite(weight)).sum())
            raise ModelError(
                f"weight {name} {tuple(weight.shape)} holds {n_bad} NaN or infinite value(s): the checkpoint is "
                "damaged, and every number made from it would be wrong. Fetch it again."
            )


def needs_images(model: LoadedModel) -> bool:
    """Whether a model reads images alone, or cannot run without an image."""
    pixels = inspect.signature(model.bridge.original_model.forward).parameters.get("pixel_values")
    return pixels is not None and (model.reads == "images" or pixels.default is inspect.Parameter.empty)


def why_one_token(model: LoadedModel) -> str:
    """Say why an answer of a model can only be one token; "" if it can be several, read after each other."""
    if model.masked:
        return f"{model.name} fills in one mask"
    if model.stacks:
        return f"{model.name} is an encoder–decoder, whose answers are no continuation of the prompt"
    if model.reads == "images" or model.headless:
        return f"{model.name} has no language-model head that could read the tokens of an answer"
    return ""


def refuse_text(name: str, text: str) -> NoReturn:
    """Raise PromptError for a prompt of text alone, for a model that `needs_images`."""
    raise PromptError(
        f"{name} reads an image with every prompt, got the text {text!r:.60}: give interp.ImagePair prompts"
    )


def refuse_wrong_inputs(model: LoadedModel, tokens: Any, options: dict[str, Any]) -> None:
    """Raise PromptError for inputs that the model would silently ignore.

    It is also raised for inputs on which the model would fail with an obscure error.
    """
    parameters = inspect.signature(model.bridge.original_model.forward).parameters
    unread = [name for name in IMAGES if options.get(name) is not None and name not in parameters]
    if unread:  # transformers' text models swallow unknown keyword arguments
        raise PromptError(
            f"{unread[0]} was given to {model.name}, a {type(model.bridge.original_model).__name__}, which reads no "
            "images or sound: load a model that does, or leave it out"
        )
    if isinstance(tokens, Embeddings):
        raise PromptError(
            "a prompt of vectors goes into model(prompt) alone, into statistics and recipes; here tokens are expected"
        )
    if isinstance(tokens, str) or (isinstance(tokens, list | tuple) and any(isinstance(t, str) for t in tokens)):
        if model.tokenizer is None:
            raise no_tokenizer(model.name)
        return
    if not isinstance(tokens, Tensor):
        return
    if tokens.device.type != model.device.type:
        raise PromptError(
            f"the tokens are on {tokens.device} and {model.name} is on {model.device}: "
            f"pass tokens.to({str(model.device)!r}), or load the model with device={str(tokens.device)!r}"
        )
    if not tokens.is_floating_point() and tokens.numel():
        least, most = (int(x) for x in tokens.aminmax())
        size = vocabulary_size(model)
        if least < 0 or (size is not None and most >= size):
            raise PromptError(
                f"token {least if least < 0 else most} is outside {model.name}'s vocabulary"
                + ("" if size is None else f" of {size} tokens, 0 to {size - 1}")
            )
    if not tokens.is_floating_point() and tokens.ndim == 2 and tokens.shape[1] > model.n_ctx:
        raise PromptError(
            f"{tokens.shape[1]} tokens are more than {model.name}'s context of {model.n_ctx}: shorten them, or call "
            "model.bridge(tokens) if you want to see what the model does beyond it"
        )


def vocabulary_size(model: LoadedModel) -> int | None:
    """Number of tokens that the model embeds; None if unknown (not all models are classes of transformers)."""
    get_embeddings = getattr(model.bridge.original_model, "get_input_embeddings", None)
    table = getattr(get_embeddings and get_embeddings(), "weight", None)
    return None if table is None else len(table)


def vector_width(model: LoadedModel) -> int | None:
    """Numbers of a vector that the model reads in the place of a token; None if it reads tokens only."""
    hf = model.bridge.original_model
    if model.stacks or model.reads != "text" or "inputs_embeds" not in inspect.signature(hf.forward).parameters:
        return None
    table = getattr(getattr(hf, "get_input_embeddings", lambda: None)(), "weight", None)
    return None if table is None or not hasattr(model.bridge, "embed") else int(table.shape[1])


def mask_positions(model: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Position of the mask token in each row of ``tokens`` [batch, position].

    Raises PromptError unless it occurs once.
    """
    mask = getattr(model.tokenizer, "mask_token_id", None)
    if mask is None:
        lacks = "it has no tokenizer, which would say which token that is" if model.tokenizer is None else (
            "its tokenizer has no mask token"
        )  # fmt: skip
        raise PromptError(f"{model.name} is a masked language model, read at its mask token, but {lacks}")
    is_mask = tokens == mask
    counts = is_mask.sum(-1)
    if (counts != 1).any():
        raise PromptError(
            f"{model.name} is a masked language model, read at its mask token: a prompt must hold "
            f"{model.tokenizer.mask_token!r} exactly once, but one holds it {int(counts[counts != 1][0])} times"
        )
    return is_mask.int().argmax(-1)
