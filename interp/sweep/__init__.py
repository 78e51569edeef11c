"""Sweeps that can be resumed, whatever interrupts them.

A sweep has one TOML file, one run directory and one table.

`config` defines what is run, `effects_job` computes a part of it, and `interp.jobs` stores, shares and completes the
parts. `plan` estimates the cost, `export` writes the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.sweep.api import Sweep

__all__ = ["Sweep"]

__getattr__, __dir__ = lazy_exports(__name__, {"api": ("Sweep",)})
