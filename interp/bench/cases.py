"""The measured sweeps, their prompts, and the cells that slower libraries run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp import tasks
from interp.bench.peers import (
    DenseHooks,
    HuggingFace,
    Loop,
    NNsight,
    OneByOne,
    PatternCell,
    PeerCell,
    PeerJob,
    Pyvene,
    Record,
    TransformerLens,
)
from interp.engine.cells import rows_of
from interp.engine.plan import Plan, explain
from interp.interventions import AttentionEdit
from interp.model.model import Model
from interp.model.protocols import Bridge
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Fact, PromptPair, encode_facts, encode_pairs
from interp.recipes.corruption import subject_noise, subject_std
from interp.recipes.registry import RECIPES
from interp.sites import Site, Sites

CLEAN = "When John and Mary went to the store, John gave a drink to"
LATE = CLEAN.replace("store, John", "store, Mary")
EARLY = CLEAN.replace("When John", "When Tom")
FILLER = " and then they walked on and talked for a while about the weather and the town"
SETTERS = {
    ("resid_pre", True): "layer_pos_patch_setter",
    ("z", False): "layer_head_vector_patch_setter",
    ("z", True): "layer_pos_head_vector_patch_setter",
}
ALL_PEERS = (TransformerLens, HuggingFace, NNsight, Pyvene)


@dataclass(frozen=True)
class PeerShare:
    """The cells that a peer runs.

    ``job``: its cells; ``rows``: the rows of interp's result to compare with (means of ``samples`` cells each).
    """

    job: PeerJob
    rows: Sequence[int]
    samples: int = 1


@dataclass(frozen=True)
class SweepCase:
    """One sweep to measure.

    ``differ``: first token at which clean and corrupt differ. ``targets``: required speed-up by peer.
    """

    name: str
    tokens: str
    differ: str
    ours: Callable[[], pd.DataFrame]
    plan: Callable[[], Plan]
    parts: list[PeerShare]
    samples: int = 1
    peers: tuple[Any, ...] = ALL_PEERS
    targets: dict[type, float] = field(default_factory=dict)
    note: str = ""
    order: Callable[[pd.DataFrame], np.ndarray] = lambda frame: frame["patched"].to_numpy()


@dataclass
class Workbench:
    """The model loaded by interp, and two more copies for the other libraries."""

    model: Model
    hf: Any
    bridge: Bridge
    seed: int = 0

    def sample(self, n: int, most: int | None) -> list[int]:
        """Draw ``most`` of the numbers below ``n`` by the seed, or all for None."""
        if most is None or most >= n:
            return list(range(n))
        return sorted(np.random.default_rng(self.seed).choice(n, most, replace=False).tolist())

    def encode(self, pair: PromptPair) -> Encoded:
        """Encode the pair."""
        return encode_pairs([pair], self.model.coder)[0]

    # ------------------------------------------------------------ activation patching

    def patching(
        self, name: str, pair: PromptPair, sites: Sequence[Site], most: int | None, **targets: float
    ) -> SweepCase:
        """Patch sites of one pair.

        Peers run ``most`` of them. ``targets``: by the keywords ``loop`` and ``hf``.
        """
        prompt, sample = self.encode(pair), self.sample(len(sites), most)
        sampled_sites = [sites[i] for i in sample]

        def make(record: Callable[[Sequence[int]], Record]) -> list[PeerCell]:
            source = record(prompt.clean)
            return [self._cell(site, prompt, source) for site in sampled_sites]

        by_position, component = sampled_sites[0].position is not None, sampled_sites[0].component
        axes = ["layer", *(["pos"] if by_position else []), *(["head"] if component == "z" else [])]
        attributes = {"layer": "layer", "pos": "position", "head": "head"}
        index = pd.DataFrame([[getattr(s, attributes[a]) for a in axes] for s in sampled_sites], columns=axes)
        loop = Loop(component, SETTERS[component, by_position], index, prompt.clean)
        job = PeerJob(prompt.corrupt, prompt.answer, prompt.foil, make, loop)
        call = ("patch", self.model, pair, Sites(sites))
        return SweepCase(
            name, str(len(prompt)), str(prompt.first_difference), *_ours(*call), [PeerShare(job, sample)],
            targets=_targets(targets), note=_share(len(sample), len(sites)),
        )  # fmt: skip

    def _cell(self, site: Site, prompt: Encoded, source: Record) -> PeerCell:
        start, stop = rows_of(site, prompt)
        assert site.layer is not None
        value = source[site.component, site.layer][start:stop]
        return PeerCell(site, start, stop, value if site.head is None else value[:, _head(site.head, self.d_head)])

    def long_pair(self, tokens: int) -> PromptPair:
        """Make a pair of ``tokens`` tokens that differs at its first name."""
        start, end = "When John and Mary went to the store", ", John gave a drink to"
        room = tokens - len(self.model.coder.encode(start + end))
        words = (FILLER.split() * (1 + room // 10))[:room]
        while len(self.model.coder.encode(start + "".join(f" {w}" for w in words) + end)) > tokens:
            words.pop()
        text = start + "".join(f" {w}" for w in words) + end
        return PromptPair(text, text.replace("When John", "When Tom"), " Mary", " John")

    # ------------------------------------------------------------ ablation, tracing, paths

    def ablation(self, name: str, pairs: Sequence[PromptPair], shared: int, most: int, **targets: float) -> SweepCase:
        """Set every head to zero.

        Peers run ``most`` heads for each of the first ``shared`` pairs.
        """
        sites, prompts = list(self.model.sites("z")), encode_pairs(list(pairs), self.model.coder)
        sample = self.sample(len(sites), most)
        parts = []
        for i, prompt in enumerate(prompts[:shared]):
            zero = torch.zeros(1, self.d_head)
            cells = [PeerCell(sites[n], 0, len(prompt), zero) for n in sample]
            index = pd.DataFrame([[sites[n].layer, sites[n].head] for n in sample], columns=["layer", "head"])
            loop = Loop("z", SETTERS["z", False], index, None)
            job = PeerJob(prompt.clean, prompt.answer, prompt.foil, lambda record, cells=cells: cells, loop)
            parts.append(PeerShare(job, [i * len(sites) + n for n in sample]))
        lengths = sorted({len(p) for p in prompts})
        return SweepCase(
            name, f"{lengths[0]} to {lengths[-1]}", "all are clean runs",
            *_ours("ablate", self.model, list(pairs), Sites(sites), using="zero"), parts,
            targets=_targets(targets), note=_share(len(sample) * shared, len(sites) * len(prompts)),
        )  # fmt: skip

    def tracing(self, name: str, fact: Fact, samples: int, most: int, **targets: float) -> SweepCase:
        """Restore one state of one fact at a time.

        Peers run ``most`` sites with all their noise samples.
        """
        (prompt,) = encode_facts([fact], self.model.coder)
        sites = [s.at(p) for s in self.model.sites("resid_post", positions="each") for p in range(len(prompt))]
        sample = self.sample(len(sites), most)
        std = 3.0 * subject_std(self.model, [prompt])
        noises = [subject_noise(self.model, prompt, std, 0, 0, s) for s in range(samples)]

        def make(record: Callable[[Sequence[int]], Record]) -> list[PeerCell]:
            source, cells = record(prompt.clean), []
            for site in (sites[i] for i in sample):
                assert site.layer is not None and isinstance(site.position, int)
                at = slice(site.position, site.position + 1)
                value = source["resid_pre", site.layer + 1][at]
                cells += [PeerCell(site, at.start, at.stop, value, noise) for noise in noises]
            return cells

        job = PeerJob(prompt.clean, prompt.answer, None, make)
        call = ("trace", self.model, fact, "resid_post")
        return SweepCase(
            name, str(len(prompt)), f"{prompt.spans['subject'][0]} (noise on the subject)",
            *_ours(*call, samples=samples), [PeerShare(job, sample, samples)], samples,
            targets=_targets(targets), note=_share(len(sample) * samples, len(sites) * samples),
        )  # fmt: skip

    def edges(
        self, name: str, pair: PromptPair, heads: Sequence[int], most: int,
        peers: tuple[type, ...] = (TransformerLens, OneByOne, HuggingFace), **targets: float,
    ) -> SweepCase:  # fmt: skip
        """Patch direct paths from every head to q, k and v of some heads.

        Peers run ``most``, one forward each.
        """
        prompt, model = self.encode(pair), self.model
        receivers = Sites(s for c in "qkv" for s in model.sites(c) if s.head in heads)
        every = [(s, r) for r in receivers for s in model.sites("z") if (s.layer or 0) < (r.layer or 0)]
        sample = self.sample(len(every), most)

        def make(record: Callable[[Sequence[int]], Record]) -> list[PeerCell]:
            base, source = record(prompt.clean), record(prompt.corrupt)
            return [self._edge(*every[i], base, source) for i in sample]

        def order(frame: pd.DataFrame) -> np.ndarray:
            keys = frame[["sender", "component", "layer", "head"]].itertuples(index=False, name=None)
            value = dict(zip(keys, frame["patched"], strict=True))
            return np.array([value[str(s), r.component, r.layer, r.head] for s, r in every])

        job = PeerJob(prompt.clean, prompt.answer, prompt.foil, make)
        return SweepCase(
            name, str(len(prompt)), str(prompt.first_difference),
            *_ours("path_patch", model, pair, model.sites("z"), receivers), [PeerShare(job, sample)],
            peers=peers, targets=_targets(targets),
            note=_share(len(sample), len(every)), order=order,
        )  # fmt: skip

    # ------------------------------------------------------------ attention edits

    def edits(self, name: str, pair: PromptPair, **targets: float) -> SweepCase:
        """Edit attention to four tokens by five fields, in every layer alone: 20 edits.

        In 15 edits the last token reads its key differently, in 5 every token does.
        """
        prompt, n = self.encode(pair), self.model.n_layers
        reads = ((2, -1), (4, -1), (8, -1), (10, None))  # key, query
        named = {
            f"{field} {key}": AttentionEdit(queries=query, keys=key, **{field: value})
            for key, query in reads
            for field, value in EDIT_FIELDS.items()
        }

        def make(_record: Callable[[Sequence[int]], Record]) -> list[PatternCell]:
            cells = [_pattern_cell(key, query, field) for key, query in reads for field in EDIT_FIELDS]
            return [replace(cell, layer=layer) for cell in cells for layer in range(n)]

        def order(frame: pd.DataFrame) -> np.ndarray:
            value = frame.set_index(["component", "layer"])["patched"]
            return value.loc[[(name, layer) for name in named for layer in range(n)]].to_numpy()

        job = PeerJob(prompt.clean, prompt.answer, prompt.foil, make)
        return SweepCase(
            name, str(len(prompt)), "none (clean runs)", *_ours("edit", self.model, pair, named, each="layer"),
            [PeerShare(job, range(n * len(named)))], peers=(DenseHooks,), targets=_targets(targets), order=order,
        )  # fmt: skip

    @torch.no_grad()
    def _edge(self, sender: Site, receiver: Site, base: Record, source: Record) -> PeerCell:
        """The receiver's projection with only the sender's output from the other run."""
        assert sender.layer is not None and receiver.layer is not None
        columns = _head(sender.head, self.d_head)
        change = (source["z", sender.layer] - base["z", sender.layer])[:, columns]
        sent = change @ self.hf.model.layers[sender.layer].self_attn.o_proj.weight[:, columns].T
        block = self.hf.model.layers[receiver.layer]
        read = block.input_layernorm(base["resid_pre", receiver.layer] + sent)
        projected = getattr(block.self_attn, f"{receiver.component}_proj")(read)
        return PeerCell(receiver, 0, len(read), projected[:, _head(receiver.head, self.d_head)])

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return int(self.model.bridge.cfg.d_head)


EDIT_FIELDS: dict[str, Any] = {"knockout": True, "gain": 0.5, "bias": -2.0, "logit_factor": 1.5, "logit_raise": 0.5}
ON_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "knockout": lambda z: torch.full_like(z, -torch.inf),
    "gain": lambda z: z + np.log(0.5),
    "bias": lambda z: z - 2.0,
    "logit_factor": lambda z: torch.where(z > -torch.inf, z * 1.5, z),
    "logit_raise": lambda z: torch.where(z > -torch.inf, z + 0.5 * z.abs(), z),
}


def _pattern_cell(key: int, query: int | None, field: str) -> PatternCell:
    """Return a field's change as a person writes it for a hook on scores."""

    def change(scores: Tensor) -> Tensor:
        rows = slice(None) if query is None else slice(query, None)
        scores[:, rows, key] = ON_SCORES[field](scores[:, rows, key])
        return scores

    return PatternCell(0, change)


def _head(head: int | None, width: int) -> slice:
    assert head is not None
    return slice(head * width, (head + 1) * width)


def _share(n_run: int, n: int) -> str:
    return "" if n_run == n else f"the other libraries ran a sample, {n_run} of {n} cells; compared by the cell"


def _targets(named: dict[str, float]) -> dict[type, float]:
    kinds = {"loop": TransformerLens, "hf": HuggingFace, "one": OneByOne, "dense": DenseHooks}
    return {kinds[name]: value for name, value in named.items()}


def _ours(recipe: str, *args: Any, **kwargs: Any) -> tuple[Callable[[], pd.DataFrame], Callable[[], Plan]]:
    """Functions that return a recipe's table and its plan."""
    function = RECIPES[recipe].load()
    return (
        lambda: function(*args, show_progress=False, **kwargs).frame(),
        lambda: explain(function, *args, **kwargs),
    )


def cases(bench: Workbench) -> dict[str, Callable[[], SweepCase]]:
    """All cases by name, each built when its function is called."""
    late, early = (PromptPair(CLEAN, corrupt, " Mary", " John") for corrupt in (LATE, EARLY))
    sites, n = bench.model.sites, bench.model.n_layers

    def resid(pair: PromptPair, every: int = 1) -> list[Site]:
        length = len(bench.encode(pair))
        return [Site("resid_pre", i, position=p) for i in range(n) for p in range(every // 2, length, every)]

    def z_positions() -> list[Site]:
        return [s.at(p) for s in sites("z") for p in range(len(bench.encode(early)))]

    builders: dict[str, Callable[[], SweepCase]] = {
        "resid-early": lambda: bench.patching(
            "layer × position resid_pre, differing early", early, resid(early), 136, loop=25, hf=4.5
        ),
        "resid-late": lambda: bench.patching(
            "layer × position resid_pre, differing late", late, resid(late), 136, loop=150, hf=25
        ),
        "z": lambda: bench.patching("layer × head z, all positions", early, list(sites("z")), 136, loop=15, hf=3),
        "z-positions": lambda: bench.patching(
            "layer × head × position z", early, z_positions(), 136, loop=25, hf=4.5
        ),
        "ablation": lambda: bench.ablation(
            "every single-head ablation, 64 prompts", tasks.ioi(bench.model, n=64, seed=0), 2, 64, hf=3
        ),
        "tracing": lambda: bench.tracing(
            "causal tracing, resid_post", tasks.facts(bench.model, n=1, seed=0)[0], 10, 16, hf=5
        ),
        "edges": lambda: bench.edges(
            "direct edges, every head → q, k, v of one head a layer", late, [0], 64, one=40
        ),
        "edits": lambda: bench.edits("20 attention edits in every layer", late, dense=4),
        "edges-all": lambda: bench.edges(
            "all direct edges between heads", late, range(bench.model.n_heads), 48, (OneByOne,), one=40
        ),
    }  # fmt: skip
    for tokens, every, most, loop, z_loop in ((128, 8, 32, 8, 4), (512, 64, 8, 6.5, 3.5)):

        def position(tokens: int = tokens, every: int = every, most: int = most, loop: float = loop) -> SweepCase:
            pair = bench.long_pair(tokens)
            name = f"layer × position resid_pre, {tokens} tokens, every {every}th position"
            return bench.patching(name, pair, resid(pair, every), most, loop=loop)

        def heads(tokens: int = tokens, most: int = most, loop: float = z_loop) -> SweepCase:
            z_sites = list(sites("z"))[:: 1 if tokens < 200 else 7]
            return bench.patching(f"layer × head z, all positions, {tokens} tokens", bench.long_pair(tokens), z_sites,
                                  most, loop=loop)  # fmt: skip

        builders[f"resid-{tokens}"], builders[f"z-{tokens}"] = position, heads
    return builders


NAMES = ("resid-early", "resid-late", "z", "z-positions", "ablation", "tracing", "edges", "edits",
         "edges-all", "resid-128", "z-128", "resid-512", "z-512")  # fmt: skip
