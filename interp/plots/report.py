"""`report(*results)`: one self-contained HTML page with its numbers inside.

The page needs no network: style, script and data are inline, and its content-security policy forbids
everything else. Its scripts and style are in ``page/``; `interp.plots.kinds` lists what can be embedded.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.plots import budget, kinds, payload
from interp.plots.colors import COLORS
from interp.plots.kinds import Result
from interp.plots.template import fill_template
from interp.results.effects import Effects
from interp.utils.damage import Budget, reading
from interp.utils.files import check_suffix, result_file
from interp.utils.json_text import parse_json

log = logging.getLogger("interp")

SCHEMA_VERSION = 1
TIMES = 64  # the results of a page may take this many times its size in memory
PAGE_BYTES = budget.SHORT_BYTES
BLOCK_START, BLOCK_END = '<script type="application/json" id="interp-report">', "</script>"


class Report:
    """Results in reading order, and the page that shows them.

    ``sections`` are (name, result) pairs. A result is an Effects, an AttentionStats, an AttentionPatterns, a Circuit, a
    Curve or a string of prose.
    """

    def __init__(
        self,
        sections: list[tuple[str | None, Result]],
        *,
        title: str | None = None,
        notes: str | None = None,
        max_bytes: int | None = None,
    ):
        _check(sections)
        if max_bytes is not None and not (isinstance(max_bytes, int | float) and max_bytes > 0):
            raise InterpError(
                f"max_bytes must be a number of bytes above 0, or None for the default; got {max_bytes!r}"
            )
        self.sections = list(sections)
        self.title = title or _default_title(sections)
        self.notes = notes
        self.max_bytes = max_bytes

    @property
    def results(self) -> list[Result]:
        """The results, without their names."""
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
        """Return the maps and curves, means over all examples, as plotly figures by name."""
        from interp.plots.static import figures_of

        return figures_of(self.sections)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all.

        Raises InterpError for a name of another suffix than .html, or if the path cannot be written.
        """
        check_suffix(path, ".html", "a report is one page of HTML")
        content = self.html.encode("ascii")
        with result_file(path) as file:
            file.write(content)
        return Path(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Report:
        """Read the results from a page that `write` wrote, identical to the last bit.

        If the page contains only the first examples of attention results, which it states, only these come back, and
        their provenance has ``report_examples``. Raises InterpError, with the file's name, for a page that is damaged
        or that would take more than ``max_bytes`` of memory (default: 128 MiB and 64 times the size of the page).
        """
        with reading(path):
            content = Path(path).read_bytes()
            data = parse_json(embedded_json(content.decode("utf-8")))
            if data["schema"] > SCHEMA_VERSION:
                raise InterpError(
                    f"{path} was written by a newer interp (schema {data['schema']}); upgrade interp to read it"
                )
            memory = Budget(path, len(content), TIMES, max_bytes)
            sections = [(d.get("name"), kinds.decode(d, memory)) for d in data["results"]]
            title, notes = data["title"], data["notes"]
            if not isinstance(title, str) or not (notes is None or isinstance(notes, str)):
                raise InterpError(f"{path} is damaged: its title is {title!r:.40}")
            return cls(sections, title=title, notes=notes)

    def _payload(self) -> dict[str, Any]:
        encoded = [{"name": name, **kinds.encode(result)} for name, result in self.sections]
        page = {
            "format": "interp.report",
            "schema": SCHEMA_VERSION,
            "title": self.title,
            "notes": self.notes,
            "colors": COLORS,
            "results": encoded,
        }
        bound = self.max_bytes or budget.default_bytes(self.results)
        n_bytes = bound - len(fill_template(self.title, payload.dump(page)))
        budget.add_examples(self.results, encoded, n_bytes)
        self._check_size(encoded, bound, len(fill_template(self.title, payload.dump(page))))
        return page

    def _check_size(self, encoded: list[dict[str, Any]], bound: int, size: int) -> None:
        """Raise InterpError if the page is larger than ``max_bytes``.

        If the default bound is exceeded, log a warning.
        """
        if size <= bound:
            return
        largest = ", ".join(f"{what}: {n / 1e6:.1f} MB" for what, n in budget.sizes_of(encoded)[:3])
        message = (
            f"the page is {size / 1e6:.1f} MB, over its budget of {bound / 1e6:.1f} MB, with the fewest examples "
            f"possible ({largest}). Leave out the largest result, report fewer examples of it "
            "(e.g. effects.where(example=0)), or pass a larger max_bytes"
        )
        if self.max_bytes is not None:
            raise InterpError(message)
        log.warning(message)


def report(
    *results: Result | Mapping[str, Result],
    title: str | None = None,
    notes: str | None = None,
    max_bytes: int | None = None,
) -> Report:
    """Put results on one page.

        effects = interp.patch(model, pairs, model.sites("z"))
        stats = model.attention_stats(pairs)
        interp.report({"Patching heads": effects}, "A paragraph.", stats, title="IOI").write("ioi.html")

    Results appear in the order of the arguments. A string becomes a paragraph; a mapping names its results. All results
    must come from the same model.

    ``max_bytes`` bounds the page (default: 1.5 MB; 5 MB if a prompt has more than 64 tokens). To fit, the page leaves
    out attention of later examples, then detail of the first, and states what it left out; effects are always complete.
    If the page is still too large, InterpError is raised if ``max_bytes`` was set; otherwise the size is logged.
    """
    sections: list[tuple[str | None, Result]] = []
    for result in results:
        items = result.items() if isinstance(result, Mapping) else [(None, result)]
        sections += [(None if name is None else str(name), r) for name, r in items]
    return Report(sections, title=title, notes=notes, max_bytes=max_bytes)


def embedded_json(page: str) -> str:
    """Return the JSON text of a page that `Report.write` wrote. InterpError if there is none."""
    start = page.find(BLOCK_START) + len(BLOCK_START)
    end = page.find(BLOCK_END, start)
    if start < len(BLOCK_START) or end < 0:
        raise InterpError("this is not a report written by interp: it has no embedded results")
    return page[start:end]


def _check(sections: list[tuple[str | None, Result]]) -> None:
    """Raise InterpError for results that cannot make a page."""
    for i, (name, result) in enumerate(sections, start=1):
        label = f"result {i}" + (f" ({name})" if name else "")
        kind = kinds.kind_of(result)
        if kind is None:
            raise InterpError(
                f"{label} is a {type(result).__name__}; a report takes Effects, AttentionStats, AttentionPatterns, "
                "Circuits, Curves, text, or a mapping from names to these"
            )
        kind.check(result, label)
    if all(isinstance(result, str) for _, result in sections):
        raise InterpError("there is nothing to report: pass at least one Effects or AttentionStats")
    models: dict[str, str] = {}
    for i, model in _models(sections):
        models.setdefault(json.dumps(payload.clean_json(model), sort_keys=True), f"{model} (result {i})")
    if len(models) > 1:
        names = " and ".join(models.values())
        raise InterpError(
            f"one report is about one model, but these results come from {names}; write one for each (of a joined "
            "table, effects.where(model=…) has the rows of one)"
        )


def _models(sections: list[tuple[str | None, Result]]) -> Iterator[tuple[int, Any]]:
    """Yield the number of each result and its model, or models: of a joined table those of its rows."""
    for i, (_, result) in enumerate(sections, start=1):
        model = kinds.provenance_of(result).get("model")
        if isinstance(model, list) and isinstance(result, Effects):
            model = result.frame()["model"].dropna().unique().tolist() or model
        yield from ((i, m) for m in (model if isinstance(model, list) else [model]) if m is not None)


def _default_title(sections: list[tuple[str | None, Result]]) -> str:
    provenances = [kinds.provenance_of(r) for _, r in sections]
    parts = [next((str(p[k]) for p in provenances if isinstance(p.get(k), str)), None) for k in ("task", "model")]
    return " · ".join(dict.fromkeys(p for p in parts if p)) or "Causal effects and attention"
