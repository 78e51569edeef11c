"""Sparse Attention Decomposition: the few directions that a head's attention goes by, traced to who wrote them.

Franco & Crovella 2024 (arXiv 2410.00340). A head *fires* where it puts more than half of a query's attention on one key
(not the first token) with a score above 0. Its score is x̃_i Ω x̃_jᵀ with x̃ = [x̂, 1], x̂ the normed stream, and Ω the
QK circuit with its biases; Ω = Σ_k s_k u_k v_kᵀ gives the score as a sum of terms s_k (x̃_i·u_k)(x̃_j·v_k), of which
the largest are kept until they reach the whole score (``coverage``: later ones are often negative). On either side the
stream is the sum of what earlier heads and MLPs wrote, so that the kept terms are too: ``contribution`` is each
sender's share in them, in units of the score, with the norm's scale held as it was.

Beyond the published method: rotated queries and keys (RoPE), where Ω is taken at each firing's distance; the model's
own scale is part of the score (theirs is unscaled), which changes no share; MLPs, the input and the constant of biases
have rows of their own (in the authors' code every head carries the constant along). Their weights of the directions,
sign · √s_k whatever the other side holds, are in the column ``published``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import headstats
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.weights.composition import FactoredMatrix, WeightCircuits
from interp.circuits.wiring import sender_hooks
from interp.errors import InterpError, PromptError
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.prompts.pairs import PromptPair
from interp.results.parquet import read_parquet, write_parquet
from interp.sites import Site
from interp.utils.arguments import check_positive
from interp.utils.progress import progress
from interp.utils.provenance import now, prompt_hash

FIRING = 0.5  # of a query's attention, above which it fires
CACHED = 4096  # decompositions of (head, distance) that are kept
CONSTANT = "constant"  # the row of biases


@dataclass(frozen=True)
class Channels:
    """What `attention_channels` found: ``table``, one row per firing, side and sender, with its provenance."""

    table: pd.DataFrame
    provenance: dict[str, Any]

    def frame(self) -> pd.DataFrame:
        """A copy of the table. Of the firing: example, layer, head, query, key, attention, score (the model's, before
        its soft cap), directions (how many terms were kept) and covered (their share of the score). Of the sender:
        side, sender, contribution, share (of the kept terms' sum), published, kept.
        """
        return self.table.copy()

    def firings(self) -> pd.DataFrame:
        """One row per firing."""
        columns = ["example", "layer", "head", "query", "key", "attention", "score", "directions", "covered"]
        table: Any = self.table
        return table[columns].drop_duplicates(ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row per head, side and sender, largest first: mean ``contribution`` and ``share`` over its firings,
        in how many of them it was ``kept``, and how many ``firings`` the head has.
        """
        table: Any = self.table
        firings: Any = self.firings()
        n = firings.groupby(["layer", "head"]).size().rename("firings").reset_index()
        columns = {"contribution": ("contribution", "mean"), "share": ("share", "mean"), "kept": ("kept", "sum")}
        out: Any = table.groupby(["layer", "head", "side", "sender"], as_index=False).agg(**columns)
        out = out.merge(n, on=["layer", "head"])
        by = ["layer", "head", "side", "share"]
        return out.sort_values(by, ascending=[True, True, True, False], ignore_index=True)

    def __repr__(self) -> str:
        firings: Any = self.firings()
        heads = len(firings[["layer", "head"]].drop_duplicates())
        return (
            f"Channels({len(firings)} firings of {heads} heads, median {firings['directions'].median():g} directions)"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """One Parquet file of the table, with the provenance in its metadata."""
        import pyarrow as pa

        table = pa.Table.from_pandas(self.table, preserve_index=False)
        return write_parquet(table, path, kind="channels", provenance=self.provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Channels:
        """Read what `write` wrote. Raises InterpError on anything else."""
        return cls(*read_parquet(path, kind="channels"))


def attention_channels(
    model: Model,
    prompts: str | PromptPair | Iterable[str | PromptPair],
    heads: Iterable[Site | str] | Site | str | None = None,
    *,
    coverage: float = 1.0,
    upstream: float = 0.7,
    show_progress: bool | None = None,
) -> Channels:
    """Every firing of some heads (default: all) on some prompts (of pairs: the clean ones): directions and senders.

    ``coverage``: the share of the score that the kept directions must reach (1 in the authors' code; their paper speaks
    of 70% too). ``upstream``: senders are ``kept``, largest first, until they reach this share of the kept terms' sum
    (0.7 as published). Raises InterpError, PromptError, SiteError or ModelError for bad input, and InterpError if
    nothing fires.
    """
    check_positive(1, coverage=coverage, upstream=upstream)
    listed = [prompts] if isinstance(prompts, str | PromptPair) else list(prompts)
    if not listed:
        raise PromptError("there are no prompts: pass at least one text")
    ids = [model.coder.encode(p.clean if isinstance(p, PromptPair) else p) for p in listed]
    weights = WeightCircuits(model)
    known = [Site("z", i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    given = [heads] if isinstance(heads, Site | str) else heads
    chosen = known if given is None else [Site.parse(h) if isinstance(h, str) else h for h in given]
    stranger = next((s for s in chosen if s not in known), None)
    if stranger is not None:
        raise InterpError(f"{stranger} is no head of {model.name}: give z sites of all positions, like z.L1H2")
    trace, rows = _Trace(weights, coverage, upstream), []
    with progress("attention channels", len(ids), show_progress) as advance:
        for example, prompt in enumerate(ids):
            rows += trace.prompt(example, prompt, chosen)
            advance(1)
    if not rows:
        raise InterpError(
            f"none of {len(chosen)} heads puts more than {FIRING:.0%} of a query's attention on one later token with a "
            "score above 0: there is nothing to decompose"
        )
    made = {
        **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
        "method": "sparse attention decomposition", "firing": FIRING, "coverage": coverage, "upstream": upstream,
    }  # fmt: skip
    return Channels(pd.DataFrame(rows), made)


class _Trace:
    def __init__(self, weights: WeightCircuits, coverage: float, upstream: float):
        self.weights, self.coverage, self.upstream = weights, coverage, upstream
        self.model, self.wiring = weights.model, weights.wiring
        self._decomposed: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def prompt(self, example: int, ids: list[int], heads: list[Site]) -> list[dict[str, Any]]:
        """Rows of all firings on one prompt."""
        found, stats = self._run(ids)
        rows = []
        for site in heads:
            layer, head = site.layer or 0, site.head or 0
            peak, place = stats[layer].max_prob[0, head], stats[layer].argmax[0, head]
            for query in torch.nonzero((peak > FIRING) & (place > 0)).flatten().tolist():
                key = int(place[query])
                if key > query:
                    continue
                of = {"example": example, "layer": layer, "head": head, "query": query, "key": key}
                rows += self._firing({**of, "attention": float(peak[query])}, found)
        return rows

    def _run(self, ids: list[int]) -> tuple[dict[str, Tensor], dict[int, Any]]:
        layers = range(self.model.n_layers)
        names = {*sender_hooks(self.wiring), *(f"blocks.{i}.hook_resid_pre" for i in layers)}
        found: dict[str, Tensor] = {}
        keep = [(n, lambda x, hook, n=n: found.__setitem__(n, x[0].detach())) for n in names]
        spec = replace(headstats.StatSpec.none(), max_prob=True, argmax=True)
        with torch.no_grad(), hooks(self.model, *keep), self.model.instrument.collecting(spec) as stats:
            self.model.last_logits([ids])
        return found, stats

    def _decompose(self, layer: int, head: int, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """U, s and V of the QK circuit with its biases: [d_model + 1, d_head], [d_head], [d_model + 1, d_head]."""
        offset = offset if self.weights.rotations.rotates(layer) else 0
        if (layer, head, offset) not in self._decomposed:
            if len(self._decomposed) >= CACHED:
                self._decomposed.clear()
            sides = [torch.cat([w, b[None]]) for w, b in self.weights.rotated(layer, head, offset)]
            self._decomposed[layer, head, offset] = FactoredMatrix(sides[0], sides[1].T).svd()
        return self._decomposed[layer, head, offset]

    def _firing(self, of: dict[str, Any], found: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        layer, head, places = of["layer"], of["head"], {"query": of["query"], "key": of["key"]}
        u, s, v = self._decompose(layer, head, of["query"] - of["key"])
        norm, stream = self.weights.norms[layer], found[f"blocks.{layer}.hook_resid_pre"].to(s)
        rows = {side: stream[place] for side, place in places.items()}
        whole = {side: torch.cat([norm.scaled(x), torch.ones_like(x[:1])]) for side, x in rows.items()}
        on = {"query": whole["query"] @ u, "key": whole["key"] @ v}  # coordinates along each direction
        terms = s * on["query"] * on["key"]
        score = float(terms.sum())
        if score < 0:
            return
        kept = smallest_prefix(terms, self.coverage)
        of |= {"score": score, "directions": len(kept), "covered": float(terms[kept].sum()) / score}
        for side, basis, other in (("query", u, "key"), ("key", v, "query")):
            exact = basis[:, kept] @ (s[kept] * on[other][kept])
            published = basis[:, kept] @ (s[kept].sqrt() * on[other][kept].sign())
            directions = torch.stack([exact, published], dim=1)
            directions[:-1] /= norm.scale(rows[side])
            yield from self._senders({**of, "side": side}, layer, places[side], directions, rows[side], found)

    def _senders(
        self, of: dict[str, Any], layer: int, place: int, directions: Float[Tensor, "d_model_1 2"], stream: Tensor,
        found: dict[str, Tensor],
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Rows of one side: what each sender's output at this token adds along the two directions."""
        w, names = directions[:-1], ["resid_pre.L0"]
        parts = [found["blocks.0.hook_resid_pre"][place].to(w) @ w]
        for i in range(layer):
            z = found[f"blocks.{i}.attn.hook_z"][place].to(w)
            back = torch.einsum("hde,dc->hec", self.wiring.writes(i).to(w), w)
            parts += list(torch.einsum("he,hec->hc", z, back))
            names += [str(Site("z", i, h)) for h in range(len(z))]
            if self.wiring.graph.mlps:
                parts.append(found[f"blocks.{i}.hook_mlp_out"][place].to(w) @ w)
                names.append(str(Site("mlp_out", i)))
        known = torch.stack(parts)
        constant = stream @ w + directions[-1] - known.sum(0)  # output biases, and the 1 of x̃
        both = torch.cat([known, constant[None]]).tolist()
        total = sum(x for x, _ in both)
        order = sorted(range(len(both)), key=lambda i: -both[i][0] if total >= 0 else both[i][0])
        reached = 0.0
        for i in order:
            name = CONSTANT if i == len(names) else names[i]
            keep = abs(reached) < self.upstream * abs(total)
            reached += both[i][0]
            share = both[i][0] / total if total else float("nan")
            row = {"sender": name, "contribution": both[i][0], "share": share, "published": both[i][1], "kept": keep}
            yield {**of, **row}


def smallest_prefix(terms: Float[Tensor, " terms"], coverage: float) -> list[int]:
    """Numbers of the largest terms, until their sum reaches a share of the sum of all (which is not negative)."""
    order = terms.argsort(descending=True)
    reached = terms[order].cumsum(0) >= coverage * terms.sum() - 1e-6 * terms.abs().sum()
    return order[: int(reached.int().argmax()) + 1].tolist()
