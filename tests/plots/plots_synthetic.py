"""Results with the shape of a real study and a known answer: 30 layers × 9 heads, 15 tokens, a few strong sites."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from interp.circuits import Circuit, Curve
from interp.circuits.topology import Architecture
from interp.results.attention_patterns import AttentionPatterns, PatternExample, PatternRun, partition, roots
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects
from interp.sites import Edge, Site

LAYERS, HEADS = 30, 9
STRONG_HEADS = {(18, 6): 0.46, (17, 3): 0.31, (21, 1): 0.22, (11, 1): -0.17, (24, 8): -0.27}
NAMES = [" Mary", " John", " Tom", " Anna", " Paul", " Kate", " Jack", " Lucy"]
PROVENANCE = {
    "model": "smollm2-135m-instruct",
    "weights": "sha256:9f2c01d4",
    "dtype": "float32",
    "device": "cpu",
    "task": "ioi",
    "seed": 0,
    "created": "2025-01-01T12:00:00+00:00",
    "versions": {"torch": "2.11.0", "transformer_lens": "4.3.0"},
    "prompts": [f"When Mary and John went to the store, John gave a drink to (variation {i})" for i in range(16)],
}


def tokens(example: int, *, reordered: bool = False) -> tuple[list[str], list[str]]:
    """Token texts and roles of one prompt; every second prompt has the names swapped if ``reordered``."""
    one, other = NAMES[example % 8], NAMES[(example + 3) % 8]
    roles = ["", "", "IO", "", "S1", "", "", "", "", "", "S2", "", "", "", "end"]
    if reordered and example % 2:
        roles[2], roles[4] = "S1", "IO"
    name = {"IO": one, "S1": other, "S2": other}
    words = [
        "<|begin|>",
        "When",
        " ?",
        " and",
        " ?",
        " went",
        " to",
        " the",
        " store",
        ",",
        " ?",
        " gave",
        " a",
        " drink",
        " to",
    ]
    return [name.get(role, word) for word, role in zip(words, roles, strict=True)], roles


def table(
    sites: list,
    means: np.ndarray,
    n: int,
    *,
    mode: str,
    intervention: str,
    seed: int = 0,
    metric: str = "logit_diff",
) -> pd.DataFrame:
    """Rows for ``sites`` × examples around the given mean recovery, consistent with clean, corrupt, patched."""
    rng = np.random.default_rng(seed)
    parts = []
    for example in range(n):
        clean, corrupt = 3.5 + rng.normal(0, 0.8), -3.2 + rng.normal(0, 0.8)
        start, end = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
        noisy = means + rng.normal(0, 0.012, len(means)) + rng.normal(0, 0.12, len(means)) * np.abs(means)
        patched = np.float32(start + noisy * (end - start)).astype(float)
        part = pd.DataFrame([s[example] if isinstance(s, list) else s for s in sites])
        raw = patched - start
        part = part.assign(
            example=example,
            intervention=intervention,
            mode=mode,
            metric=metric,
            clean=clean,
            corrupt=corrupt,
            patched=patched,
            raw=raw,
            effect=raw / (end - start),
        )
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def site(component: str, layer: int, head: int | None = None, position: int | None = None, token=None, role="") -> dict:
    return {"component": component, "layer": layer, "head": head, "position": position, "token": token, "role": role}


def neuron_effects(n: int = 4) -> Effects:
    """The first neurons of one layer."""
    sites = [site("mlp_post", 3, i) for i in range(8)]
    return Effects(table(sites, np.linspace(0.2, -0.05, 8), n, mode="denoise", intervention="patch"), PROVENANCE)


def head_effects(
    n: int = 16, *, mode: str = "denoise", intervention: str = "patch", seed: int = 0, **provenance
) -> Effects:
    """Layer × head effects with five strong heads."""
    rng = np.random.default_rng(seed + 100)
    sites = [site("z", layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    means = np.array([STRONG_HEADS.get((s["layer"], s["head"]), 0.01 * rng.normal()) for s in sites])
    return Effects(
        table(sites, means, n, mode=mode, intervention=intervention, seed=seed), {**PROVENANCE, **provenance}
    )


def position_effects(n: int = 16, *, mode: str = "denoise", reordered: bool = False, seed: int = 1) -> Effects:
    """Layer × position effects: information sits at S2 until layer 17 and at the end from then on."""
    rng = np.random.default_rng(seed + 200)
    texts = [tokens(e, reordered=reordered) for e in range(n)]
    sites = [
        [site("resid_pre", layer, None, p, texts[e][0][p], texts[e][1][p]) for e in range(n)]
        for layer in range(LAYERS)
        for p in range(15)
    ]

    def mean(layer: int, position: int) -> float:
        moved = 1 / (1 + np.exp(-(layer - 17) / 1.5))
        return {10: 0.95 * (1 - moved), 14: 0.98 * moved, 4: -0.12 * (1 - moved)}.get(position, 0.006 * rng.normal())

    means = np.array([mean(layer, p) for layer in range(LAYERS) for p in range(15)])
    return Effects(table(sites, means, n, mode=mode, intervention="patch", seed=seed), PROVENANCE)


def attention(
    n: int = 8, *, names=("entropy", "max_prob", "sink", "previous", "distance", "received")
) -> AttentionStats:
    """Statistics with a previous-token head at L11H1 and a sink that grows with depth."""
    rng = np.random.default_rng(5)
    texts = [tokens(e)[0] for e in range(n)]
    values = {}
    for name in names:
        arrays = []
        for _ in range(n):
            x = rng.beta(2, 5, (LAYERS, HEADS, 15)).astype(np.float32)
            if name == "previous":
                x *= 0.25
                x[11, 1] = 0.9 + 0.08 * rng.random(15)
            elif name == "sink":
                x = np.clip(x + np.linspace(0, 0.6, LAYERS, dtype=np.float32)[:, None, None], 0, 1)
            elif name in ("entropy", "distance"):
                x *= 3 * np.log1p(np.arange(15, dtype=np.float32))
            arrays.append(x)
        values[name] = arrays
    values["argmax"] = [rng.integers(0, 15, (LAYERS, HEADS, 15)) for _ in range(n)]
    backends = dict.fromkeys(range(LAYERS), "blocked")
    return AttentionStats(texts, values, backends, {**PROVENANCE, "backend": "blocked"})


def demo_sized(n: int = 16) -> list:
    """What the demo reports: two sweeps both ways, three ablations, attention."""
    heads = [head_effects(n, mode="denoise"), head_effects(n, mode="noise", seed=3)]
    ablations = [
        head_effects(n, mode="noise", intervention=kind, seed=i)
        for i, kind in enumerate(("zero", "mean", "resample"), start=10)
    ]
    positions = [position_effects(n, mode=mode, reordered=True) for mode in ("denoise", "noise")]
    return [
        {"Patching the residual stream": Effects.concat(positions)},
        {"Patching heads": Effects.concat(heads)},
        {"Ablating heads": Effects.concat(ablations)},
        {"Attention": attention(n)},
    ]


def weights(n: int, heads: int, seed: int = 0) -> np.ndarray:
    """Causal patterns [heads, n, n] with a sink, neighbours and a few distant keys; lines sum to 1."""
    rng = np.random.default_rng(seed)
    scores = 1.5 * rng.normal(size=(heads, n, n))
    scores[:, :, 0] += 3
    scores[:, np.arange(1, n), np.arange(n - 1)] += 2
    scores[:, ~np.tri(n, dtype=bool)] = -np.inf
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def pattern_run(p: np.ndarray, texts: list[str], segments: list) -> PatternRun:
    """A run whose maps are exact."""
    n = p.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(-1)
    received = p.sum(1) / np.arange(n, 0, -1)
    blocks = np.stack(
        [[p[:, a:b, c:d].sum(-1).mean(-1) for _, c, d in segments] for _, a, b in segments], axis=0
    ).transpose(2, 0, 1)
    none = np.zeros((0, n, 1))
    return PatternRun(
        texts, roots(p), blocks.astype(np.float32), received.astype(np.float32), entropy.astype(np.float32),
        none.astype(np.int32), none.astype(np.float32), np.zeros(0, np.int64), np.zeros((0, 0, n), np.uint8),
    )  # fmt: skip


def patterns(n: int = 2, layers: int = LAYERS, heads: int = HEADS) -> AttentionPatterns:
    """Every head on ``n`` pairs of prompts of 15 tokens."""
    examples = []
    for e in range(n):
        texts, roles = tokens(e)
        spans = {role: (i, i + 1) for i, role in enumerate(roles) if role}
        segments = partition(spans, len(texts))
        runs = {
            name: pattern_run(weights(len(texts), layers * heads, 10 * e + seed), texts, segments)
            for seed, name in enumerate(("clean", "corrupt"))
        }
        examples.append(PatternExample(segments, np.arange(len(texts) + 1), runs))
    every = [(i, j) for i in range(layers) for j in range(heads)]
    return AttentionPatterns(every, [], layers, heads, examples, PROVENANCE)


def long_patterns(n: int = 8192, bins: int = 256, sentences: int = 40) -> AttentionPatterns:
    """All 270 heads on one long prompt, four of them exact; maps as noisy as real ones, so that they pack as badly."""
    rng = np.random.default_rng(3)
    every = [(i, j) for i in range(LAYERS) for j in range(HEADS)]
    exact = [(17, 4), (20, 0), (23, 3), (29, 1)]
    r, c = np.indices((bins, bins))
    maps = np.zeros((len(every), bins, bins), np.uint8)
    for i in range(0, len(every), 9):
        base = rng.uniform(8, 40) * np.exp(-(r - c) / rng.uniform(8, 120)) + 6
        drawn = base * rng.lognormal(0, 0.3, (bins, bins)) + np.where(c == 0, 140, 0)
        for k in range(9):  # noise is what takes time to draw: shifted, it packs as badly
            maps[i + k] = np.where(c <= r, np.clip(np.roll(drawn, 7 * k, 0), 0, 255), 0)
    texts = [f" w{i % 997}" for i in range(n)]
    edges = np.linspace(0, n, bins + 1).astype(np.int64)
    cuts = np.linspace(0, n, sentences + 1).astype(int)
    segments = [(f"sentence_{k + 1}", int(a), int(b)) for k, (a, b) in enumerate(pairwise(cuts))]
    blocks = rng.dirichlet(np.ones(sentences), (len(every), sentences)) * np.tri(sentences)
    blocks[5, :, 7] += 0.5  # a head that singles out one sentence
    k, queries = 8, np.linspace(1023, n - 1, 8).astype(np.int64)
    index = (np.arange(n)[:, None] - np.arange(k)).clip(0)[None].repeat(4, 0).astype(np.int32)
    value = np.sort(rng.dirichlet(np.ones(k + 1), (4, n))[..., :k])[..., ::-1].astype(np.float32)
    rows = (rng.lognormal(0, 0.6, (4, len(queries), n)) * 6).clip(0, 255).astype(np.uint8)
    rows[:, np.arange(n) > queries[:, None]] = 0
    received, entropy = rng.random((2, len(every), bins), dtype=np.float32)
    run = PatternRun(texts, maps, blocks.astype(np.float32), received, 5 * entropy, index, value, queries, rows)
    return AttentionPatterns(every, exact, LAYERS, HEADS, [PatternExample(segments, edges, {"clean": run})], PROVENANCE)


def circuit(n: int = 80) -> Circuit:
    """Scored edges among the heads of a model of 30 × 9 heads, with roles; the strongest 60 hang together."""
    graph = Architecture(LAYERS, HEADS, 3, True, False)
    rng = np.random.default_rng(8)
    spine = [
        Edge(graph.input, Site("v", 11, 0)), Edge(Site("z", 11, 1), Site("q", 17, 3)),
        Edge(Site("z", 17, 3), Site("mlp_out", 18)), Edge(Site("mlp_out", 18), Site("k", 23, 1)),
        Edge(Site("z", 23, 3), graph.output), Edge(Site("z", 11, 1), Site("q", 23, 3)),
    ]  # fmt: skip
    edges = {e: float(s) for e, s in zip(spine, (1.0, 0.9, -0.8, 0.7, 0.95, -0.6), strict=True)}
    names = list(graph.edges())
    for i in rng.choice(len(names), n - len(spine), replace=False):
        edges.setdefault(names[i], float(rng.normal() * 0.1))
    return Circuit(graph, edges, {Site("z", 23, 3): "name mover"}, {**PROVENANCE, "method": "eap"})


def curve() -> Curve:
    """Faithfulness that grows with size, over 12 examples."""
    rng = np.random.default_rng(2)
    sizes = np.array([0.001, 0.01, 0.1, 0.5, 1.0])
    whole, empty = 3 + rng.normal(0, 0.3, 12), -3 + rng.normal(0, 0.3, 12)
    share = np.array([0.1, 0.5, 0.8, 0.95, 1.0])[:, None]
    recipe = {**PROVENANCE, "ablation": "counterfactual"}
    return Curve(sizes, np.array([5, 300, 3000, 15000, 30000]), empty + share * (whole - empty), whole, empty, recipe)


def edge_effects(n: int = 4) -> Effects:
    """Paths from three heads and an MLP into two receivers."""
    names = ["z.L3H1", "z.L5H0", "z.L5H8", "mlp_out.L2"]
    ends = [site("q", 9, 6), site("v", 9, 2)]
    sites = [{**end, "sender": sender} for sender in names for end in ends]
    means = np.linspace(-0.3, 0.5, len(sites))
    return Effects(table(sites, means, n, mode="noise", intervention="path, MLPs frozen"), PROVENANCE)


def mediation(n: int = 6) -> Effects:
    """Total, direct and indirect effects of a few heads, which add up to a known interaction."""
    sites = [site("z", layer, head) for layer, head in list(STRONG_HEADS)[:4]]
    parts = []
    for name, means in {
        "total effect": np.full(4, 1.0), "natural direct effect": np.full(4, 0.7),
        "natural indirect effect": np.array([0.2, 0.1, -0.05, 0.02]), "interaction": np.full(4, 0.1),
    }.items():  # fmt: skip
        parts.append(Effects(table(sites, means, n, mode="noise", intervention=name), PROVENANCE))
    return Effects.concat(parts)


def study() -> list:
    """One of everything."""
    return [
        {"Patching heads": Effects.concat([head_effects(8), head_effects(8, mode="noise", seed=4)])},
        {"Attention": attention(2)},
        {"Patterns": patterns(2)},
        {"Where": position_effects(4, reordered=True)},
        {"Paths": edge_effects()},
        {"Mediation": mediation()},
        circuit(),
        curve(),
        "A paragraph between them.",
    ]
