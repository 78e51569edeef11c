"""Sparse Attention Decomposition: directions that decide a head's attention.

Each direction is traced to the senders that wrote it. Franco & Crovella 2024 (arXiv 2410.00340). A head *fires* if it
puts more than half of a query's attention on one key (not the first token) with a score above 0. The score is x̃_i Ω
x̃_jᵀ with x̃ = [x̂, 1], x̂ the normed stream, and Ω the QK circuit with its biases. Ω = Σ_k s_k u_k v_kᵀ splits the
score into terms s_k (x̃_i·u_k)(x̃_j·v_k). The largest terms are kept until they reach the whole score (``coverage``;
later terms are often negative). On either side, the stream is the sum of the outputs of earlier heads and MLPs, and so
are the kept terms: ``contribution`` is each sender's part of them, in units of the score, with the norm's scale held
fixed.

Extensions of the published method: for rotated queries and keys (RoPE), Ω is computed at each firing's distance. The
model's own scale is part of the score (theirs is unscaled), which changes no share. MLPs, the input and the constant of
biases have separate rows (in the authors' code, every head includes the constant). The authors weigh directions by
sign · √s_k, regardless of the values on the other side; the column ``published`` has these contributions.
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
from interp.errors import InterpError
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.pairs import PromptPair, encode_prompt, listed_of_any_kind, text_of
from interp.results.parquet import read_parquet, write_parquet
from interp.sites import Site
from interp.utils.arguments import check_positive
from interp.utils.damage import reading
from interp.utils.progress import progress

FIRING = 0.5  # share of a query's attention above which a head fires
CACHE_SIZE = 4096  # decompositions of (head, distance) that are stored
CONSTANT = "constant"  # the name of the sender that stands for biases


@dataclass(frozen=True)
class Channels:
    """The result of `attention_channels`, with provenance.

    ``table`` has one row per firing, side and sender.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]

    def frame(self) -> pd.DataFrame:
        """A copy of the table.

        Columns of the firing: example, layer, head, query, key, attention, score (the model's, before its soft cap),
        directions (number of kept terms) and covered (their share of the score). Columns of the sender: side, sender,
        contribution, share (of the kept terms' sum), published, kept.
        """
        return self.table.copy()

    def firings(self) -> pd.DataFrame:
        """Table with one row per firing."""
        columns = ["example", "layer", "head", "query", "key", "attention", "score", "directions", "covered"]
        table: Any = self.table
        return table[columns].drop_duplicates(ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Table with one row per head, side and sender, largest share first.

        Columns: mean ``contribution`` and ``share`` over the head's firings, the number of firings in which the sender
        was ``kept``, and the head's number of ``firings``.
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
        """Write one Parquet file: the table, with the provenance in its metadata."""
        import pyarrow as pa

        table = pa.Table.from_pandas(self.table, preserve_index=False)
        return write_parquet(table, path, kind="channels", provenance=self.provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Channels:
        """Read a file of `write`. Raises InterpError for any other file."""
        table, provenance = read_parquet(path, kind="channels")
        with reading(path):
            return cls(table, provenance)


@in_session
def attention_channels(
    model: Model,
    prompts: str | PromptPair | Iterable[str | PromptPair],
    heads: Iterable[Site | str] | Site | str | None = None,
    *,
    coverage: float = 1.0,
    upstream: float = 0.7,
    show_progress: bool | None = None,
) -> Channels:
    """Decompose every firing of heads on prompts into directions and senders.

    By default all heads are decomposed; of pairs, the clean prompts are used. ``coverage``: the share of the score that
    the kept directions must reach (1 in the authors' code; their paper also mentions 70%). ``upstream``: senders are
    ``kept``, largest first, until they reach this share of the kept terms' sum (0.7 as published). Raises InterpError,
    PromptError, SiteError or ModelError for bad input, and InterpError if no head fires.
    """
    check_positive(1, coverage=coverage, upstream=upstream)
    prompt_list = listed_of_any_kind(prompts)
    ids = [encode_prompt(prompt, model.coder) for prompt in prompt_list]
    weights = WeightCircuits(model)
    sites = _head_sites(model, heads)
    trace, rows = _Trace(weights, coverage, upstream), []
    with progress("attention channels", len(ids), show_progress) as advance:
        for example, prompt in enumerate(ids):
            rows += trace.prompt(example, prompt, sites)
            advance(1)
    if not rows:
        raise InterpError(
            f"none of {len(sites)} heads puts more than {FIRING:.0%} of a query's attention on one later token with a "
            "score above 0: there is nothing to decompose"
        )
    provenance = {
        **prompt_provenance(model, [text_of(p) for p in prompt_list], ids),
        "method": "sparse attention decomposition", "firing": FIRING, "coverage": coverage, "upstream": upstream,
    }  # fmt: skip
    return Channels(pd.DataFrame(rows), provenance)


def _head_sites(model: Model, heads: Iterable[Site | str] | Site | str | None) -> list[Site]:
    """The sites of ``heads``, or of all heads.

    Raises InterpError for a site that is not a head of the model.
    """
    all_heads = [Site("z", i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    if heads is None:
        return all_heads
    items = [heads] if isinstance(heads, Site | str) else heads
    sites = [Site.parse(h) if isinstance(h, str) else h for h in items]
    no_head = next((s for s in sites if s not in all_heads), None)
    if no_head is not None:
        raise InterpError(f"{no_head} is no head of {model.name}: pass z sites of all positions, like z.L1H2")
    return sites


class _Trace:
    """The decomposition of firings, with a cache of decomposed QK circuits."""

    def __init__(self, weights: WeightCircuits, coverage: float, upstream: float):
        self.weights, self.coverage, self.upstream = weights, coverage, upstream
        self.model, self.wiring = weights.model, weights.wiring
        self._decompositions: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def prompt(self, example: int, ids: list[int], heads: list[Site]) -> list[dict[str, Any]]:
        """Rows of all firings on one prompt."""
        acts, stats = self._run(ids)
        rows = []
        for site in heads:
            layer, head = site.layer or 0, site.head or 0
            peak, place = stats[layer].max_prob[0, head], stats[layer].argmax[0, head]
            for query in torch.nonzero((peak > FIRING) & (place > 0)).flatten().tolist():
                key = int(place[query])
                if key > query:
                    continue
                firing = {"example": example, "layer": layer, "head": head, "query": query, "key": key}
                rows += self._firing_rows({**firing, "attention": float(peak[query])}, acts)
        return rows

    def _run(self, ids: list[int]) -> tuple[dict[str, Tensor], dict[int, Any]]:
        """Activations by hook and attention statistics by layer of one prompt."""
        layers = range(self.model.n_layers)
        names = {*sender_hooks(self.wiring), *(f"blocks.{i}.hook_resid_pre" for i in layers)}
        acts: dict[str, Tensor] = {}

        def recorder(name: str) -> tuple[str, Any]:
            def record(x: Tensor, hook: object) -> None:
                acts[name] = x[0].detach()

            return name, record

        spec = replace(headstats.StatSpec.none(), max_prob=True, argmax=True)
        with torch.no_grad(), hooks(self.model, *map(recorder, names)), self.model.instrument.collecting(spec) as stats:
            self.model.last_logits([ids])
        return acts, stats

    def _decompose(self, layer: int, head: int, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """U, s and V of the QK circuit with its biases.

        Shapes: [d_model + 1, d_head], [d_head], [d_model + 1, d_head].
        """
        offset = offset if self.weights.rotations.rotates(layer) else 0
        if (layer, head, offset) not in self._decompositions:
            if len(self._decompositions) >= CACHE_SIZE:
                self._decompositions.clear()
            sides = [torch.cat([w, b[None]]) for w, b in self.weights.rotated(layer, head, offset)]
            self._decompositions[layer, head, offset] = FactoredMatrix(sides[0], sides[1].T).svd()
        return self._decompositions[layer, head, offset]

    def _firing_rows(self, firing: dict[str, Any], acts: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Rows of both sides of one firing; none if its score is below 0."""
        layer, head, places = firing["layer"], firing["head"], {"query": firing["query"], "key": firing["key"]}
        u, s, v = self._decompose(layer, head, firing["query"] - firing["key"])
        norm, stream = self.weights.norms[layer], acts[f"blocks.{layer}.hook_resid_pre"].to(s)
        rows = {side: stream[place] for side, place in places.items()}
        extended = {side: torch.cat([norm.scaled(x), torch.ones_like(x[:1])]) for side, x in rows.items()}  # x̃
        coordinates = {"query": extended["query"] @ u, "key": extended["key"] @ v}  # along each direction
        terms = s * coordinates["query"] * coordinates["key"]
        score = float(terms.sum())
        if score < 0:
            return
        kept = smallest_prefix(terms, self.coverage)
        firing |= {"score": score, "directions": len(kept), "covered": float(terms[kept].sum()) / score}
        for side, basis, other in (("query", u, "key"), ("key", v, "query")):
            exact = basis[:, kept] @ (s[kept] * coordinates[other][kept])
            published = basis[:, kept] @ (s[kept].sqrt() * coordinates[other][kept].sign())
            directions = torch.stack([exact, published], dim=1)
            directions[:-1] /= norm.scale(rows[side])
            contributions = self._contributions(layer, places[side], directions, rows[side], acts)
            for row in self._sender_rows(contributions):
                yield {**firing, "side": side, **row}

    def _contributions(
        self, layer: int, position: int, directions: Float[Tensor, "d_model_1 2"], stream: Tensor,
        acts: dict[str, Tensor],
    ) -> dict[str, list[float]]:  # fmt: skip
        """By sender: what its output at a position adds along the two directions.

        The two are the exact and the published direction.
        """
        w, names = directions[:-1], ["resid_pre.L0"]
        parts = [acts["blocks.0.hook_resid_pre"][position].to(w) @ w]
        for i in range(layer):
            z = acts[f"blocks.{i}.attn.hook_z"][position].to(w)
            back = torch.einsum("hde,dc->hec", self.wiring.writes(i).to(w), w)
            parts += list(torch.einsum("he,hec->hc", z, back))
            names += [str(Site("z", i, h)) for h in range(len(z))]
            if self.wiring.graph.mlps:
                parts.append(acts[f"blocks.{i}.hook_mlp_out"][position].to(w) @ w)
                names.append(str(Site("mlp_out", i)))
        of_senders = torch.stack(parts)
        constant = stream @ w + directions[-1] - of_senders.sum(0)  # output biases, and the 1 of x̃
        values = torch.cat([of_senders, constant[None]]).tolist()
        return dict(zip([*names, CONSTANT], values, strict=True))

    def _sender_rows(self, contributions: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
        """Rows of the senders of one side, largest contribution first."""
        total = sum(exact for exact, _ in contributions.values())
        sign = -1 if total >= 0 else 1
        reached = 0.0
        for name, (exact, published) in sorted(contributions.items(), key=lambda item: sign * item[1][0]):
            is_kept = abs(reached) < self.upstream * abs(total)
            reached += exact
            share = exact / total if total else float("nan")
            yield {"sender": name, "contribution": exact, "share": share, "published": published, "kept": is_kept}


def smallest_prefix(terms: Float[Tensor, " terms"], coverage: float) -> list[int]:
    """Indices of the largest terms, until they reach a share of the sum of all.

    That sum must not be negative.
    """
    order = terms.argsort(descending=True)
    reached = terms[order].cumsum(0) >= coverage * terms.sum() - 1e-6 * terms.abs().sum()
    return order[: int(reached.int().argmax()) + 1].tolist()
