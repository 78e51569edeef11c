"""Which families of `interp.doctor.families.text` the matrix tests run: a few always, the others marked slow."""

from __future__ import annotations

from typing import Any

import pytest

from interp.doctor.families.text import FAMILIES

ARCHITECTURES = ("llama", "gpt2", "neox", "mistral", "gemma2")  # the ways in which attention is intercepted
QUICK = {*ARCHITECTURES, "bert", "t5", "vit", "dinov2", "llava", "paligemma"}


def of_kind(*kinds: str) -> list[Any]:
    """Families of some kinds, those that are not among the quick ones marked slow."""
    names = [f for f in FAMILIES if FAMILIES[f].kind in kinds]
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in names]


EVERY = of_kind("decoder", "hybrid")
OTHERS = [f for f in EVERY if f not in ARCHITECTURES]
