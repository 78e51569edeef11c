"""The edges of a model: nodes that write to the residual stream or read it.

Senders add to the residual stream: the input of block 0 (the site resid_pre.L0), every head (z), every MLP (mlp_out).
Receivers read it: a head's query (q), the keys and values of a KV head (k, v: one each per KV head, shared by its
group of query heads), an MLP's input (mlp_out) and the logits (resid_post of the last layer). `interp.path_patch`
takes the same sites. There are no edges within a node: q, k and v feed the heads of their group.
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

MAX_HEADS = 20_000  # in a model that a file describes; the largest published models have 16,128


@dataclass(frozen=True)
class Architecture:
    """The nodes and edges of a model.

    ``parallel``: an MLP reads the same stream as its layer's attention.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlps: bool
    parallel: bool

    def check(self) -> None:
        """Raise ValueError unless a model can have these sizes.

        For values read from a file.
        """
        sizes = (self.n_layers, self.n_heads, self.n_kv_heads)
        if any(type(x) is not int or x < 1 for x in sizes) or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"a model cannot have {self.n_layers} layers × {self.n_heads} heads ({self.n_kv_heads} KV)"
            )
        if self.n_layers * self.n_heads > MAX_HEADS:
            raise ValueError(f"{self.n_layers} layers × {self.n_heads} heads are more than {MAX_HEADS:,} heads")
        if type(self.mlps) is not bool or type(self.parallel) is not bool:
            raise ValueError(f"mlps={self.mlps!r}, parallel={self.parallel!r}: expected true or false")

    @cached_property
    def senders(self) -> tuple[Site, ...]:
        """The sites that write, in order of computation."""
        sites = [self.input]
        for layer in range(self.n_layers):
            sites += [Site("z", layer, head) for head in range(self.n_heads)]
            if self.mlps:
                sites.append(Site("mlp_out", layer))
        return tuple(sites)

    @cached_property
    def receivers(self) -> tuple[Site, ...]:
        """The sites that read, in order of computation.

        In each layer, these are q, k and v by head, then the MLP.
        """
        sites: list[Site] = []
        for layer in range(self.n_layers):
            for component, n in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                sites += [Site(component, layer, head) for head in range(n)]
            if self.mlps:
                sites.append(Site("mlp_out", layer))
        return (*sites, self.output)

    @property
    def input(self) -> Site:
        """The first sender: the input of block 0."""
        return Site("resid_pre", 0)

    @property
    def output(self) -> Site:
        """The last receiver: the residual stream from which the logits are computed."""
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

    def _sent_at(self, sender: Site) -> int:
        """When a sender writes: at twice its layer, an MLP one later; −1 for the input."""
        return -1 if sender == self.input else 2 * (sender.layer or 0) + (sender.component != "z")

    def _read_at(self, receiver: Site) -> int:
        """A receiver reads every sender whose `_sent_at` is smaller than this."""
        # read after: 0 the block's input, 1 its attention, 2 its MLP
        late = {"mlp_out": 0 if self.parallel else 1, "resid_post": 2}
        return 2 * (receiver.layer or 0) + late.get(receiver.component, 0)

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "receivers senders"]:
        """True where the receiver reads the sender."""
        sends = np.array([self._sent_at(s) for s in self.senders])
        reads = np.array([self._read_at(r) for r in self.receivers])
        return sends[None] < reads[:, None]

    def __len__(self) -> int:
        """Number of edges."""
        sends = np.sort([self._sent_at(s) for s in self.senders])
        reads = np.array([self._read_at(r) for r in self.receivers])
        return int(np.searchsorted(sends, reads, side="left").sum())

    def edges(self) -> Iterator[Edge]:
        """Every edge, receiver by receiver."""
        for row, column in zip(*np.nonzero(self.allowed), strict=True):
            yield Edge(self.senders[column], self.receivers[row])

    def place(self, edge: Edge) -> tuple[int, int]:
        """Row and column of an edge.

        Raises SiteError, with the reason, if this architecture does not have it.
        """
        model_text = f"this model ({self.describe()})"
        if edge.sender not in self.sender_number:
            raise SiteError(
                f"edge {edge}: {edge.sender} is no sender of {model_text}; senders are {_first_and_last(self.senders)}"
            )
        if edge.receiver not in self.receiver_number:
            raise SiteError(
                f"edge {edge}: {edge.receiver} is no receiver of {model_text}; "
                f"receivers are {_first_and_last(self.receivers)}"
            )
        place = self.receiver_number[edge.receiver], self.sender_number[edge.sender]
        if self._sent_at(edge.sender) >= self._read_at(edge.receiver):
            same = edge.sender.layer == edge.receiver.layer and edge.receiver.component == "mlp_out"
            why = (
                "its attention and MLPs are parallel: both read the input of the block"
                if self.parallel and same and edge.sender.component == "z"
                else "the receiver is computed before the sender, or with it"
            )
            raise SiteError(f"there is no edge {edge} in {model_text}: {why}")
        return place

    def fed_by(self, receiver: Site) -> tuple[Site, ...]:
        """The senders that a receiver feeds.

        These are the heads of its group, or its MLP; none for the logits.
        """
        if receiver.component == "q":
            return (Site("z", receiver.layer, receiver.head),)
        if receiver.component in ("k", "v"):
            group = self.n_heads // self.n_kv_heads
            first = (receiver.head or 0) * group
            return tuple(Site("z", receiver.layer, head) for head in range(first, first + group))
        return () if receiver == self.output else (receiver,)

    def receivers_of(self, sender: Site) -> Bool[np.ndarray, " receivers"]:
        """True for the receivers of a sender's node: a head's q, k and v, or the MLP."""
        mask = np.zeros(len(self.receivers), dtype=bool)
        if sender.component == "mlp_out":
            mask[self.receiver_number[sender]] = True
        elif sender.component == "z":
            kv = (sender.head or 0) // (self.n_heads // self.n_kv_heads)
            for component, head in (("q", sender.head), ("k", kv), ("v", kv)):
                mask[self.receiver_number[Site(component, sender.layer, head)]] = True
        return mask

    def describe(self) -> str:
        """Summary in one line."""
        mlps = "parallel MLPs" if self.parallel else "MLPs" if self.mlps else "no MLPs"
        return f"{self.n_layers} layers × {self.n_heads} heads ({self.n_kv_heads} KV), {mlps}"


def _first_and_last(sites: tuple[Site, ...]) -> str:
    return f"{sites[0]}, {sites[1]}, … {sites[-1]}"


def architecture(model: Model) -> Architecture:
    """The nodes and edges of a model. Raises ModelError if its edges are not defined."""
    if model.reads != "text" or model.stacks or model.masked:
        raise ModelError(f"{model.name}: circuits are defined for decoders that read text")
    if model.attention_layers != list(range(model.n_layers)):
        without = sorted(set(range(model.n_layers)) - set(model.attention_layers))
        raise ModelError(f"{model.name}: layers {without} have no softmax attention: their edges are not defined")
    hook_names = model.bridge.hook_dict
    if "unembed.hook_in" not in hook_names:
        raise ModelError(f"{model.name} has no unembedding: circuits are defined for decoders, up to their logits")
    mlps = [f"blocks.{layer}.hook_mlp_out" in hook_names for layer in range(model.n_layers)]
    if any(mlps) != all(mlps):
        raise ModelError(f"{model.name}: only some layers have MLPs, which circuits do not support")
    parallel = mlps[0] and "blocks.0.hook_resid_mid" not in hook_names
    return Architecture(model.n_layers, model.n_heads, model.n_kv_heads, mlps[0], parallel)
