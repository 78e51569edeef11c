"""HeadGates: learned gates of attention heads, what they say of each head, and how to check it on other data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from interp.circuits.circuit import Circuit
from interp.circuits.learned.gated_model import Gated
from interp.circuits.learned.next_token import samples
from interp.circuits.topology import Architecture, architecture
from interp.errors import InterpError, ModelError
from interp.model.model import Model
from interp.results.parquet import read_parquet, write_parquet
from interp.results.significance import benjamini_hochberg, sign_flip
from interp.sites import Edge, Site
from interp.utils.progress import progress

SCORES = ("facilitation", "interference", "irrelevance")
CLASSES = {"facilitation": "facilitating", "interference": "interfering", "irrelevance": "irrelevant"}
STUCK = 0.5  # nats by which the start fit may end worse than the model without gates
THRESHOLD = 0.5  # of a mean score, from which on a head is called by it (as the paper counts)
CLAMP = 4.0  # where the pull on a gate's logit ends
HELD = 1 / (1 + math.exp(CLAMP - 1))  # a gate that something holds above where the pull leaves idle ones


class HeadGates:
    """Gates in [0, 1] by fit (start, plus, minus; or contrast), each [seeds, layers, heads], with their provenance.

    ``layers`` are the numbers of the attention layers (all of them, but in hybrid models).
    """

    def __init__(
        self,
        values: Mapping[str, Float[np.ndarray, "seeds layers heads"]],
        layers: Sequence[int],
        provenance: Mapping[str, Any],
    ) -> None:
        self.values, self.layers, self.provenance = dict(values), list(layers), dict(provenance)

    @property
    def contrastive(self) -> bool:
        """Whether these are the gates of a contrastive fit, which have no classes."""
        return "contrast" in self.values

    def scores(self) -> dict[str, Float[np.ndarray, "seeds layers heads"]]:
        """Facilitation G−, interference 1 − G+ and irrelevance G+ (1 − G−). InterpError of a contrastive fit."""
        if self.contrastive:
            raise InterpError("contrastive gates have no facilitation scores: a low gate serves the forgotten variant")
        plus, minus = self.values["plus"], self.values["minus"]
        return dict(zip(SCORES, (minus, 1 - plus, plus * (1 - minus)), strict=True))

    def frame(self) -> pd.DataFrame:
        """One row per seed and head: seed, layer, head, the gates and, of a plain fit, the three scores."""
        table = {**self.values, **({} if self.contrastive else self.scores())}
        seeds, layers, heads = next(iter(table.values())).shape
        s, i, h = np.meshgrid(self._seeds(seeds), self.layers, np.arange(heads), indexing="ij")
        assert len(self.layers) == layers
        columns = {"seed": s, "layer": i, "head": h, **table}
        return pd.DataFrame({name: x.ravel() for name, x in columns.items()})

    def summary(self, threshold: float = THRESHOLD) -> pd.DataFrame:
        """One row per head, those that facilitate most first: each score's mean, least and largest over the seeds,
        whether it is at least 0.5 in one of them (``…_any``) or in all (``…_always``), and the ``class``.

        A head facilitates or interferes if that score's mean is at least ``threshold`` (the larger counts), is
        irrelevant if its irrelevance is at least 1 − ``threshold``, and undecided else. The paper counts from 0.5. But
        G− is the least gate that will do: a head that is stronger than it need be (one that decides a softmax by 20
        nats does so by 2 as well) settles below 0.5. What tells it from an idle one, at any size, is that it is held
        above the floor: the pull ends at a logit of −4 (a gate of 0.018), where nothing holds idle heads up. `HELD`
        (0.047, a logit of −3) is the threshold that asks for this; `toggle` then says how much the head matters.

        Of a contrastive fit: the gate's mean, least and largest, and the share of seeds that ``removed`` it (< 0.5).
        """
        if not 0 < threshold <= 0.5:
            raise InterpError(f"threshold={threshold!r}: a number above 0, up to 0.5, is expected")
        table = self.values if self.contrastive else self.scores()
        seeds, _, heads = next(iter(table.values())).shape
        i, h = np.meshgrid(self.layers, np.arange(heads), indexing="ij")
        out: dict[str, Any] = {"layer": i.ravel(), "head": h.ravel()}
        for name, x in table.items():
            flat = x.reshape(seeds, -1)
            out |= {name: flat.mean(0), f"{name}_min": flat.min(0), f"{name}_max": flat.max(0)}
            if self.contrastive:
                out["removed"] = (flat < THRESHOLD).mean(0)
            else:
                there = flat >= THRESHOLD
                out |= {f"{name}_any": there.any(0), f"{name}_always": there.all(0)}
        if not self.contrastive:
            helps, opposes, idles = (out[name] for name in SCORES)
            words = np.where(helps >= opposes, CLASSES["facilitation"], CLASSES["interference"])
            rest = np.where(idles >= 1 - threshold, CLASSES["irrelevance"], "undecided")
            out["class"] = np.where(np.maximum(helps, opposes) >= threshold, words, rest)
        by, rising = ("contrast", True) if self.contrastive else ("facilitation", False)
        return pd.DataFrame(out).sort_values(by, ascending=rising, kind="stable").reset_index(drop=True)

    def classes(self, threshold: float = THRESHOLD) -> dict[Site, str]:
        """The class of every head, by its z site."""
        table: Any = self.summary(threshold)
        return {Site("z", int(r.layer), int(r.head)): r[-1] for r in table.itertuples(index=False)}

    def stuck(self) -> list[int]:
        """Seeds whose start fit ended more than `STUCK` nats worse than the model without gates: it did not find the
        behaviour, and the seed's facilitation says nothing."""
        losses = self.provenance.get("losses", {})
        if "start" not in losses:
            return []
        own = losses["ungated"][0]
        return [s for s, x in zip(self._seeds(len(losses["start"])), losses["start"], strict=True) if x > own + STUCK]

    def __repr__(self) -> str:
        seeds, layers, heads = next(iter(self.values.values())).shape
        counts = "" if self.contrastive else ", ".join(f"{n} {c}" for c, n in self._counts().items())
        return f"HeadGates({layers} layers × {heads} heads, {seeds} seeds{counts and ': ' + counts})"

    def _counts(self) -> dict[str, int]:
        column: Any = self.summary()["class"]
        return {str(k): int(v) for k, v in column.value_counts().items()}

    def _seeds(self, n: int) -> list[int]:
        return list(self.provenance.get("seeds", range(n)))

    # ------------------------------------------------------------ a circuit

    def circuit(self, model: Model, threshold: float = THRESHOLD) -> Circuit:
        """All edges among the heads that facilitate, the input, the MLPs and the logits.

        An edge's score is the mean facilitation of the head that it leaves (NaN if it leaves the input or an MLP,
        which have no gate); the heads' classes are their roles. Under grouped queries the keys and values of a kept
        head are kept. ModelError for a model without edges, or with other weights; InterpError if no head facilitates.
        """
        made_for = self.provenance.get("weights")
        if made_for is not None and made_for != model.fingerprint():
            raise ModelError(f"these gates were learned on other weights ({made_for}) than those of {model.name}")
        graph, classes = architecture(model), self.classes(threshold)
        kept = {site for site, word in classes.items() if word == "facilitating"}
        if not kept:
            raise InterpError("no head facilitates: there is no circuit to make of these gates")
        table: Any = self.summary()
        score = {Site("z", int(r.layer), int(r.head)): float(r.facilitation) for r in table.itertuples()}
        edges = {
            edge: score.get(edge.sender, float("nan"))
            for edge in graph.edges()
            if _kept(graph, edge, kept)
        }  # fmt: skip
        roles = {site: f"{classes[site]} (causal head gating)" for site in kept}
        made = {**self.provenance, "selection": "edges among facilitating heads, MLPs, input and logits"}
        return Circuit(graph, edges, roles, made)

    # ------------------------------------------------------------ evidence from other data

    def toggle(
        self, model: Model, data: Any, heads: Iterable[Site] | None = None, *, seed: int | None = None,
        contrast: bool | None = None, threshold: float = THRESHOLD, show_progress: bool | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """The paper's validation: under G+, each head's gate set to 0 and to 1, and how log P of the targets differs.

        One row per head: ``difference`` = log P with gate 0 − with gate 1, averaged over examples, with ``lo`` and
        ``hi`` (95%, bootstrap over examples): below zero for a head that facilitates, above for one that interferes,
        near zero for an irrelevant one. ``p`` is of a sign-flip test over examples, ``q`` its Benjamini–Hochberg rate
        over these heads, and ``confirmed`` says that q ≤ 0.05 and that the sign is that of the head's ``class``. Give
        data that the gates were not fitted on. One head at a time, the others at
        G+ (the paper toggles in the order of a score; whether cumulatively is not known). ``contrast``: log P(answer)
        − log P(foil) in place of log P (default: where every item has a foil); then a model without the behaviour has
        mean difference zero. ``seed``: which gates (default: the mean over the seeds). ``threshold``: of the classes.
        """
        if self.contrastive:
            raise InterpError("contrastive gates cannot be toggled under G+: there is none")
        encoded, gated = samples(data, model), Gated(model)
        foils = all(s.foils for s in encoded) if contrast is None else contrast
        if foils and not all(s.foils for s in encoded):
            raise InterpError("contrast=True needs PromptPairs with foils")
        plus = self.values["plus"]
        base = plus.mean(0) if seed is None else plus[self._seeds(len(plus)).index(seed)]
        classes = self.classes(threshold)
        chosen = list(classes if heads is None else heads)
        changes = np.zeros((len(chosen), len(encoded)))
        with progress("toggle gates", len(chosen), show_progress) as advance, torch.no_grad():
            for row, site in enumerate(chosen):
                gates = torch.from_numpy(np.stack([base, base])).to(model.device)
                gates[:, self.layers.index(site.layer or 0), site.head or 0] = torch.tensor([0.0, 1.0]).to(gates)
                for members, found in gated.log_probs(encoded, gates, foils):
                    changes[row, members] = (found[0] - found[1]).double().cpu().numpy()
                advance(1)
        rows = [{"layer": s.layer, "head": s.head, "class": classes[s]} for s in chosen]
        return _evidence(pd.DataFrame(rows), changes)

    # ------------------------------------------------------------ files

    def write(self, path: str | os.PathLike[str]) -> Path:
        """One Parquet file: the table of `frame`, and the provenance in its metadata."""
        import pyarrow as pa

        table = pa.Table.from_pandas(self.frame(), preserve_index=False)
        return write_parquet(table, path, kind="head gates", provenance=self.provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> HeadGates:
        """Read what `write` wrote. Raises InterpError on anything else."""
        read, provenance = read_parquet(path, kind="head gates")
        frame: Any = read
        names = [c for c in ("start", "plus", "minus", "contrast") if c in frame]
        layers = sorted(set(frame["layer"].tolist()))
        shape = frame["seed"].nunique(), len(layers), frame["head"].nunique()
        return cls({n: frame[n].to_numpy().reshape(shape) for n in names}, layers, provenance)


def _kept(graph: Architecture, edge: Edge, heads: set[Site]) -> bool:
    """Whether both ends are in the circuit of some heads, the input, the MLPs and the logits."""
    sends = edge.sender.component != "z" or edge.sender in heads
    reads = edge.receiver.component not in ("q", "k", "v") or bool(heads & set(graph.fed_by(edge.receiver)))
    return sends and reads


def _evidence(frame: pd.DataFrame, changes: Float[np.ndarray, "heads examples"], draws: int = 2000) -> pd.DataFrame:
    """Means over examples with 95% percentile bootstrap intervals (NaN of a single example), p, q and ``confirmed``."""
    n = changes.shape[1]
    frame["difference"] = changes.mean(1)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws) / n
    ends = np.quantile(changes @ weights.T, [0.025, 0.975], axis=1) if n > 1 else np.full((2, len(frame)), np.nan)
    frame["lo"], frame["hi"] = ends
    frame["p"] = sign_flip(changes)
    frame["q"] = benjamini_hochberg(frame["p"].to_numpy())
    sign = np.array([{"facilitating": -1, "interfering": 1}.get(word, 0) for word in frame["class"]])
    frame["confirmed"] = (frame["q"] <= 0.05) & (np.sign(frame["difference"]) == sign) & (sign != 0)
    return frame
