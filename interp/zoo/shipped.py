"""Weights shipped with the package.

Each model is a safetensors file next to a JSON file with config, measurements and checksum.
"""

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
    """Load a shipped model and its JSON file.

    Raises ModelError if a file is missing or differs from the shipped one.
    """
    import torch
    from safetensors.torch import load as read_tensors

    from interp.model.native import plain_module
    from interp.zoo.planted import word_level_bridge

    folder = folder or WEIGHTS
    try:
        description = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        data = (folder / f"{name}.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"zoo.{name}: {error.filename} is missing; reinstall interp") from None
    checksum = hashlib.sha256(data).hexdigest()
    if checksum != description["sha256"]:
        raise ModelError(
            f"zoo.{name}: its weights have the checksum {checksum[:12]}…, and should have "
            f"{description['sha256'][:12]}…: the file {folder / name}.safetensors is damaged or was changed; "
            "reinstall interp"
        )
    bridge = word_level_bridge(name, {**description["config"], "init_weights": False}, words, torch.float32)
    with torch.no_grad():
        for key, value in read_tensors(data).items():
            *path, last = key.split(".")
            module = plain_module(bridge.original_model)
            for step in path:
                module = plain_module(module[int(step)] if step.isdigit() else getattr(module, step))
            getattr(module, last).copy_(value)
    return bridge, description
