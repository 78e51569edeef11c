"""Sweeps that survive: one TOML file, one run directory, one table, whatever stops them in between.

`config` says what is run, `store` keeps it, `leases` share it, `work` computes it, `executors` decide where, `drive`
brings it to its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.sweep.api import Sweep

__all__ = ["Sweep"]

__getattr__, __dir__ = lazy_exports(__name__, {"api": ("Sweep",)})
