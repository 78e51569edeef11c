"""Attention patterns as JSON.

Maps of √p are grey PNG images, marginals have 8 bits, and the exact heads have exact rows.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from interp.errors import InterpError
from interp.plots import png
from interp.plots.codec import pack, unpack
from interp.plots.labels import visible
from interp.results.attention_patterns import (
    AttentionPatterns,
    Head,
    PatternExample,
    PatternRun,
    head_name,
    roots,
    vertical_scores,
    weights_of,
)
from interp.utils.damage import Budget

SHEET_LINES = 256  # small maps are stacked in images of about this height: few images to decode, and each fast
SAMPLED = 12  # maps from which the size of all maps is estimated
RECEIVERS = 20  # heads of highest receiver score whose vertical scores are averaged


def encode_patterns(patterns: AttentionPatterns, provenance: dict[str, Any]) -> dict[str, Any]:
    """Encode the values that all prompts share.

    `encode_pattern_example` encodes the prompts one by one.
    """
    scores = patterns.receiver_scores()
    return {
        "kind": "patterns",
        "provenance": provenance,
        "n": len(patterns),
        "layers": patterns.n_layers,
        "heads": patterns.n_heads,
        "names": [head_name(h) for h in patterns.heads],
        "exact": [head_name(h) for h in patterns.exact],
        "receiver": [float(x) if np.isfinite(x) else None for x in scores],
        "examples": [],
    }


def encode_pattern_example(
    patterns: AttentionPatterns, number: int, coarse: int = 1, levels: int = 256, topk: int = 99
) -> dict[str, Any]:
    """Encode one prompt, optionally with smaller maps of the heads that are not exact.

    ``coarse`` > 1 divides the number of rows and columns of a map; ``levels`` < 256 reduces the levels of √p. For each
    query of an exact head, at most the ``topk`` largest weights are stored.
    """
    example = patterns.examples[number]
    exact_heads = [patterns.heads.index(h) for h in patterns.exact] if coarse > 1 or levels < 256 else []
    groups = [(list(range(len(patterns.heads))), coarse, levels), (exact_heads, 1, 256)]
    scores = patterns.receiver_scores()
    order = [int(i) for i in np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable") if np.isfinite(scores[i])]
    runs = {
        name: {
            "tokens": run.tokens,
            "labels": [visible(t, 18) for t in run.tokens],
            "maps": [_sheets(run.maps[group], group, *reduction) for group, *reduction in groups if group],
            "blocks": pack(roots(run.blocks)),
            "received": _relative(run.received),
            "entropy": _relative(run.entropy),
            "top": {"index": pack(run.top_index[..., :topk]), "value": _halves(run.top_value[..., :topk])},
            "rows": {"queries": run.queries.tolist(), "sheet": png.encode(run.rows.reshape(-1, example.n_tokens))}
            if run.rows.size else None,
            "vertical": _vertical(run, example, order[:RECEIVERS]),
        }
        for name, run in example.runs.items()
    }  # fmt: skip
    segments = [[visible(n, 24) if n else "", a, b] for n, a, b in example.segments]
    return {
        "tokens": example.n_tokens, "edges": pack(example.edges), "coarse": coarse, "levels": levels,
        "segments": segments, "names": [n for n, _, _ in example.segments], "runs": runs,
    }  # fmt: skip


def expected_bytes(patterns: AttentionPatterns, number: int, coarse: int, levels: int, topk: int) -> float:
    """Estimate the bytes of an example from a few of its maps and its largest weights."""
    sample = list(range(0, len(patterns.heads), max(1, len(patterns.heads) // SAMPLED)))
    runs = patterns.examples[number].runs.values()
    map_bytes = sum(len(s) for run in runs for s in _sheets(run.maps[sample], sample, coarse, levels)["sheets"])
    n_weights = sum(run.top_index[..., :topk].size for run in runs)
    return map_bytes * len(patterns.heads) / len(sample) + 3.5 * n_weights  # 3.5 bytes for a packed key and weight


def _sheets(maps: UInt8[np.ndarray, "heads bins bins"], heads: list[int], coarse: int, levels: int) -> dict[str, Any]:
    """Stack maps vertically in images of limited height."""
    if coarse > 1:
        maps = np.stack([_coarser(m, coarse) for m in maps])
    if levels < 256:
        maps = np.round(np.round(maps / 255 * (levels - 1)) / (levels - 1) * 255).astype(np.uint8)
    bins = maps.shape[1]
    step = max(1, SHEET_LINES // bins)
    images = [png.encode(maps[i : i + step].reshape(-1, bins)) for i in range(0, len(maps), step)]
    return {"heads": heads, "bins": bins, "step": step, "sheets": images}


def _coarser(image: UInt8[np.ndarray, "bins bins"], by: int) -> UInt8[np.ndarray, "fewer fewer"]:
    """Return the largest of each ``by`` × ``by`` neighbours."""
    starts = np.arange(0, len(image), by)
    return np.maximum.reduceat(np.maximum.reduceat(image, starts, axis=0), starts, axis=1)


def _relative(values: Float[np.ndarray, "heads bins"]) -> dict[str, Any]:
    """Encode the values of each head in 8 bits, relative to its largest value."""
    top = np.nan_to_num(values).max(1, initial=0)
    scaled = np.nan_to_num(values) / np.where(top > 0, top, 1)[:, None]
    return {"top": [float(x) for x in top], "data": pack(np.round(255 * scaled).astype(np.uint8))}


def _halves(values: Float[np.ndarray, "*any"]) -> dict[str, Any]:
    """Encode values as float16: three significant digits."""
    return {**pack(values.astype(np.float16).view(np.uint16)), "half": True}


def _vertical(run: PatternRun, example: PatternExample, heads: list[int]) -> list[float | None]:
    """Return the vertical score of each segment, averaged over the receiver heads."""
    if not heads:
        return []
    table = np.array([vertical_scores(run.blocks[i], example.segments) for i in heads])
    return [float(x) if np.isfinite(x) else None for x in table.mean(0)]


def decode_patterns(data: dict[str, Any], budget: Budget) -> AttentionPatterns:
    """Decode the AttentionPatterns of a report; marginals and blocks have 8 bits."""
    heads, exact = ([_head(n) for n in data[k]] for k in ("names", "exact"))
    examples = [_decode_example(e, heads, exact, budget) for e in data["examples"]]
    provenance = dict(data["provenance"])
    if len(examples) < data["n"]:
        provenance = {**provenance, "report_examples": f"first {len(examples)} of {data['n']}"}
    return AttentionPatterns(heads, exact, data["layers"], data["heads"], examples, provenance)


def _head(name: str) -> Head:
    """Return ``L9H6`` as (9, 6)."""
    match = re.fullmatch(r"L(\d{1,6})H(\d{1,6})", name)
    if match is None:
        raise InterpError(f"this report is damaged: {name!r:.40} is not the name of a head")
    return int(match[1]), int(match[2])


def _decode_example(data: dict[str, Any], heads: list[Head], exact: list[Head], budget: Budget) -> PatternExample:
    edges = unpack(data["edges"], budget)
    n = data["tokens"]
    runs = {}
    for name, run in data["runs"].items():
        rows = run["rows"]
        queries = np.array([] if rows is None else rows["queries"], dtype=np.int64)
        sheet = np.zeros((0, n), np.uint8) if rows is None else png.decode(rows["sheet"], budget)
        value = unpack(run["top"]["value"], budget).view(np.float16).astype(np.float32)
        runs[name] = PatternRun(
            list(run["tokens"]), _decode_maps(run["maps"], len(heads), len(edges) - 1, budget),
            weights_of(unpack(run["blocks"], budget)), _absolute(run["received"], budget),
            _absolute(run["entropy"], budget), unpack(run["top"]["index"], budget), value, queries,
            sheet.reshape(-1, len(queries), n) if rows is not None else np.zeros((0, 0, n), np.uint8),
        )  # fmt: skip
    segments = [(n, a, b) for n, (_, a, b) in zip(data["names"], data["segments"], strict=True)]
    return PatternExample(segments, edges, runs)


def _decode_maps(
    groups: list[dict[str, Any]], n_heads: int, n_bins: int, budget: Budget
) -> UInt8[np.ndarray, "heads bins bins"]:
    """Decode the maps of a run; smaller maps are enlarged to ``n_bins``."""
    budget.take(n_heads * n_bins**2)
    maps = np.zeros((n_heads, n_bins, n_bins), np.uint8)
    for group in groups:
        bins = group["bins"]
        coarse_maps = np.concatenate([png.decode(s, budget) for s in group["sheets"]]).reshape(-1, bins, bins)
        by = -(-n_bins // bins)
        budget.take(2 * len(coarse_maps) * (by * bins) ** 2)
        maps[group["heads"]] = coarse_maps.repeat(by, 1).repeat(by, 2)[:, :n_bins, :n_bins]
    return maps


def _absolute(packed: dict[str, Any], budget: Budget) -> Float[np.ndarray, "heads bins"]:
    shares, top = unpack(packed["data"], budget), np.array(packed["top"], dtype=float)
    if shares.ndim != 2 or top.shape != shares.shape[:1]:
        raise InterpError(f"this report is damaged: values of shape {shares.shape} for {top.shape} heads")
    return (shares / 255 * top[:, None]).astype(np.float32)
