"""Checks of the numbers that a fit takes. InterpError names the setting, what it was, and what is expected."""

from __future__ import annotations

import math
from typing import Any

from interp.errors import InterpError


def whole(least: int = 1, most: int | None = None, /, **settings: Any) -> None:
    """Each is a whole number in a range (``most``: up to any)."""
    for name, value in settings.items():
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < least or (most is not None and value > most):
            limit = "on" if most is None else f"to {most}"
            raise InterpError(f"{name}={value!r}: a whole number from {least} {limit} is expected")


def positive(most: float = math.inf, /, **settings: Any) -> None:
    """Each is a finite number above 0, up to ``most``."""
    for name, value in settings.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 < value <= most or math.isinf(value):
            limit = "" if math.isinf(most) else f", up to {most:g},"
            raise InterpError(f"{name}={value!r}: a number above 0{limit} is expected")
