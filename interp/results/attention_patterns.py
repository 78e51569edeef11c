"""AttentionPatterns: compact attention patterns for display, without n×n arrays.

For every head: a map of at most ``resolution``² cells, its attention mass between segments of the prompt, and two
marginals. A cell of the map holds the largest weight of the block it covers; for a prompt of at most ``resolution``
tokens the map is the pattern itself. For some heads also: the exact largest weights of every query, and exact rows.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, UInt8

from interp.errors import InterpError
from interp.results.parquet import read_parquet, write_parquet
from interp.utils.arguments import is_whole
from interp.utils.damage import reading
from interp.utils.html_card import card
from interp.utils.json_text import parse_json
from interp.utils.npy import read_npy

Head = tuple[int, int]  # layer, head
Segment = tuple[str, int, int]  # name ("" for what lies between named spans), first token, end
PROXIMITY = 4  # sentences: attention to the last few does not make a receiver head
FEWEST_SCORES = 6  # segments with a vertical score that a kurtosis needs
ARRAYS = ("edges", "maps", "blocks", "received", "entropy", "top_index", "top_value", "queries", "rows")


def head_name(head: Head) -> str:
    """Return the name of a head: ``L9H6``."""
    return f"L{head[0]}H{head[1]}"


def as_head(head: Any) -> Head:
    """Return a head given as ``(9, 6)``, as ``"L9H6"`` or as a site such as ``"z.L9H6"``; InterpError otherwise."""
    match = re.search(r"\bL(\d+)H(\d+)\b", str(head))
    if match:
        return int(match[1]), int(match[2])
    if isinstance(head, tuple | list) and len(head) == 2 and all(isinstance(x, Integral) for x in head):
        return int(head[0]), int(head[1])
    raise InterpError(f"{head!r:.60} names no head: (layer, head) or a name such as 'L9H6' is expected")


def roots(weights: Float[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
    """Return weights in [0, 1] as 8 bits of their square roots.

    Square roots keep the order of small weights.
    """
    return np.round(255 * np.sqrt(np.clip(np.nan_to_num(weights), 0, 1))).astype(np.uint8)


def weights_of(rooted: UInt8[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """Return the weights that `roots` stored.

    They are within 1/255 of the weight, and much closer for small weights.
    """
    return (rooted.astype(np.float32) / 255) ** 2


@dataclass(frozen=True)
class PatternRun:
    """One forward of one prompt.

    Heads: in the order of `AttentionPatterns.heads`; exact heads: of ``exact``.
    """

    tokens: list[str]
    maps: UInt8[np.ndarray, "heads bins bins"]  # 8 bits of √p of the largest weight in each cell
    blocks: Float[np.ndarray, "heads segments segments"]  # share of a segment's attention that another one receives
    received: Float[np.ndarray, "heads bins"]  # mean weight that a key gets from the queries that see it
    entropy: Float[np.ndarray, "heads bins"]  # nats, mean over the queries of a bin
    top_index: Int[np.ndarray, "exact tokens k"]  # keys of the largest weights; −1: none
    top_value: Float[np.ndarray, "exact tokens k"]
    queries: Int[np.ndarray, " rows"]  # queries whose exact rows are stored
    rows: UInt8[np.ndarray, "exact rows tokens"]

    def __repr__(self) -> str:
        return f"PatternRun({len(self.tokens)} tokens, {len(self.maps)} heads, {len(self.top_index)} exact)"


@dataclass(frozen=True)
class PatternExample:
    """One prompt, or the clean and corrupt prompt of a pair.

    ``runs``: by name. ``segments``, ``edges``: what they share.
    """

    segments: list[Segment]
    edges: Int[np.ndarray, " bins+1"]  # bin r holds the tokens edges[r] <= i < edges[r + 1]
    runs: dict[str, PatternRun]

    def __repr__(self) -> str:
        runs = ", ".join(self.runs)
        return f"PatternExample({self.n_tokens} tokens in {len(self.segments)} segments; runs: {runs})"

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return int(self.edges[-1])

    @property
    def pooled(self) -> bool:
        """Whether a cell of the maps covers more than one weight."""
        return len(self.edges) - 1 < self.n_tokens


@dataclass(frozen=True)
class AttentionPatterns:
    """The patterns of some prompts.

    ``exact``: the heads with exact largest weights and rows.
    """

    heads: list[Head]
    exact: list[Head]
    n_layers: int
    n_heads: int
    examples: list[PatternExample]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        n = [e.n_tokens for e in self.examples]
        span = "" if not n else f" of {min(n)}–{max(n)} tokens" if min(n) != max(n) else f" of {n[0]} tokens"
        runs = " and ".join(dict.fromkeys(r for e in self.examples for r in e.runs))
        return f"AttentionPatterns({len(n)} prompt(s){span}, {runs}; {len(self.heads)} heads, {len(self.exact)} exact)"

    def _repr_html_(self) -> str:
        facts = {
            "prompts": len(self), "tokens": sum(e.n_tokens for e in self.examples), "heads": len(self.heads),
            "exact": ", ".join(map(head_name, self.exact)) or "–",
            "runs": ", ".join(dict.fromkeys(r for e in self.examples for r in e.runs)),
        }  # fmt: skip
        return card("AttentionPatterns", facts)

    def map(self, head: Head | str, example: int = 0, run: str = "clean") -> Float[np.ndarray, "bins bins"]:
        """Return a head's map: the largest weight of every cell, to 8 bits of its square root.

        ``head``: ``(9, 6)`` or ``"L9H6"``. Raises InterpError for a head, example or run that was not collected.
        """
        if not is_whole(example, 0, len(self) - 1) or run not in self.examples[example].runs:
            raise InterpError(f"there is no run {run!r} of prompt {example!r}: {self!r}")
        key = as_head(head)
        if key not in self.heads:
            raise InterpError(f"{head_name(key)} was not collected; collected: {_head_names(self.heads)}")
        return weights_of(self.examples[example].runs[run].maps[self.heads.index(key)])

    def receiver_scores(self, run: str = "clean") -> Float[np.ndarray, " heads"]:
        """Return how strongly each head singles out a few segments.

        This is the mean `receiver_score` over prompts; NaN where no prompt has enough segments.
        """
        scores = [
            [receiver_score(e.runs[run].blocks[i], e.segments) for i in range(len(self.heads))] for e in self.examples
        ]
        table = np.array(scores, dtype=float).reshape(len(self.examples), len(self.heads))
        finite = np.isfinite(table)
        total = np.where(finite, table, 0).sum(0)
        return np.where(finite.any(0), total / np.maximum(finite.sum(0), 1), np.nan)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write one Parquet file, whole or not at all; return its path.

        It has one row for each prompt and run, with arrays in numpy's format.
        """
        import pyarrow as pa

        rows = []
        for number, example in enumerate(self.examples):
            for name, run in example.runs.items():
                arrays = {"edges": example.edges, **{k: getattr(run, k) for k in ARRAYS if k != "edges"}}
                row = {"example": number, "run": name, "tokens": run.tokens, "segments": json.dumps(example.segments)}
                rows.append({**row, **{k: _bytes(v) for k, v in arrays.items()}})
        facts = {"heads": self.heads, "exact": self.exact, "n_layers": self.n_layers, "n_heads": self.n_heads}
        table = pa.Table.from_pylist(rows)
        return write_parquet(table, path, kind="attention_patterns", provenance={**self.provenance, "patterns": facts})

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> AttentionPatterns:
        """Read a file that `write` wrote.

        Raises InterpError for any other file, or if it would take more than ``max_bytes`` of memory (`read_parquet`).
        """
        frame, provenance = read_parquet(path, kind="attention_patterns", max_bytes=max_bytes)
        with reading(path):
            return cls._of_frame(frame, provenance)

    @classmethod
    def _of_frame(cls, frame: pd.DataFrame, provenance: dict[str, Any]) -> AttentionPatterns:
        """Return the patterns of the table of a file."""
        facts = provenance.pop("patterns")
        examples: dict[int, PatternExample] = {}
        for row in frame.to_dict("records"):
            arrays = {k: read_npy(row[k]) for k in ARRAYS}
            edges = arrays.pop("edges")
            segments = [(str(name), int(a), int(b)) for name, a, b in parse_json(row["segments"])]
            example = examples.setdefault(int(row["example"]), PatternExample(segments, edges, {}))
            example.runs[row["run"]] = PatternRun([str(t) for t in row["tokens"]], **arrays)
        heads, exact = ([(int(a), int(b)) for a, b in facts[k]] for k in ("heads", "exact"))
        return cls(heads, exact, facts["n_layers"], facts["n_heads"], list(examples.values()), provenance)


def partition(spans: Mapping[str, tuple[int, int]], n_tokens: int) -> list[Segment]:
    """Divide a prompt into segments by named token ranges.

    Tokens between them form segments without a name.

    Where spans overlap, the shorter one keeps its tokens.
    """
    owner: list[str | None] = [None] * n_tokens
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1][0] - item[1][1]):
        owner[start:stop] = [name] * (stop - start)
    segments: list[Segment] = []
    for i, name in enumerate(owner):
        if segments and segments[-1][0] == (name or ""):
            segments[-1] = (segments[-1][0], segments[-1][1], i + 1)
        else:
            segments.append((name or "", i, i + 1))
    return segments


def chunked(n_tokens: int, parts: int = 16) -> list[Segment]:
    """Divide a prompt without named spans into segments of equal length."""
    edges = np.unique(np.linspace(0, n_tokens, min(parts, n_tokens) + 1).astype(int)).tolist()
    return [(f"{a}–{b - 1}" if b - a > 1 else str(a), a, b) for a, b in pairwise(edges)]


def vertical_scores(
    blocks: Float[np.ndarray, "segments segments"], segments: Iterable[Segment], proximity: int = PROXIMITY
) -> Float[np.ndarray, " segments"]:
    """Return the mean weight that each segment receives from later segments.

    Later segments are those at least ``proximity`` on; the mean is over the tokens of both.

    NaN for a segment without such later segments. This is the vertical score of Thought Anchors (Bogdan et al. 2025,
    arXiv 2506.19143): the mean over i >= j + proximity of the mean of p over the tokens of segment i times those of
    segment j. In the paper the segments are the sentences of a trace. Likewise, segments without a name (tokens between
    named spans, such as a start token) are not counted here, and neither is the segment with the first token: most
    heads attend to it, and would all count as heads that single it out.
    """
    all_segments = list(segments)
    counted = [i for i, (name, start, _) in enumerate(all_segments) if name and start > 0]
    width = np.array([b - a for _, a, b in all_segments], dtype=float)[counted]
    mean = np.asarray(blocks, dtype=float)[np.ix_(counted, counted)] / width  # mass / number of keys: mean of the block
    out = np.full(len(all_segments), np.nan)
    for j in range(len(counted) - proximity):
        out[counted[j]] = mean[j + proximity :, j].mean()
    return out


def receiver_score(blocks: Float[np.ndarray, "segments segments"], segments: list[Segment]) -> float:
    """Return the excess kurtosis of a head's vertical scores.

    Of the population; NaN with fewer than six scores.

    It is high for a receiver head.
    """
    scores = vertical_scores(blocks, segments)
    finite = scores[np.isfinite(scores)]
    if len(finite) < FEWEST_SCORES:
        return float("nan")
    spread = finite - finite.mean()
    variance = float((spread**2).mean())
    rounding = (1e-9 * float(np.abs(finite).max())) ** 2
    return float((spread**4).mean() / variance**2 - 3) if variance > rounding else float("nan")


def _bytes(array: np.ndarray) -> bytes:
    """Return an array in numpy's file format."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _head_names(heads: list[Head]) -> str:
    """Return the names of at most eight heads."""
    return ", ".join(head_name(h) for h in heads[:8]) + (", …" if len(heads) > 8 else "")
