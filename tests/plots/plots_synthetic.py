"""Results with the shape of a real study and a known answer: 30 layers × 9 heads, 15 tokens, a few strong sites."""

from __future__ import annotations

import numpy as np
import pandas as pd

from interp.attention import AttentionStats
from interp.effects import Effects

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
