"""Targets: the sites that one cell changes together (one site, a window of layers, or a named group)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp.engine.cells import rows_of
from interp.errors import SiteError
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.sites import COMPONENTS, EACH, Site, Sites
from interp.utils.arguments import check_window

Groups = Mapping[str, Iterable[Site | str] | Site | str] | Iterable[Iterable[Site | str] | Site | str]
NAMED_BY_SITES = 3  # an unnamed group of at most so many sites is named by them


@dataclass(frozen=True)
class Address:
    """The address of a group in a table: its name as component, and the axes that all its sites share."""

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
    sites: Iterable[Site | str] | Site | str | None, groups: Groups | None, window: int, model: Model
) -> list[Target]:
    """Return a target for every site (``window`` > 1: in the layers around it too), then one for every group.

    Raises SiteError if there is neither, and for windows over heads or neurons.
    """
    if sites is None and groups is None:
        raise SiteError("there is nothing to sweep: pass sites, e.g. model.sites('z'), or groups={'name': sites}")
    check_window(window)
    single = [] if sites is None else [Target(site, _around(site, window, model)) for site in as_sites(sites)]
    return [*single, *(() if groups is None else _group_targets(groups))]


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """Return the layers changed together, centred on ``layer`` and clipped to the model (as in Meng et al.'s code)."""
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))


def window_with(model: Model, component: str, layer: int, window: int) -> list[int]:
    """Return ``layer`` and those around it that have the component (in hybrid models, not all have attn_out)."""
    has = {layer, *model.layers_with(component)}
    return [i for i in window_layers(layer, window, model.n_layers) if i in has]


def all_sites(targets: Iterable[Target]) -> Sites:
    """Return every site of the targets, once."""
    return Sites(s for t in targets for s in t.sites)


def components_of(targets: Iterable[Target]) -> list[str]:
    """Return the components whose values the targets need."""
    return sorted({s.component for t in targets for s in t.sites})


def expand_each(targets: Iterable[Target], prompt: Encoded) -> Iterator[Target]:
    """Yield the targets of one prompt, ``"each"`` as one target per position.

    Raises PromptError for a position that the prompt does not have.
    """
    for target in targets:
        if target.address.position == EACH:
            for i in range(len(prompt.tokens)):
                sites = tuple(s.at(i) for s in target.sites)
                yield Target(sites[0] if len(sites) == 1 else replace(target.address, position=i), sites)
        else:
            for site in target.sites:
                rows_of(site, prompt)
            yield target


def _around(site: Site, window: int, model: Model) -> tuple[Site, ...]:
    if window == 1:
        return (site,)
    spec = COMPONENTS[site.component]
    if site.layer is None or spec.heads is not None:
        raise SiteError(
            f"window={window} at {site}: layers can be taken together for components of a whole layer (attn_out, "
            "mlp_out, resid_pre, …); heads and neurons of different layers do not correspond. Name them as groups="
        )
    return tuple(replace(site, layer=layer) for layer in window_with(model, site.component, site.layer, window))


def _group_targets(groups: Groups) -> list[Target]:
    if not isinstance(groups, Iterable):
        raise SiteError(f"groups={{name: sites}}, or a list of lists of sites, expected, got {type(groups).__name__}")
    has_names = isinstance(groups, Mapping)
    pairs = groups.items() if isinstance(groups, Mapping) else enumerate(groups, 1)
    targets: list[Target] = []
    titles: set[str] = set()
    for name, members in pairs:
        sites = tuple(s.at(None) if s.position == EACH else s for s in as_sites(members))
        if not sites:
            raise SiteError(f"group {name!r} has no sites")
        short = " + ".join(map(str, sites)) if len(sites) <= NAMED_BY_SITES else f"group {name}"
        title = str(name) if has_names else short
        if title in COMPONENTS or title in titles:
            raise SiteError(
                f"two groups, or a group and a component, are called {title!r}: give groups={{name: sites}}"
            )
        titles.add(title)
        shared = {x: _shared([getattr(s, x) for s in sites]) for x in ("layer", "head", "position")}
        targets.append(Target(Address(title, **shared), sites))
    if not targets:
        raise SiteError("groups= is empty")
    return targets


def _shared(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else None
