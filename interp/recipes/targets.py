"""What a cell changes together: one site, a window of layers, or a group of sites with a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp.engine.cells import rows_of
from interp.errors import InterpError, SiteError
from interp.prompts.pairs import Encoded
from interp.sites import COMPONENTS, EACH, Site, Sites

Groups = Mapping[str, Iterable[Site | str] | Site | str] | Iterable[Iterable[Site | str] | Site | str]
NAMED_BY_SITES = 3  # a group without a name of at most so many sites is called by them


@dataclass(frozen=True)
class Address:
    """Where a group of sites stands in a table: its name as component, and what all its sites share."""

    component: str
    layer: int | None = None
    head: int | None = None
    position: int | str | None = None

    def __str__(self) -> str:
        return self.component


@dataclass(frozen=True)
class Target:
    """Sites that are changed in one forward, and the address under which the result is filed."""

    address: Site | Address
    sites: tuple[Site, ...]


def as_sites(sites: Iterable[Site | str] | Site | str) -> Sites:
    """Accept one site, several, or their text forms."""
    if not isinstance(sites, Site | str | Iterable):
        raise SiteError(f"sites expected, e.g. model.sites('z') or 'z.L0H1', got {type(sites).__name__}")
    return Sites([sites] if isinstance(sites, Site | str) else sites)


def targets_of(
    sites: Iterable[Site | str] | Site | str | None, groups: Groups | None, window: int, n_layers: int
) -> list[Target]:
    """Every site (with ``window`` > 1: with its like in the layers around it), then every group.

    Raises SiteError if there is neither, and for windows over heads or neurons.
    """
    if sites is None and groups is None:
        raise SiteError("there is nothing to sweep: pass sites, e.g. model.sites('z'), or groups={'name': sites}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InterpError(f"window must be at least 1 layer, got {window!r}")
    listed = [] if sites is None else as_sites(sites)
    found = [Target(site, _around(site, window, n_layers)) for site in listed]
    return [*found, *(() if groups is None else _groups(groups))]


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """Layers changed together, centred on ``layer`` and clipped to the model (as in Meng et al.'s published code)."""
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))


def all_sites(targets: Iterable[Target]) -> Sites:
    """Every site of some targets, once."""
    return Sites(s for t in targets for s in t.sites)


def components_of(targets: Iterable[Target]) -> list[str]:
    """The components whose values the targets need."""
    return sorted({s.component for t in targets for s in t.sites})


def spelled(targets: Iterable[Target], prompt: Encoded) -> Iterator[Target]:
    """The targets with ``"each"`` spelled out for one prompt; PromptError if a position is not in it."""
    for target in targets:
        if target.address.position == EACH:
            for i in range(len(prompt)):
                sites = tuple(s.at(i) for s in target.sites)
                yield Target(sites[0] if len(sites) == 1 else replace(target.address, position=i), sites)
        else:
            for site in target.sites:
                rows_of(site, prompt)
            yield target


def _around(site: Site, window: int, n_layers: int) -> tuple[Site, ...]:
    if window == 1:
        return (site,)
    spec = COMPONENTS[site.component]
    if site.layer is None or spec.heads is not None:
        raise SiteError(
            f"window={window} at {site}: layers can be taken together for components of a whole layer (attn_out, "
            "mlp_out, resid_pre, …); heads and neurons of different layers do not correspond. Name them as groups="
        )
    return tuple(replace(site, layer=layer) for layer in window_layers(site.layer, window, n_layers))


def _groups(groups: Groups) -> list[Target]:
    if not isinstance(groups, Iterable):
        raise SiteError(f"groups={{name: sites}}, or a list of lists of sites, expected, got {type(groups).__name__}")
    named = isinstance(groups, Mapping)
    pairs = groups.items() if isinstance(groups, Mapping) else enumerate(groups, 1)
    out, seen = [], set()
    for name, members in pairs:
        sites = tuple(s.at(None) if s.position == EACH else s for s in as_sites(members))
        if not sites:
            raise SiteError(f"group {name!r} has no sites")
        short = " + ".join(map(str, sites)) if len(sites) <= NAMED_BY_SITES else f"group {name}"
        title = str(name) if named else short
        if title in COMPONENTS or title in seen:
            raise SiteError(
                f"two groups, or a group and a component, are called {title!r}: give groups={{name: sites}}"
            )
        seen.add(title)
        shared = {x: _shared([getattr(s, x) for s in sites]) for x in ("layer", "head", "position")}
        out.append(Target(Address(title, **shared), sites))
    if not out:
        raise SiteError("groups= is empty")
    return out


def _shared(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else None
