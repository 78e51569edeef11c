"""Loss of a model on prose: the paragraphs of this repository's documentation."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import interp

ROOT = Path(__file__).parents[1]


def documentation() -> str:
    """Return the README and all pages of the documentation, one after the other."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *pages))


def paragraphs(markdown: str) -> str:
    """Return the running text of a page: no code, tables, lists, headings or comments."""
    without_code = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", without_code))
    return "\n".join(b for b in blocks if re.match(r"[A-Z*]", b) and len(b) > 200 and "|" not in b)


def windows(model: interp.Model, n: int, length: int, text: str | None = None) -> Tensor:
    """Return ``n`` windows of ``length`` tokens [n, length], spread evenly over a text.

    Each starts with the model's BOS token. ``text``: default, the paragraphs of the documentation.
    """
    ids = model.tokenizer(paragraphs(documentation()) if text is None else text, add_special_tokens=False)["input_ids"]
    first, own = list(model.special_tokens.before), length - len(model.special_tokens.before)
    starts = [i * (len(ids) - own) // max(1, n - 1) for i in range(n)]
    return torch.tensor([[*first, *ids[start : start + own]] for start in starts])


@torch.no_grad()
def loss(model: interp.Model, ids: Tensor) -> float:
    """Return the mean loss of windows [batch, position] in nats per token."""
    logits = model(ids).float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def about_text(ids: Tensor) -> dict[str, Any]:
    """Return what identifies windows: their shape, and a hash of the token ids."""
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    return {"text": "paragraphs of README.md and docs/", "windows": list(ids.shape), "sha256_of_ids": digest}
