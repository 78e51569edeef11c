"""Weights that come with the package: safetensors beside a JSON file that says what they are, checksum included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import ModelError

if TYPE_CHECKING:
    from interp.model.native import TransformerBridge

WEIGHTS = Path(__file__).parent / "weights"


def load(name: str, words: Sequence[str], folder: Path | None = None) -> tuple[TransformerBridge, dict[str, Any]]:
    """The model, and what its JSON file says. ModelError if files are not there, or are not what was shipped."""
    import torch
    from safetensors.torch import load as read

    from interp.model.native import plain_module
    from interp.zoo.planted import word_level_bridge

    folder = folder or WEIGHTS
    try:
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        data = (folder / f"{name}.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"zoo.{name}: {error.filename} is missing; reinstall interp") from None
    found = hashlib.sha256(data).hexdigest()
    if found != about["sha256"]:
        raise ModelError(
            f"zoo.{name}: its weights have the checksum {found[:12]}…, and should have {about['sha256'][:12]}…: the "
            f"file {folder / name}.safetensors is damaged or was changed; reinstall interp"
        )
    bridge = word_level_bridge(name, {**about["config"], "init_weights": False}, words, torch.float32)
    with torch.no_grad():
        for key, value in read(data).items():
            *where, last = key.split(".")
            module = plain_module(bridge.original_model)
            for step in where:
                module = plain_module(module[int(step)] if step.isdigit() else getattr(module, step))
            getattr(module, last).copy_(value)
    return bridge, about
