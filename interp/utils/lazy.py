"""Packages whose public names are imported on first use.

Importing such a package is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from interp.utils.gc_pause import collector_paused


def lazy_exports(
    package: str, exports: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``(__getattr__, __dir__)`` for a package.

    ``exports``: public names by the submodule that defines them (relative to the package).  ``modules``: submodules
    that are public themselves.

        __getattr__, __dir__ = lazy_exports(__name__, {"attribution.edges": ("attribute_edges",)})
    """
    home = {name: module for module, names in exports.items() for name in names}

    def get(name: str) -> Any:
        if name in home:
            with collector_paused():
                value = getattr(import_module(f"{package}.{home[name]}"), name)
        elif name in modules:
            with collector_paused():
                value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *modules})

    return get, list_names
