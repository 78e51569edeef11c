"""Load models and route their attention through headstats.

This is the only package that imports transformer_lens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.model.load_model import load
    from interp.model.model import Model

__all__ = ["Model", "load"]

__getattr__, __dir__ = lazy_exports(__name__, {"load_model": ("load",), "model": ("Model",)})
