"""Why a model cannot be loaded, in one readable sentence."""

from __future__ import annotations

import re
from typing import Any

from interp.errors import InterpError
from interp.model.names import did_you_mean


def why_not_object(model: Any) -> str:
    """Explain what to pass in place of a module that is no Hugging Face model."""
    kind = type(model)
    if any(base.__module__.split(".")[0] == "peft" for base in kind.__mro__):
        return (
            f"{kind.__name__} is a model with an adapter of PEFT: pass model.merge_and_unload(), which has "
            "the adapter in its weights, or model.base_model.model, in which the adapter's modules stand beside them"
        )
    if hasattr(model, "_orig_mod"):
        return f"cannot load a compiled {kind.__name__}: torch.compile comes after loading (see docs/models.md)"
    from transformers import PreTrainedModel

    inside = next((path for path, module in model.named_modules() if isinstance(module, PreTrainedModel)), None)
    hint = "" if inside is None else f"; it holds one: pass its .{inside}"
    return f"cannot load a bare {kind.__name__}: pass a Hugging Face PreTrainedModel or a TransformerBridge{hint}"


def why_not(name: str, error: Exception) -> str:
    """Explain the usual ways in which loading fails in one readable sentence."""
    text = str(error)
    if isinstance(error, InterpError):
        return text
    if "safetensors" in text and ("does not appear to have" in text or "no file named" in text.lower()):
        return (
            f"{name} offers no safetensors weights. interp opens no pickled checkpoints, since opening one can run "
            "code; convert it, or load it yourself and pass the model object."
        )
    if match := re.search(r"model type `([^`]+)`", text):
        return (
            f"{name} is of an architecture, {match[1]!r}, that the installed transformers does not know: upgrade "
            "transformers, or check model_type in its config.json"
        )
    if "ignore_mismatched_sizes" in text:
        return (
            f"{name}: the weights do not match config.json: some tensors have other shapes than it asks for "
            "(vocab_size, hidden_size, number of heads?). Correct it, or fetch the checkpoint that belongs to it."
        )
    if "trust_remote_code" in text:
        return f"{name} needs code from its repository; if you trust it, pass trust_remote_code=True"
    offline = ("couldn't connect", "offline", "connection", "resolve host", "max retries", "localentrynotfound")
    if any(word in (text + type(error).__name__).lower() for word in offline):
        return (
            f"{name} is not a local folder, and the model hub cannot be reached ({type(error).__name__}). "
            f"Give a local folder, use 'smollm2', or try again with a network.{did_you_mean(name)}"
        )
    return f"cannot load {name}: {first_line(error)}{did_you_mean(name)}"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def short_cause(error: Exception) -> str:
    """The cause of an error in a few words: its first line, or that it would take code from the model's folder."""
    if "trust_remote_code" in str(error):
        return "it needs code from its repository, which only trust_remote_code=True allows"
    return first_line(error)
