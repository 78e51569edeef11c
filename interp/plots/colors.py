"""Colour maps of the plotly figures and of the page.

Diverging: blue below zero, red above, the colour of the background at zero (ColorBrewer RdBu, reversed; safe for the
common colour-vision deficiencies). Sequential: ColorBrewer YlGnBu. On a dark background both maps run from dark to
bright, so that values near zero are close to the background there too. ``page/colors.js`` turns values into colours.
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
    """Return evenly spaced stops in plotly's ``[[0, colour], …, [1, colour]]`` form."""
    return [[i / (len(stops) - 1), stop] for i, stop in enumerate(stops)]
