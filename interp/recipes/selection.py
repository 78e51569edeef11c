"""Sites, layers and positions as text: the grammar of ``--sites``, of ``--layers`` and of a sweep's config.

The ``…_text`` functions check a text without a model and raise ValueError with what is expected; the others return
what a recipe takes. Importing this module is light.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interp.errors import InterpError, SiteError
from interp.recipes.choices import LOGITS
from interp.utils.arguments import is_whole
from interp.utils.checks import text

if TYPE_CHECKING:
    from interp.model.model import Model
    from interp.sites import Sites


def layers_text(value: Any) -> str:
    """Check numbers and ranges, ``0-5,9``, or a config's list of numbers, ``[0, 1, 9]``; return them as text."""
    if is_whole(value, 0):
        return str(value)
    if isinstance(value, list):
        if not value or not all(is_whole(layer, 0) for layer in value):
            raise ValueError("a list of layers, as in [0, 1, 9], or a text like '0-5,9' expected")
        return ",".join(map(str, value))
    for item in text(value).split(","):
        ends = item.strip().split("-")
        if len(ends) > 2 or not all(re.fullmatch("[0-9]+", e) for e in ends) or int(ends[0]) > int(ends[-1]):
            raise ValueError("numbers and ranges like '0-5,9' expected")
    return value


def layer_list(value: str) -> list[int]:
    """Return ``0-5,9`` as [0, 1, 2, 3, 4, 5, 9]."""
    numbers: list[int] = []
    for item in value.split(","):
        first, dash, last = item.strip().partition("-")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def sites_text(value: Any) -> str:
    """Check sites by the grammar of ``--sites``, as far as it is possible without a model."""
    from interp.sites import COMPONENTS, Site

    items = [item.strip() for item in text(value).split(",") if item.strip()]
    if not items:
        raise ValueError("a component or sites expected, e.g. 'z' or 'z.L9H6,z.L10H0'")
    for item in items:
        if item.partition("@")[0] not in COMPONENTS:
            try:
                Site.parse(item)
            except SiteError as error:
                raise ValueError(str(error)) from None
    return value


def group_members(value: Any) -> str:
    """Check the sites of a group, given as ``name=site,site``."""
    sites_text(str(value).partition("=")[2])
    return value


def single_sites(value: str) -> list[str]:
    """Return the items of a text of sites that name their layer themselves, so that a choice of layers ignores them."""
    from interp.sites import COMPONENTS

    items = [item.strip() for item in value.split(",") if item.strip()]
    return [item for item in items if item.partition("@")[0] not in COMPONENTS]


def receivers_text(value: Any) -> str:
    """Check the receivers of paths: ``logits``, sites, or both."""
    words = [word.strip() for word in text(value).split(",")]
    if sites := [word for word in words if word != LOGITS]:
        sites_text(",".join(sites))
    return value


def position_value(value: Any) -> int | str:
    """Check a position in a config: a number, or the name of a span (a text of digits is a name)."""
    if is_whole(value) or (isinstance(value, str) and value.strip()):
        return value
    raise ValueError("a whole number or the name of a span expected")


def typed_position(value: str) -> int | str:
    """Return a position as typed: digits are a number, everything else is the name of a span."""
    return int(value) if re.fullmatch(r"-?[0-9]+", value) else value


def sites_of(model: Model, value: str, layers: str | None = None) -> Sites:
    """Return the sites that a text names: components (in ``layers``, if given) and single sites, comma-separated."""
    from interp.sites import COMPONENTS, Site, Sites

    sites = Sites([])
    for item in filter(None, (item.strip() for item in value.split(","))):
        component, at, where = item.partition("@")
        if component in COMPONENTS:
            numbers = None if layers is None else layer_list(layers)
            sites |= model.sites(component, layers=numbers, positions=typed_position(where) if at else None)
        else:
            sites |= [Site.parse(item)]
    return sites


def receivers_of(model: Model, value: str) -> list[Any]:
    """Return ``logits``, sites, or both, as `interp.path_patch` takes them."""
    words = [word.strip() for word in value.split(",")]
    return [*sites_of(model, ",".join(w for w in words if w != LOGITS)), *(w for w in words if w == LOGITS)]


def groups_of(model: Model, groups: Mapping[str, str] | None) -> dict[str, Sites] | None:
    """Return named groups of sites from texts by name; None if there are none."""
    return {name: sites_of(model, value) for name, value in groups.items()} if groups else None


def group_texts(items: list[str] | None) -> dict[str, str]:
    """Return the texts of groups by name, from ``name=site,site`` as given on the command line."""
    groups: dict[str, str] = {}
    for item in items or ():
        name, equals, sites = item.partition("=")
        if not equals or not name.strip():
            raise InterpError(f"--group {item}: name=site,site expected")
        if name.strip() in groups:
            raise InterpError(f"--group {name.strip()} is given twice: list all its sites in one")
        groups[name.strip()] = sites
    return groups
