"""`report(*results)`: one self-contained HTML page with its numbers inside.

The page needs no network: style, script and data are inline, and its content-security policy forbids
everything else. Its parts live in ``page/``; `payload` says what is embedded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from interp.attention import AttentionStats
from interp.effects import Effects
from interp.errors import InterpError
from interp.plots import payload
from interp.plots.colors import COLORS

SCHEMA_VERSION = 1
PAGE_BYTES = 1_500_000
SCRIPTS = ("data.js", "heatmap.js", "effects.js", "attention.js", "page.js")
DATA_BLOCK = re.compile(r'<script type="application/json" id="interp-report">(.*?)</script>', re.S)


class Report:
    """Results in reading order, and the page that shows them. Made by `report` and `Report.read`.

    ``sections`` are (name, result) pairs; a result is an Effects, an AttentionStats or a string of prose.
    """

    def __init__(
        self,
        sections: list[tuple[str | None, payload.Result]],
        *,
        title: str | None = None,
        notes: str | None = None,
        max_bytes: int = PAGE_BYTES,
    ):
        _check(sections)
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
        return _fill_template(self.title, payload.dump(self._payload()))

    def _repr_html_(self) -> str:
        source = escape(self.html, quote=True)
        return (
            f'<iframe srcdoc="{source}" sandbox="allow-scripts" title="{escape(self.title, quote=True)}" '
            'style="width:100%;height:760px;border:1px solid #8884"></iframe>'
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all. Raises InterpError if the path cannot be written."""
        content = self.html.encode("ascii")
        target = Path(path)
        temporary: str | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; a report is for sending
            os.replace(temporary, target)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)
            why = getattr(error, "strerror", None) or error
            raise InterpError(f"cannot write {target}: {why}. Choose a writable folder.") from None
        return target

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
        results = [{"name": name, **_encode(result)} for name, result in self.sections]
        page = {
            "format": "interp.report",
            "schema": SCHEMA_VERSION,
            "title": self.title,
            "notes": self.notes,
            "colors": COLORS,
            "results": results,
        }
        self._add_examples(results, self.max_bytes - len(_fill_template(self.title, payload.dump(page))))
        return page

    def _add_examples(self, results: list[dict[str, Any]], room: int) -> None:
        """Attention at every token, example by example, until the page is full; at least one of each.

        Effects always go in whole. Token-by-token statistics are what makes a page large, and a handful of
        examples shows what there is to see; the Parquet file keeps the rest.
        """
        waiting = [(r, d) for (_, r), d in zip(self.sections, results, strict=True) if isinstance(r, AttentionStats)]
        for i in range(max((len(r) for r, _ in waiting), default=0)):
            for result, data in waiting:
                if i >= len(result) or len(data["examples"]) < i:
                    continue
                example = payload.encode_example(result, i)
                room -= len(payload.dump(example)) + 1
                if room > 0 or i == 0:
                    data["examples"].append(example)


def report(
    *results: Effects | AttentionStats | str | Mapping[str, Effects | AttentionStats | str],
    title: str | None = None,
    notes: str | None = None,
    max_bytes: int = PAGE_BYTES,
) -> Report:
    """Put results on one page: ``report(effects, stats).write("ioi.html")``.

    Results appear in the given order. A string becomes a paragraph between them; a mapping names its
    results (``{"Patching": effects}``). All results must come from the same model. ``max_bytes`` bounds
    the page by leaving out the token-by-token attention of later examples (the page says how many); effects
    always go in whole.
    """
    sections: list[tuple[str | None, payload.Result]] = []
    for result in results:
        named = result.items() if isinstance(result, Mapping) else [(None, result)]
        sections += [(None if name is None else str(name), r) for name, r in named]
    return Report(sections, title=title, notes=notes, max_bytes=max_bytes)


def _encode(result: payload.Result) -> dict[str, Any]:
    if isinstance(result, Effects):
        return payload.encode_effects(result)
    if isinstance(result, AttentionStats):
        return payload.encode_attention(result)
    return {"kind": "prose", "text": result}


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
        elif not isinstance(result, str):
            raise InterpError(f"{what} is a {type(result).__name__}; a report takes Effects, AttentionStats, text, "
                              "or a mapping from names to these")  # fmt: skip
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
        model = None if isinstance(result, str) else result.provenance.get("model")
        # Effects.concat lists the values on which its parts disagreed
        yield from ((i, m) for m in (model if isinstance(model, list) else [model]) if m is not None)


def _default_title(sections: list[tuple[str | None, payload.Result]]) -> str:
    provenances = [r.provenance for _, r in sections if not isinstance(r, str)]
    parts = [next((str(p[k]) for p in provenances if isinstance(p.get(k), str)), None) for k in ("task", "model")]
    return " · ".join(dict.fromkeys(p for p in parts if p)) or "Causal effects and attention"


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _fill_template(title: str, data: str) -> str:
    """Put the parts into page.html; one pass, so that no part can contain a placeholder for another."""
    folder = files("interp.plots") / "page"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    script = _ascii_js('"use strict";\n' + "\n".join(read[name] for name in SCRIPTS))
    style = read["page.css"]
    printable = "".join(c if c.isprintable() else " " for c in title)
    parts = {
        "title": escape(printable).encode("ascii", "xmlcharrefreplace").decode("ascii"),
        "style": style,
        "style_hash": _csp_hash(style),
        "script": script,
        "script_hash": _csp_hash(script),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read["page.html"])


def _ascii_js(script: str) -> str:
    """Non-ASCII characters in string literals as escapes: the page survives any encoding it is mailed in."""
    return re.sub(r"[^\x00-\x7f]", lambda m: json.dumps(m[0])[1:-1], script)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
