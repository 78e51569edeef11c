"""HTML of an object in a notebook: a few facts and a small table.

Text is escaped, and there is no style.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

LONGEST = 300  # characters of a fact


def card(title: str, facts: Mapping[str, Any], columns: Iterable[str] = (), frame: Any = None) -> str:
    """Return HTML with a title, facts by name, and some columns of a small pandas table."""
    fact_list = " · ".join(f"{escape(name)} <b>{escape(_short(value))}</b>" for name, value in facts.items())
    html = f"<div><strong>{escape(title)}</strong><br>{fact_list}</div>"
    if frame is None or len(frame) == 0:
        return html
    shown = [c for c in columns if c in frame]
    head = "".join(f"<th>{escape(c.strip())}</th>" for c in shown)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_short(row[c]))}</td>" for c in shown) + "</tr>"
        for row in frame.to_dict("records")
    )
    return f"{html}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _short(value: Any) -> str:
    """Format a value; missing values become a dash."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = "–" if text in ("<NA>", "None", "nan") else text
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
