"""HeadGates: learned gates of heads, with scores and classes of heads.

The classes can be tested on other data.
"""

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
from interp.circuits.learned.gated_model import GatedModel
from interp.circuits.learned.next_token import Text, samples
from interp.circuits.topology import Architecture, architecture
from interp.errors import InterpError, ModelError
from interp.model.model import Model
from interp.model.session import in_session
from interp.results.parquet import read_parquet, write_parquet
from interp.results.significance import benjamini_hochberg, mean_interval, sign_flip
from interp.sites import Edge, Site
from interp.utils.damage import reading
from interp.utils.progress import progress

SCORES = ("facilitation", "interference", "irrelevance")
CLASSES = {"facilitation": "facilitating", "interference": "interfering", "irrelevance": "irrelevant"}
STUCK = 0.5  # nats by which the start fit may end worse than the model without gates
THRESHOLD = 0.5  # mean score from which a head belongs to a class (as in the paper)
CLAMP = 4.0  # logit beyond which a gate feels no penalty
HELD = 1 / (1 + math.exp(CLAMP - 1))  # a gate above it is held open by the loss: the penalty moves idle gates below it


class HeadGates:
    """Gates in [0, 1] by fit, each [seeds, layers, heads], with provenance.

    The fits are start, plus and minus, or contrast. ``layers`` are the numbers of the attention layers (all layers,
    except in hybrid models).
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
        """Facilitation G−, interference 1 − G+ and irrelevance G+ (1 − G−).

        Raises InterpError for a contrastive fit.
        """
        if self.contrastive:
            raise InterpError("contrastive gates have no facilitation scores: a low gate serves the forgotten variant")
        plus, minus = self.values["plus"], self.values["minus"]
        return dict(zip(SCORES, (minus, 1 - plus, plus * (1 - minus)), strict=True))

    def frame(self) -> pd.DataFrame:
        """Table with one row per seed and head: seed, layer, head, gates and scores.

        Contrastive gates have no scores.
        """
        table = {**self.values, **({} if self.contrastive else self.scores())}
        seeds, layers, heads = next(iter(table.values())).shape
        s, i, h = np.meshgrid(self._seeds(seeds), self.layers, np.arange(heads), indexing="ij")
        assert len(self.layers) == layers
        columns = {"seed": s, "layer": i, "head": h, **table}
        return pd.DataFrame({name: x.ravel() for name, x in columns.items()})

    def summary(self, threshold: float = THRESHOLD) -> pd.DataFrame:
        """Table with one row per head, those that facilitate most first.

        Columns: each score's mean, minimum and maximum over the seeds; whether it is at least 0.5 in one seed
        (``…_any``) or in all (``…_always``); and the ``class``.

        A head facilitates or interferes if the mean of that score is at least ``threshold`` (the larger mean counts).
        It is irrelevant if its irrelevance is at least 1 − ``threshold``, and undecided otherwise. The paper uses 0.5.
        But G− is the smallest gate that suffices: a head that is stronger than necessary (one that decides a softmax by
        20 nats where 2 are enough) converges below 0.5. At any size, it differs from an idle head in that the loss
        holds it above the floor: the penalty ends at a logit of −4 (a gate of 0.018), and nothing holds idle heads
        above that. `HELD` (0.047, a logit of −3) is the threshold that tests for this; `toggle` then measures how much
        the head matters.

        For a contrastive fit: the gate's mean, minimum and maximum, and the share of seeds that ``removed`` the head
        (gate < 0.5).
        """
        if not 0 < threshold <= 0.5:
            raise InterpError(f"threshold={threshold!r}: expected a number above 0 and up to 0.5")
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
                is_above = flat >= THRESHOLD
                out |= {f"{name}_any": is_above.any(0), f"{name}_always": is_above.all(0)}
        if not self.contrastive:
            facilitation, interference, irrelevance = (out[name] for name in SCORES)
            larger = np.where(facilitation >= interference, CLASSES["facilitation"], CLASSES["interference"])
            other = np.where(irrelevance >= 1 - threshold, CLASSES["irrelevance"], "undecided")
            out["class"] = np.where(np.maximum(facilitation, interference) >= threshold, larger, other)
        by, ascending = ("contrast", True) if self.contrastive else ("facilitation", False)
        return pd.DataFrame(out).sort_values(by, ascending=ascending, kind="stable").reset_index(drop=True)

    def classes(self, threshold: float = THRESHOLD) -> dict[Site, str]:
        """The class of every head, by its z site."""
        table: Any = self.summary(threshold)
        return {Site("z", int(r.layer), int(r.head)): r[-1] for r in table.itertuples(index=False)}

    def stuck(self) -> list[int]:
        """Seeds whose start fit ended clearly worse than the model without gates.

        The limit is `STUCK` nats. The start fit of these seeds did not find the behaviour, so their facilitation says
        nothing.
        """
        losses = self.provenance.get("losses", {})
        if "start" not in losses:
            return []
        limit = losses["ungated"][0] + STUCK
        return [s for s, x in zip(self._seeds(len(losses["start"])), losses["start"], strict=True) if x > limit]

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
        """Circuit of all edges among facilitating heads, input, MLPs and logits.

        An edge's score is the mean facilitation of the head that it starts from (NaN if it starts from the input or an
        MLP, which have no gate). The heads' classes are their roles. With grouped queries, edges into the keys and
        values of a facilitating head are part of the circuit. Raises ModelError for a model without edges or with other
        weights, and InterpError if no head facilitates.
        """
        made_for = self.provenance.get("weights")
        if made_for is not None and made_for != model.fingerprint():
            raise ModelError(f"these gates were learned on other weights ({made_for}) than those of {model.name}")
        graph, classes = architecture(model), self.classes(threshold)
        heads = {site for site, label in classes.items() if label == "facilitating"}
        if not heads:
            raise InterpError("no head facilitates, so these gates give no circuit")
        table: Any = self.summary()
        score = {Site("z", int(r.layer), int(r.head)): float(r.facilitation) for r in table.itertuples()}
        edges = {
            edge: score.get(edge.sender, float("nan"))
            for edge in graph.edges()
            if _is_edge_among(graph, edge, heads)
        }  # fmt: skip
        roles = {site: f"{classes[site]} (causal head gating)" for site in heads}
        provenance = {**self.provenance, "selection": "edges among facilitating heads, MLPs, input and logits"}
        return Circuit(graph, edges, roles, provenance)

    # ------------------------------------------------------------ evidence from other data

    @in_session
    def toggle(
        self, model: Model, data: Text | Iterable[Text], heads: Iterable[Site] | None = None, *,
        seed: int | None = None, contrast: bool | None = None, threshold: float = THRESHOLD,
        show_progress: bool | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """Test the classes on other data: compare log P with each gate at 0 and at 1.

        The other gates stay at G+. This is the paper's validation. Use data that the gates were not fitted on. Table
        with one row per head: ``difference`` = log P of the targets with gate 0 − with gate 1, averaged over examples,
        with ``lo`` and ``hi`` (95% over examples, `interp.results.significance.mean_interval`). It is below zero for a
        head that facilitates, above zero for one that interferes, and near zero for an irrelevant one. ``p`` is from a
        sign-flip test over examples, ``q`` is its Benjamini–Hochberg rate over these heads, and ``confirmed`` is True
        if q ≤ 0.05 and the sign is that of the head's ``class``.

        One head is toggled at a time, with the others at G+ (the paper toggles in the order of a score; whether
        cumulatively is unknown). ``contrast``: log P(answer) − log P(foil) instead of log P (default: if every item
        has a foil); a model without the behaviour then has mean difference zero. ``seed``: which gates to use
        (default: the mean over the seeds). ``threshold``: that of the classes.
        """
        if self.contrastive:
            raise InterpError("contrastive gates cannot be toggled under G+: they have no G+")
        encoded, gated = samples(data, model), GatedModel(model)
        foils = all(s.foils for s in encoded) if contrast is None else contrast
        if foils and not all(s.foils for s in encoded):
            raise InterpError("contrast=True needs PromptPairs with foils")
        plus = self.values["plus"]
        base = plus.mean(0) if seed is None else plus[self._seeds(len(plus)).index(seed)]
        classes = self.classes(threshold)
        sites = list(classes if heads is None else heads)
        changes = np.zeros((len(sites), len(encoded)))
        with progress("toggle gates", len(sites), show_progress) as advance, torch.no_grad():
            for row, site in enumerate(sites):
                gates = torch.from_numpy(np.stack([base, base])).to(model.device)
                gates[:, self.layers.index(site.layer or 0), site.head or 0] = torch.tensor([0.0, 1.0]).to(gates)
                for members, log_probs in gated.log_probs(encoded, gates, foils):
                    changes[row, members] = (log_probs[0] - log_probs[1]).double().cpu().numpy()
                advance(1)
        rows = [{"layer": s.layer, "head": s.head, "class": classes[s]} for s in sites]
        return _evidence(pd.DataFrame(rows), changes)

    # ------------------------------------------------------------ files

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the table of `frame` to one Parquet file, with provenance as metadata."""
        import pyarrow as pa

        table = pa.Table.from_pandas(self.frame(), preserve_index=False)
        return write_parquet(table, path, kind="head gates", provenance=self.provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> HeadGates:
        """Read a file of `write`. Raises InterpError for any other file."""
        frame: Any
        frame, provenance = read_parquet(path, kind="head gates")
        with reading(path):
            names = [c for c in ("start", "plus", "minus", "contrast") if c in frame]
            layers = sorted(set(frame["layer"].tolist()))
            shape = frame["seed"].nunique(), len(layers), frame["head"].nunique()
            return cls({n: frame[n].to_numpy().reshape(shape) for n in names}, layers, provenance)


def _is_edge_among(graph: Architecture, edge: Edge, heads: set[Site]) -> bool:
    """Whether both ends are among some heads, the input, the MLPs and the logits."""
    is_sender = edge.sender.component != "z" or edge.sender in heads
    is_receiver = edge.receiver.component not in ("q", "k", "v") or bool(heads & set(graph.fed_by(edge.receiver)))
    return is_sender and is_receiver


def _evidence(frame: pd.DataFrame, changes: Float[np.ndarray, "heads examples"]) -> pd.DataFrame:
    """Add means over examples with their 95% intervals, p, q and ``confirmed``."""
    frame["difference"], frame["lo"], frame["hi"] = mean_interval(changes)
    frame["p"] = sign_flip(changes)
    frame["q"] = benjamini_hochberg(frame["p"].to_numpy())
    sign = np.array([{"facilitating": -1, "interfering": 1}.get(label, 0) for label in frame["class"]])
    frame["confirmed"] = (frame["q"] <= 0.05) & (np.sign(frame["difference"]) == sign) & (sign != 0)
    return frame
