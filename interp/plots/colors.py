"""Colour maps shared by the plotly figures and the page, so that both tell the same story.

Diverging: blue below zero, red above, the background's own tone at zero (ColorBrewer RdBu, reversed; safe
for the common colour-vision deficiencies). Sequential: ColorBrewer YlGnBu. On a dark background both run
from dark to bright, so that "nothing here" recedes there too.
"""

from __future__ import annotations

import re

from plotly import colors

DARK_DIVERGING = [
    "#a9d8ff", "#6fb7f5", "#3f8fd6", "#2c659c", "#263f5a",
    "#23272e",
    "#573433", "#93423b", "#cf5848", "#f58a72", "#ffc4b0",
]  # fmt: skip


def _hex(color: str) -> str:
    return "#" + "".join(f"{int(x):02x}" for x in re.findall(r"\d+", color))


DIVERGING = [_hex(c) for c in colors.diverging.RdBu[::-1]]
SEQUENTIAL = [_hex(c) for c in colors.sequential.YlGnBu]

COLORS: dict[str, dict[str, list[str]]] = {
    "diverging": {"light": DIVERGING, "dark": DARK_DIVERGING},
    "sequential": {"light": SEQUENTIAL, "dark": SEQUENTIAL[::-1]},
}


def scale(stops: list[str]) -> list[list[float | str]]:
    """Evenly spaced stops in plotly's ``[[0, colour], …, [1, colour]]`` form."""
    return [[i / (len(stops) - 1), stop] for i, stop in enumerate(stops)]
