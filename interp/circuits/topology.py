"""Which edges a model has: who writes to the residual stream, and who reads it.

Senders add to the residual stream: what enters block 0 (the site resid_pre.L0), every head (z), every MLP (mlp_out).
Receivers read it: a head's query (q), a key/value head's keys and values (k, v: one each per KV head, shared by its
group of query heads), an MLP's input (mlp_out) and the logits (resid_post of the last layer). These are the sites that
`interp.path_patch` takes. Within a node no edges are drawn: q, k and v feed the heads of their group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from interp.errors import ModelError, SiteError
from interp.model.model import Model
from interp.sites import Edge, Site

MOST_HEADS = 20_000  # of a model that a file may describe: the largest published ones have 16,128


@dataclass(frozen=True)
class Architecture:
    """The nodes and edges that a model has. ``parallel``: MLPs read what their layer's attention reads."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlps: bool
    parallel: bool

    def check(self) -> None:
        """Raise ValueError for what no model is: as read from a file."""
        sizes = (self.n_layers, self.n_heads, self.n_kv_heads)
        if any(type(x) is not int or x < 1 for x in sizes) or self.n_heads % self.n_kv_heads:
            raise ValueError(f"no model has {self.n_layers} layers × {self.n_heads} heads ({self.n_kv_heads} KV)")
        if self.n_layers * self.n_heads > MOST_HEADS:
            raise ValueError(f"{self.n_layers} layers × {self.n_heads} heads are more than {MOST_HEADS:,} heads")
        if type(self.mlps) is not bool or type(self.parallel) is not bool:
            raise ValueError(f"mlps={self.mlps!r}, parallel={self.parallel!r}: true or false expected")

    @cached_property
    def senders(self) -> tuple[Site, ...]:
        """The sites that write, in order of computation."""
        found = [self.input]
        for layer in range(self.n_layers):
            found += [Site("z", layer, head) for head in range(self.n_heads)]
            found += [Site("mlp_out", layer)] * self.mlps
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Site, ...]:
        """The sites that read, in order of computation: in each layer q, k, v by head, then the MLP."""
        found: list[Site] = []
        for layer in range(self.n_layers):
            for component, n in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                found += [Site(component, layer, head) for head in range(n)]
            found += [Site("mlp_out", layer)] * self.mlps
        return (*found, self.output)

    @property
    def input(self) -> Site:
        """The first sender: what enters block 0."""
        return Site("resid_pre", 0)

    @property
    def output(self) -> Site:
        """The last receiver: the residual stream that the logits are read from."""
        return Site("resid_post", self.n_layers - 1)

    @cached_property
    def sender_number(self) -> dict[Site, int]:
        """Column of each sender in a matrix of edges."""
        return {site: i for i, site in enumerate(self.senders)}

    @cached_property
    def receiver_number(self) -> dict[Site, int]:
        """Row of each receiver in a matrix of edges."""
        return {site: i for i, site in enumerate(self.receivers)}

    def columns(self, layer: int, component: str) -> slice:
        """Columns of a layer's senders of one component."""
        first = self.sender_number[Site(component, layer, 0 if component == "z" else None)]
        return slice(first, first + (self.n_heads if component == "z" else 1))

    def rows(self, layer: int, component: str) -> slice:
        """Rows of a layer's receivers of one component."""
        n = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}.get(component)
        first = self.receiver_number[Site(component, layer, None if n is None else 0)]
        return slice(first, first + (n or 1))

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "receivers senders"]:
        """True where the receiver reads the sender."""
        sends = np.array([-1 if s == self.input else 2 * (s.layer or 0) + (s.component != "z") for s in self.senders])
        late = {"mlp_out": 0 if self.parallel else 1, "resid_post": 2}  # this layer's attention; its MLP too
        reads = np.array([2 * (r.layer or 0) + late.get(r.component, 0) for r in self.receivers])
        return sends[None] < reads[:, None]

    def __len__(self) -> int:
        """Number of edges."""
        return int(self.allowed.sum())

    def edges(self) -> Iterator[Edge]:
        """Every edge, receiver by receiver."""
        for row, column in zip(*np.nonzero(self.allowed), strict=True):
            yield Edge(self.senders[column], self.receivers[row])

    def place(self, edge: Edge) -> tuple[int, int]:
        """Row and column of an edge. SiteError if this architecture does not have it, saying why."""
        where = f"this model ({self.describe()})"
        if edge.sender not in self.sender_number:
            raise SiteError(f"edge {edge}: {edge.sender} is no sender of {where}; senders are {_listed(self.senders)}")
        if edge.receiver not in self.receiver_number:
            raise SiteError(
                f"edge {edge}: {edge.receiver} is no receiver of {where}; receivers are {_listed(self.receivers)}"
            )
        place = self.receiver_number[edge.receiver], self.sender_number[edge.sender]
        if not self.allowed[place]:
            same = edge.sender.layer == edge.receiver.layer and edge.receiver.component == "mlp_out"
            why = (
                "its attention and MLPs are parallel: both read what enters the block"
                if self.parallel and same and edge.sender.component == "z"
                else "the receiver is computed before the sender, or with it"
            )
            raise SiteError(f"there is no edge {edge} in {where}: {why}")
        return place

    def fed_by(self, receiver: Site) -> tuple[Site, ...]:
        """The senders that a receiver is part of: heads of its group, or its MLP; none for the logits."""
        if receiver.component == "q":
            return (Site("z", receiver.layer, receiver.head),)
        if receiver.component in ("k", "v"):
            group = self.n_heads // self.n_kv_heads
            first = (receiver.head or 0) * group
            return tuple(Site("z", receiver.layer, head) for head in range(first, first + group))
        return () if receiver == self.output else (receiver,)

    def describe(self) -> str:
        """One line."""
        mlps = "parallel MLPs" if self.parallel else "MLPs" if self.mlps else "no MLPs"
        return f"{self.n_layers} layers × {self.n_heads} heads ({self.n_kv_heads} KV), {mlps}"


def _listed(sites: tuple[Site, ...]) -> str:
    return f"{sites[0]}, {sites[1]}, … {sites[-1]}"


def architecture(model: Model) -> Architecture:
    """The nodes and edges of a model. ModelError for one whose edges are not defined."""
    if model.reads != "text" or model.stacks or model.masked:
        raise ModelError(f"{model.name}: circuits are defined for decoders that read text")
    if model.attention_layers != list(range(model.n_layers)):
        lacking = sorted(set(range(model.n_layers)) - set(model.attention_layers))
        raise ModelError(f"{model.name}: layers {lacking} have no softmax attention: their edges are not defined")
    known = model.bridge.hook_dict
    if "unembed.hook_in" not in known:
        raise ModelError(f"{model.name} has no unembedding: circuits are defined for decoders, up to their logits")
    mlps = [f"blocks.{layer}.hook_mlp_out" in known for layer in range(model.n_layers)]
    if any(mlps) != all(mlps):
        raise ModelError(f"{model.name}: some layers have MLPs and some have none, which circuits do not support")
    parallel = mlps[0] and "blocks.0.hook_resid_mid" not in known
    return Architecture(model.n_layers, model.n_heads, model.n_kv_heads, mlps[0], parallel)
