"""Sweeps that survive: one TOML file, one run directory, one table, whatever stops them in between.

`config` says what is run, `store` keeps it, `leases` share it, `work` computes it, `executors` decide where, `drive`
brings it to its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.sweep.api import Sweep

__all__ = ["Sweep"]


def __getattr__(name: str) -> Any:
    # Lazy: a worker of light parts need not load pandas.
    if name == "Sweep":
        from interp.sweep.api import Sweep

        return Sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
