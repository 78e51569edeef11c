"""Addresses of activations: `Site`, and ordered collections of sites.

Recipes sweep over these collections. Component names are TransformerLens names. A site's ``position`` is one of

* an int (negative counts from the end of the prompt),
* ``None``: every position at once, as one cell (written ``"all"`` in text, ``z.L9H6@all``, and for `model.sites`),
* ``"each"``: a sweep, one cell per position of each prompt,
* any other string: a named span of the prompt (``"subject"``, ``"S2"``, …), all its tokens at once;
  ``"subject:first"`` and ``"subject:last"`` are its first and last token.

A neuron is a site of ``mlp_post``, the input of the MLP's output projection. ``head`` then holds the neuron's number.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp.errors import SiteError
from interp.utils.checks import did_you_mean
from interp.utils.html_card import card

EACH, ALL = "each", "all"
PLAIN_TYPES = (int, str, type(None))
Tokens = int | str | Sequence[int | str]
"""A position (negative ones count from the end), a named span, ``"subject:last"``, or a list of these."""


@dataclass(frozen=True)
class ComponentSpec:
    """How a component is addressed: its hook name, and the axes that it has."""

    hook: str
    per_layer: bool = True
    heads: str | None = None  # None, "query" or "kv" heads, or "neuron"; a neuron's activation is a scalar
    sweep_positions: bool = False  # whether `model.sites(component)` enumerates positions by default


COMPONENTS: dict[str, ComponentSpec] = {
    "embed": ComponentSpec("hook_embed", per_layer=False, sweep_positions=True),
    "resid_pre": ComponentSpec("blocks.{layer}.hook_resid_pre", sweep_positions=True),
    "resid_mid": ComponentSpec("blocks.{layer}.hook_resid_mid", sweep_positions=True),
    "resid_post": ComponentSpec("blocks.{layer}.hook_resid_post", sweep_positions=True),
    "attn_out": ComponentSpec("blocks.{layer}.hook_attn_out", sweep_positions=True),
    "mlp_out": ComponentSpec("blocks.{layer}.hook_mlp_out", sweep_positions=True),
    "q": ComponentSpec("blocks.{layer}.attn.hook_q", heads="query"),
    "k": ComponentSpec("blocks.{layer}.attn.hook_k", heads="kv"),
    "v": ComponentSpec("blocks.{layer}.attn.hook_v", heads="kv"),
    "z": ComponentSpec("blocks.{layer}.attn.hook_z", heads="query"),
    "result": ComponentSpec("blocks.{layer}.attn.hook_result", heads="query"),
    "mlp_post": ComponentSpec("blocks.{layer}.mlp.hook_post", heads="neuron"),
}


@dataclass(frozen=True)
class Site:
    """A frozen address in a model: (component, layer, head, position).

        site = interp.Site("z", layer=9, head=6, position=-1)  # head 9.6's output at the last token
        interp.Site.parse("z.L9H6@-1") == site
        interp.patch(model, pair, [site])

    ``str(site)`` reads ``z.L9H6@14``; `Site.parse` reads it back. For ``mlp_post``, ``head`` is the number of a
    neuron, written ``mlp_post.L9N130``. Raises SiteError for an unknown component, and for a layer or head that the
    component requires or does not have.
    """

    component: str
    layer: int | None = None
    head: int | None = None
    position: int | str | None = None

    def __post_init__(self) -> None:
        for axis in ("layer", "head", "position"):
            value = getattr(self, axis)
            if type(value) not in PLAIN_TYPES:
                object.__setattr__(self, axis, _as_plain(value, axis))
        if self.component not in COMPONENTS:
            hint = did_you_mean(self.component, COMPONENTS)
            raise SiteError(f"unknown component {self.component!r}; {hint}known components: {', '.join(COMPONENTS)}")
        spec = COMPONENTS[self.component]
        if spec.per_layer and self.layer is None:
            raise SiteError(f"a {self.component!r} site needs a layer")
        if not spec.per_layer and self.layer is not None:
            raise SiteError(f"{self.component!r} has no layer, got layer={self.layer}")
        if spec.heads is None and self.head is not None:
            raise SiteError(f"{self.component!r} has no heads, got head={self.head}")
        if spec.heads is not None and self.head is None:
            unit, whole = ("neuron", "mlp_out") if spec.heads == "neuron" else ("head", "attn_out")
            raise SiteError(f"a {self.component!r} site needs a {unit} (for all {unit}s of a layer use {whole!r})")

    @property
    def spec(self) -> ComponentSpec:
        """How this component is addressed."""
        return COMPONENTS[self.component]

    @property
    def hook_name(self) -> str:
        """The TransformerLens hook that carries this activation, e.g.

        ``blocks.9.attn.hook_z``.
        """
        return self.spec.hook.format(layer=self.layer)

    def at(self, position: int | str | None) -> Site:
        """The same site at another position."""
        return replace(self, position=position)

    def __str__(self) -> str:
        text = self.component
        if self.layer is not None:
            unit = "N" if self.spec.heads == "neuron" else "H"
            text += f".L{self.layer}" + ("" if self.head is None else f"{unit}{self.head}")
        return text if self.position is None else f"{text}@{self.position}"

    def _repr_html_(self) -> str:
        axes = {"layer": self.layer, "neuron" if self.spec.heads == "neuron" else "head": self.head}
        position = "all at once" if self.position is None else self.position
        return card(f"Site {self}", {**axes, "position": position, "hook": self.hook_name})

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``resid_pre.L3@-1``, ``z.L9H6@S2`` or ``mlp_post.L9N130``.

        Raises SiteError for anything else.
        """
        match = re.fullmatch(r"(\w+?)(?:\.L(\d{1,9})(?:([HN])(\d{1,9}))?)?(?:@(.+))?", text.strip())
        if not match:
            raise SiteError(f"cannot read {text!r:.100} as a site; write e.g. 'z.L9H6' or 'resid_pre.L3@-1'")
        component, layer, unit, head, position_text = match.groups()
        has_neurons = component in COMPONENTS and COMPONENTS[component].heads == "neuron"
        if unit is not None and (unit == "N") != has_neurons:
            raise SiteError(f"cannot read {text!r}: H is the number of a head, N that of a neuron (of mlp_post)")
        position: int | str | None = None if position_text == ALL else position_text
        if position_text is not None and re.fullmatch(r"-?\d{1,9}", position_text):
            position = int(position_text)
        return cls(component, None if layer is None else int(layer), None if head is None else int(head), position)


@dataclass(frozen=True)
class Edge:
    """The path from a sender's output to a receiver's input.

    ``str(edge)`` reads ``z.L3H1 → q.L5H0``.
    """

    sender: Site
    receiver: Site

    def __str__(self) -> str:
        return f"{self.sender} → {self.receiver}"

    @classmethod
    def parse(cls, text: str) -> Edge:
        """Read ``z.L3H1 → q.L5H0`` (or ``->``). Raises SiteError for anything else."""
        ends = re.split(r"→|->", text)
        if len(ends) != 2:
            raise SiteError(f"cannot read {text!r:.100} as an edge; write e.g. 'z.L3H1 -> q.L5H0'")
        return cls(Site.parse(ends[0]), Site.parse(ends[1]))


def _as_plain(number: Any, what: str) -> int | str | None:
    """Convert an index of numpy, pandas or torch to Python's int.

    Strings and None stay as they are.
    """
    if number is None or isinstance(number, str):
        return number
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise SiteError(f"{what}={number!r}: a whole number is expected") from None


def _as_site(site: Site | str) -> Site:
    if not isinstance(site, Site | str):
        raise SiteError(f"a site is expected, e.g. 'z.L0H1', got {site!r:.80}")
    return Site.parse(site) if isinstance(site, str) else site


class Sites(Sequence[Site]):
    """An ordered set of sites.

    ``a | b`` joins two, keeps their order and drops repeats.
    """

    def __init__(self, sites: Iterable[Site | str]):
        self._sites = tuple(dict.fromkeys(map(_as_site, sites)))

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index):  # type: ignore[override]
        return Sites(self._sites[index]) if isinstance(index, slice) else self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __or__(self, other: Iterable[Site | str]) -> Sites:
        return Sites((*self._sites, *other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sites) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    def __repr__(self) -> str:
        parts = []
        for component in dict.fromkeys(s.component for s in self):
            group = [s for s in self if s.component == component]
            parts.append(f"{len(group)} × {component} ({group[0]} … {group[-1]})")
        return f"Sites({'; '.join(parts) or 'empty'})"


def _check_indices(what: str, numbers: Iterable[int] | int | None, n: int) -> list[int]:
    """Validate indices of layers, heads or neurons.

    None means all, negative ones count from the end.
    """
    if numbers is None:
        return list(range(n))
    indices = [_as_plain(i, what) for i in (numbers if isinstance(numbers, Iterable) else [numbers])]
    for i in indices:
        if not isinstance(i, int) or not -n <= i < n:
            raise SiteError(f"{what} {i!r} is out of range: this model has {n} {what}s, 0 to {n - 1}")
    if not indices:
        raise SiteError(f"no {what}s were chosen: pass at least one, or leave {what}s=None for all {n}")
    return [i % n for i in indices if isinstance(i, int)]


def enumerate_sites(
    component: str,
    *,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    n_neurons: int = 0,
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | int | None = None,
    positions: Iterable[int | str] | int | str | None = None,
) -> Sites:
    """Enumerate all sites of one component: layers × heads × positions.

    For mlp_post, ``heads`` are neurons. ``positions=None`` is the component's default: residual-stream components sweep
    every position (``"each"``), head components (q, k, v, z, result) take all positions at once. Pass
    ``positions="each"`` or ``positions="all"`` to choose. Raises SiteError for anything that the model lacks.
    """
    if component not in COMPONENTS:
        hint = did_you_mean(component, COMPONENTS)
        raise SiteError(f"unknown component {component!r}; {hint}known components: {', '.join(COMPONENTS)}")
    spec = COMPONENTS[component]
    if not spec.per_layer and layers is not None:
        raise SiteError(f"{component!r} comes before the first layer; leave layers=None")
    if spec.heads is None and heads is not None:
        raise SiteError(f"{component!r} has no heads; leave heads=None")
    layer_list: list[int | None] = [*_check_indices("layer", layers, n_layers)] if spec.per_layer else [None]
    n = {"kv": n_kv_heads, "neuron": n_neurons}.get(spec.heads or "", n_heads)
    if spec.heads == "neuron" and not n:
        raise SiteError(f"this model's MLPs have no neurons that can be addressed one by one ({component!r})")
    unit = "neuron" if spec.heads == "neuron" else "head"
    head_list: list[int | None] = [None] if spec.heads is None else [*_check_indices(unit, heads, n)]
    return Sites(
        Site(component, layer, head, position)
        for layer in layer_list
        for head in head_list
        for position in _positions(positions, spec)
    )


def _positions(positions: Iterable[int | str] | int | str | None, spec: ComponentSpec) -> list[int | str | None]:
    if positions is None:
        return [EACH if spec.sweep_positions else None]
    if isinstance(positions, str):
        return [None if positions == ALL else positions]
    several = list(positions) if isinstance(positions, Iterable) else [positions]
    if not several:
        raise SiteError("no positions were chosen: pass at least one, 'each' (a sweep) or 'all' (at once)")
    return [None if p == ALL else p for p in several]  # type: ignore[misc]
