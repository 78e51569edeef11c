"""The page's parts put together: one file, no bundler.

``page/*.js`` are modules with imports and exports, so that they can be read and type-checked one by one. A page holds
them in one script, in the order of `SCRIPTS`, without those two words; names are unique among all of them (a test
compiles the whole).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from html import escape
from importlib.resources import files

SCRIPTS = (
    "dom.js", "colors.js", "data.js", "state.js", "export.js", "tables.js", "heatmap.js", "readout.js", "effects.js",
    "mediation.js", "heads.js", "headlist.js", "patterns.js", "figure.js", "strip.js", "rows.js", "attention.js",
    "sentences.js", "statistics.js", "graph.js", "circuit.js", "provenance.js", "page.js",
)  # fmt: skip
IMPORT = re.compile(r"^import [^;]*;\n", re.M)


def fill_template(title: str, data: str) -> str:
    """Put the parts into page.html; one pass, so that no part can contain a placeholder for another."""
    printable = "".join(c if c.isprintable() else " " for c in title)
    parts = {
        **_fixed_parts(),
        "title": escape(printable).encode("ascii", "xmlcharrefreplace").decode("ascii"),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], parts["page"])


@cache
def _fixed_parts() -> dict[str, str]:
    """Template, style and script, with their hashes for the content-security policy."""
    folder = files("interp.plots") / "page"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    script = joined_script({name: read[name] for name in SCRIPTS})
    style = read["page.css"]
    return {
        "page": read["page.html"], "style": style, "style_hash": _csp_hash(style),
        "script": script, "script_hash": _csp_hash(script),
    }  # fmt: skip


def joined_script(modules: dict[str, str]) -> str:
    """Modules as one strict script in ASCII: the page survives any encoding that it is mailed in."""
    bare = (re.sub(r"^export ", "", IMPORT.sub("", text), flags=re.M) for text in modules.values())
    script = '"use strict";\n{\n' + "\n".join(bare) + "\n}\n"
    return re.sub(r"[^\x00-\x7f]", lambda m: json.dumps(m[0])[1:-1], script)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
