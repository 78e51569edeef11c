"""`report(*results)`: one self-contained HTML page with its numbers inside.

The page needs no network: style, script and data are inline, and its content-security policy forbids
everything else. Its parts live in ``page/``; `payload` says what is embedded.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InterpError
from interp.plots import budget, payload
from interp.plots.circuit_payload import CircuitLike, CurveLike
from interp.plots.colors import COLORS
from interp.plots.template import fill_template
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects
from interp.utils.files import result_file

log = logging.getLogger("interp")

SCHEMA_VERSION = 1
PAGE_BYTES = budget.SHORT_BYTES
DATA_BLOCK = re.compile(r'<script type="application/json" id="interp-report">(.*?)</script>', re.S)


class Report:
    """Results in reading order, and the page that shows them. Made by `report` and `Report.read`.

    ``sections`` are (name, result) pairs; a result is an Effects, an AttentionStats, an AttentionPatterns, a Circuit, a
    Curve or a string of prose.
    """

    def __init__(
        self,
        sections: list[tuple[str | None, payload.Result]],
        *,
        title: str | None = None,
        notes: str | None = None,
        max_bytes: int | None = None,
    ):
        _check(sections)
        if max_bytes is not None and not (isinstance(max_bytes, int | float) and max_bytes > 0):
            raise InterpError(f"max_bytes={max_bytes!r}: a number of bytes above 0 expected, or None for the default")
        self.sections = list(sections)
        self.title = title or _default_title(sections)
        self.notes = notes
        self.max_bytes = max_bytes

    @property
    def results(self) -> list[payload.Result]:
        """The results without their names."""
        return [result for _, result in self.sections]

    def __repr__(self) -> str:
        return f"Report({self.title!r}: " + "; ".join(
            f"{name + ': ' if name else ''}{'prose' if isinstance(r, str) else repr(r)}" for name, r in self.sections
        ) + ")"  # fmt: skip

    @cached_property
    def html(self) -> str:
        """The whole page."""
        return fill_template(self.title, payload.dump(self._payload()))

    def _repr_html_(self) -> str:
        source = escape(self.html, quote=True)
        title = escape(self.title, quote=True)
        return (
            f'<iframe srcdoc="{source}" sandbox="allow-scripts allow-downloads" title="{title}" '
            'style="width:100%;height:760px;border:1px solid #8884"></iframe>'
        )

    def to_plotly(self) -> dict[str, Any]:
        """The page's maps and curves as plotly figures, by name, to change or save: means over all examples."""
        from interp.plots.static import figures_of

        return figures_of(self.sections)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all. Raises InterpError if the path cannot be written."""
        content = self.html.encode("ascii")
        with result_file(path) as file:
            file.write(content)
        return Path(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """Open a page that `write` wrote and take its numbers out again, identical to the last bit.

        If the page held only the first examples of attention statistics (it says so), these are what comes
        back, and their provenance has ``report_examples``.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InterpError(f"{path} does not exist") from None
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InterpError(f"{path} cannot be read as a report: {error}") from None
        block = DATA_BLOCK.search(text)
        if block is None:
            raise InterpError(f"{path} is not a report written by interp: it has no embedded results")
        try:
            data = json.loads(block[1])
            if data["schema"] > SCHEMA_VERSION:
                raise InterpError(
                    f"{path} was written by a newer interp (schema {data['schema']}); upgrade interp to read it"
                )
            sections = [(d.get("name"), payload.decode(d)) for d in data["results"]]
            return cls(sections, title=data["title"], notes=data["notes"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InterpError(f"the embedded results of {path} are damaged: {error}") from None

    def _payload(self) -> dict[str, Any]:
        encoded = [{"name": name, **payload.encode(result)} for name, result in self.sections]
        page = {
            "format": "interp.report",
            "schema": SCHEMA_VERSION,
            "title": self.title,
            "notes": self.notes,
            "colors": COLORS,
            "results": encoded,
        }
        bound = self.max_bytes or budget.default_bytes(self.results)
        room = bound - len(fill_template(self.title, payload.dump(page)))
        budget.add_examples(self.results, encoded, room)
        self._mind_the_size(encoded, bound, len(fill_template(self.title, payload.dump(page))))
        return page

    def _mind_the_size(self, encoded: list[dict[str, Any]], bound: int, size: int) -> None:
        """A page that cannot be made small enough says which part is to blame. A bound that was asked for is kept."""
        if size <= bound:
            return
        largest = ", ".join(f"{what}: {n / 1e6:.1f} MB" for what, n in budget.parts(encoded)[:3])
        message = (
            f"the page is {size / 1e6:.1f} MB, over its budget of {bound / 1e6:.1f} MB, with as few examples as can be "
            f"shown ({largest}). Leave out the largest result, report fewer examples of it "
            "(e.g. effects.where(example=0)), or pass a larger max_bytes"
        )
        if self.max_bytes is not None:
            raise InterpError(message)
        log.warning(message)


def report(
    *results: payload.Result | Mapping[str, payload.Result],
    title: str | None = None,
    notes: str | None = None,
    max_bytes: int | None = None,
) -> Report:
    """Put results on one page: ``report(effects, stats).write("ioi.html")``.

    Results appear in the given order. A string becomes a paragraph between them; a mapping names its
    results (``{"Patching": effects}``). All results must come from the same model. ``max_bytes`` (default: 1.5 MB; 5 MB
    where a prompt has more than 64 tokens) bounds the page by leaving out attention of later examples, then detail
    of the first (the page says what); effects always go in whole. What is still too large raises InterpError where a
    bound was asked for, and is logged where not.
    """
    sections: list[tuple[str | None, payload.Result]] = []
    for result in results:
        named = result.items() if isinstance(result, Mapping) else [(None, result)]
        sections += [(None if name is None else str(name), r) for name, r in named]
    return Report(sections, title=title, notes=notes, max_bytes=max_bytes)


def _check(sections: list[tuple[str | None, payload.Result]]) -> None:
    """Refuse what cannot make a page, before anything is computed."""
    for i, (name, result) in enumerate(sections, start=1):
        what = f"result {i}" + (f" ({name})" if name else "")
        if isinstance(result, Effects):
            if len(result) == 0:
                raise InterpError(f"{what} is an empty Effects table: there is nothing to show")
            if not np.isfinite(result.frame()["raw"]).any():
                raise InterpError(
                    f"{what}: every effect is NaN, so there is nothing to show; check the metric and the model"
                )
        elif isinstance(result, AttentionStats):
            if not result.values or len(result) == 0:
                raise InterpError(f"{what} holds attention statistics of 0 examples: there is nothing to show")
        elif isinstance(result, AttentionPatterns):
            if len(result) == 0 or not result.heads:
                raise InterpError(f"{what} holds attention patterns of 0 prompts or heads: there is nothing to show")
        elif not isinstance(result, str | CircuitLike | CurveLike):
            raise InterpError(
                f"{what} is a {type(result).__name__}; a report takes Effects, AttentionStats, AttentionPatterns, "
                "Circuits, Curves, text, or a mapping from names to these"
            )
    if all(isinstance(result, str) for _, result in sections):
        raise InterpError("there is nothing to report: pass at least one Effects or AttentionStats")
    models: dict[str, str] = {}
    for i, model in _models(sections):
        models.setdefault(json.dumps(payload.clean_json(model), sort_keys=True), f"{model} (result {i})")
    if len(models) > 1:
        which = " and ".join(models.values())
        raise InterpError(f"one report is about one model, but these results come from {which}; write one for each")


def _models(sections: list[tuple[str | None, payload.Result]]) -> Iterator[tuple[int, Any]]:
    for i, (_, result) in enumerate(sections, start=1):
        model = _provenance(result).get("model")
        # Effects.concat lists the values on which its parts disagreed
        yield from ((i, m) for m in (model if isinstance(model, list) else [model]) if m is not None)


def _provenance(result: payload.Result) -> dict[str, Any]:
    if isinstance(result, str):
        return {}
    return result.recipe if isinstance(result, CurveLike) else result.provenance


def _default_title(sections: list[tuple[str | None, payload.Result]]) -> str:
    provenances = [_provenance(r) for _, r in sections]
    parts = [next((str(p[k]) for p in provenances if isinstance(p.get(k), str)), None) for k in ("task", "model")]
    return " · ".join(dict.fromkeys(p for p in parts if p)) or "Causal effects and attention"
