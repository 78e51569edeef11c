"""Checks of function arguments.

InterpError names the argument, its value, and what is expected.

A bool is an int for Python, but never a count or a number here.
"""

from __future__ import annotations

import math
from typing import Any

from interp.errors import InterpError


def is_whole(value: object, least: int | None = None, most: int | None = None) -> bool:
    """Return whether a value is an int (not a bool) from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def is_number(value: object) -> bool:
    """Return whether a value is an int or a float, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_whole(least: int = 1, most: int | None = None, /, **arguments: Any) -> None:
    """Raise InterpError unless each argument is a whole number in a range.

    The range is ``least`` to ``most`` (None: no upper limit).

        check_whole(1, steps=steps, n_seeds=n_seeds)
    """
    for name, value in arguments.items():
        if not is_whole(value, least, most):
            limit = "on" if most is None else f"to {most}"
            raise InterpError(f"{name}={value!r}: a whole number from {least} {limit} is expected")


def check_positive(most: float = math.inf, /, **arguments: Any) -> None:
    """Raise InterpError unless each argument is a finite number above 0 and at most ``most``."""
    for name, value in arguments.items():
        if not is_number(value) or not 0 < value <= most or math.isinf(value):
            limit = "" if math.isinf(most) else f", up to {most:g},"
            raise InterpError(f"{name}={value!r}: a number above 0{limit} is expected")


def check_seed(seed: object) -> None:
    """Raise InterpError unless ``seed`` is a non-negative int."""
    check_whole(0, seed=seed)


def check_window(window: object) -> None:
    """Raise InterpError unless ``window`` is a number of layers, at least 1."""
    if not is_whole(window, 1):
        raise InterpError(f"window must be at least 1 layer, got {window!r}")
