"""Check that interp runs a model, or the matrix of architectures, correctly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.doctor.examination import examine
    from interp.doctor.findings import Examination, Finding

__all__ = ["Examination", "Finding", "examine"]

__getattr__, __dir__ = lazy_exports(__name__, {"examination": ("examine",), "findings": ("Examination", "Finding")})
