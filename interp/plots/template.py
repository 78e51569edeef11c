"""Build the report page from the files in ``page/``: one HTML file, no bundler.

``page/*.js`` are modules with imports and exports, so that each can be read and type-checked alone. The page holds
them in one script, each module after those that it imports, without the words ``import`` and ``export``. Names are
unique among all modules (a test compiles the joined script).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from html import escape
from importlib.resources import files

PAGE = files("interp.plots") / "page"
ENTRY = "page.js"  # the module that starts the page; every other module is imported by it, directly or not
IMPORT = re.compile(r'^import [^;]*"\./([\w-]+\.js)";\n', re.M)


def fill_template(title: str, data: str) -> str:
    """Insert title, data, style and script into page.html.

    All placeholders are replaced in one pass, so that an inserted text cannot contain a placeholder for another.
    """
    printable = "".join(c if c.isprintable() else " " for c in title)
    parts = {
        **_fixed_parts(),
        "title": escape(printable).encode("ascii", "xmlcharrefreplace").decode("ascii"),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], parts["page"])


@cache
def _fixed_parts() -> dict[str, str]:
    """Return template, style and script, with hashes for the content-security policy."""
    script, style = joined_script(page_scripts()), _read("page.css")
    return {
        "page": _read("page.html"), "style": style, "style_hash": _csp_hash(style),
        "script": script, "script_hash": _csp_hash(script),
    }  # fmt: skip


def page_scripts() -> dict[str, str]:
    """Return the text of every module of the page, each after those it imports."""
    scripts: dict[str, str] = {}

    def add(name: str) -> None:
        text = _read(name)
        for imported in IMPORT.findall(text):
            if imported not in scripts:
                add(imported)
        scripts[name] = text

    add(ENTRY)
    return scripts


def joined_script(modules: dict[str, str]) -> str:
    """Join modules into one strict script.

    It is in ASCII, so that the page survives any encoding it is mailed in.
    """
    bare = (re.sub(r"^export ", "", IMPORT.sub("", text), flags=re.M) for text in modules.values())
    script = '"use strict";\n{\n' + "\n".join(bare) + "\n}\n"
    return re.sub(r"[^\x00-\x7f]", lambda m: json.dumps(m[0])[1:-1], script)


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
