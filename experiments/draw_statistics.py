"""Draw each statistic of headstats on one small pattern.

The picture is kernels/headstats/statistics.svg.

Run: python experiments/draw_statistics.py [FILE]. All numbers in the picture come from headstats.attend.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import headstats
import torch

N, QUERY, KEY, HORIZON = 12, 10, 4, (3, 6)
CELL, LEFT, TOP = 30, 64, 96
BARS, BASE, TALL = 520, 268, 150  # left edge, axis and height of the bars
INK, SOFT, BLUE, RED, GREEN = "#1b1f24", "#6a737d", "#1f6feb", "#c2410c", "#15803d"
SEGMENTS = ("#dbeafe", "#fde68a", "#dcfce7")


def pattern() -> tuple[torch.Tensor, headstats.AttentionStats]:
    """Compute a pattern with a sink, a previous-token diagonal and a second diagonal."""
    logits = torch.randn(N, N, generator=torch.Generator().manual_seed(3)) * 0.5
    logits[:, 0] += 2.0
    logits.diagonal(-1).add_(1.6)
    logits.diagonal(-6).add_(2.4)
    zero = torch.zeros(1, 1, N, 1)
    spec = headstats.StatSpec(
        sink=2, topk=3, local=3, waad=4, previous=True, diagonal=True, effective_keys=True, distance_var=True,
        participation=True, entropy_normalised=True, received=True, received_max=True, column_norm=True, fai=HORIZON,
    )  # fmt: skip
    segments = torch.arange(N).div(4, rounding_mode="floor")
    targets = torch.arange(N)[:, None] - 6
    result = headstats.attend(
        zero, zero, torch.eye(N)[None, None], bias=logits, k_segments=segments, targets=targets.clamp_min(-1), spec=spec
    )
    return result.out[0, 0], result.stats  # with unit vectors as values, the output is the pattern


def text(x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "start", more: str = "") -> str:
    """Return one line of text as SVG."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" {more}>{escape(words)}</text>'
    )


def box(x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = "none", more: str = "") -> str:
    """Return a rectangle as SVG."""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{stroke}" {more}/>'


def span(x0: float, x1: float, y: float, words: str, fill: str = INK, up: bool = False) -> str:
    """Return a bracket over or under a range of keys, with text in its middle."""
    tip = 5 if up else -5
    line = f'<path d="M{x0} {y + tip}V{y}H{x1}V{y + tip}" fill="none" stroke="{fill}" stroke-width="1.4"/>'
    return line + text((x0 + x1) / 2, y - 6 if up else y + 15, words, 12, fill, "middle")


def matrix(p: torch.Tensor, stats: headstats.AttentionStats) -> list[str]:
    """Draw the whole pattern, with one query's row and one key's column marked."""
    parts = [text(LEFT, TOP - 46, "one head: weights p of query i on key j", 15, more='font-weight="600"')]
    for i in range(N):
        parts.append(text(LEFT - 8, TOP + i * CELL + 20, str(i), 11, SOFT, "end"))
        parts.append(text(LEFT + i * CELL + 15, TOP - 6, str(i), 11, SOFT, "middle"))
        for j in range(N):
            x, y = LEFT + j * CELL, TOP + i * CELL
            shade = f'fill-opacity="{0.04 + 0.96 * float(p[i, j]) ** 0.7:.3f}"'
            parts.append(box(x, y, CELL - 1, CELL - 1, BLUE if j <= i else "#eceff2", more=shade if j <= i else ""))
    x, y = LEFT - 34, TOP + N * 15
    parts.append(text(x, y, "query i", 12, SOFT, "middle", f'transform="rotate(-90 {x} {y})"'))
    parts.append(text(LEFT + N * 15, TOP - 24, "key j", 12, SOFT, "middle"))
    parts.append(text(LEFT + 9.6 * CELL, TOP + 2.4 * CELL, "not visible", 12, SOFT, "middle"))
    wide = 'stroke-width="2"'
    parts.append(box(LEFT - 2, TOP + QUERY * CELL - 2, N * CELL + 3, CELL + 3, stroke=RED, more=wide))
    x, y = LEFT + KEY * CELL - 2, TOP + KEY * CELL - 2
    parts.append(box(x, y, CELL + 3, (N - KEY) * CELL + 3, stroke=GREEN, more=wide))
    lo, hi = HORIZON
    y0, y1, x = TOP + (KEY + lo) * CELL, TOP + (KEY + hi + 1) * CELL - 1, LEFT + (KEY + 1) * CELL + 6
    parts.append(f'<path d="M{x - 4} {y0}H{x}V{y1}H{x - 4}" fill="none" stroke="{GREEN}" stroke-width="1.6"/>')
    below = TOP + N * CELL + 24
    got = {n: float(getattr(stats, n)[0, 0, KEY]) for n in ("received", "received_max", "column_norm", "fai")}
    words = f"of key {KEY} (green), over the queries that can see it"
    parts.append(text(LEFT, below, words, 13, GREEN, more='font-weight="600"'))
    for row, words in enumerate((
        f"received {got['received']:.2f}: mean of its column",
        f"received_max {got['received_max']:.2f}: largest of its column",
        f"column_norm {got['column_norm']:.2f}: its length, √Σp²",
        f"fai=({lo}, {hi}) {got['fai']:.2f}: mean over queries {lo} to {hi} positions later (bracket)",
    )):  # fmt: skip
        parts.append(text(LEFT, below + 20 + 18 * row, words))
    return parts


def bars(p: torch.Tensor, stats: headstats.AttentionStats) -> list[str]:
    """Draw the row of one query as bars, with the statistics that are read off it."""
    row, unit = p[QUERY, : QUERY + 1], TALL / float(p[QUERY].max())
    at = {n: getattr(stats, n)[0, 0, QUERY] for n in ("sink", "local", "previous", "diagonal", "max_prob", "distance")}
    parts = [text(BARS, TOP - 46, f"query {QUERY} (red): what is read off its row", 15, RED, more='font-weight="600"')]
    middle = [BARS + j * 36 + 15 for j in range(QUERY + 1)]
    for s, color in enumerate(SEGMENTS):
        first, last = s * 4, min(s * 4 + 3, QUERY)
        left, wide = BARS + first * 36 - 3, (last - first + 1) * 36
        parts.append(box(left, BASE + 20, wide - 2, 20, color))
        mass = float(stats.segments[0, 0, QUERY, s])
        parts.append(text(left + wide / 2, BASE + 34, f"segment {s}: {mass:.2f}", 11, INK, "middle"))
    order = stats.topk.indices[0, 0, QUERY].tolist()
    for j, x in enumerate(middle):
        high = float(row[j]) * unit
        parts.append(box(x - 12, BASE - high, 24, high, BLUE, more='fill-opacity="0.85"'))
        parts.append(text(x, BASE + 14, str(j), 11, SOFT, "middle"))
        if j in order:
            place = str(order.index(j) + 1)
            parts.append(text(x, BASE - high + 15, place, 12, "#ffffff", "middle", 'font-weight="600"'))
    best = order[0]
    target = QUERY - 6
    words = f"argmax {best}, max_prob {float(at['max_prob']):.2f}"
    parts.append(text(middle[best], BASE - TALL - 8, words, 12, INK, "middle"))
    if target != best:
        parts.append(text(middle[target], BASE - float(row[target]) * unit - 6, "target", 12, INK, "middle"))
    parts.append(span(middle[0] - 14, middle[1] + 14, BASE + 48, f"sink=2: {float(at['sink']):.2f}"))
    parts.append(span(middle[QUERY - 2] - 14, middle[QUERY] + 14, BASE + 48, f"local=3: {float(at['local']):.2f}"))
    for d, name, anchor, shift in ((1, "previous", "end", 12), (0, "diagonal", "start", -11)):
        top = BASE - float(row[QUERY - d]) * unit - 6
        parts.append(text(middle[QUERY - d] + shift, top, f"{name} {float(at[name]):.2f}", 12, INK, anchor))
    mean, y = float(at["distance"]), BASE + 92
    x = middle[QUERY] - 36 * mean
    parts.append(f'<path d="M{middle[QUERY]} {y}H{x + 7}" stroke="{RED}" stroke-width="2"/>')
    parts.append(f'<path d="M{x} {y}l9 -5v10z" fill="{RED}"/>')
    deep = float(stats.distance_var[0, 0, QUERY]) ** 0.5 * 36
    parts.append(f'<path d="M{x - deep} {y - 5}v10M{x + deep} {y - 5}v10M{x - deep} {y}H{x + deep}" stroke="{SOFT}"/>')
    parts.append(text((x + middle[QUERY]) / 2, y + 17, f"distance {mean:.2f} tokens", 12, RED, "middle"))
    parts.append(text(x - deep, y - 10, "± √distance_var", 12, SOFT, "start"))
    return parts


def numbers(stats: headstats.AttentionStats) -> list[str]:
    """List the statistics that no mark in the picture can show."""
    at = {n: float(getattr(stats, n)[0, 0, QUERY]) for n in (
        "entropy", "entropy_normalised", "effective_keys", "participation", "waad", "distance_var"
    )}  # fmt: skip
    target = float(stats.targets[0, 0, QUERY, 0])
    lines = (
        f"entropy {at['entropy']:.2f} nats; entropy_normalised {at['entropy_normalised']:.2f}: over ln {QUERY + 1}",
        f"participation {at['participation']:.2f} = Σp², effective_keys {at['effective_keys']:.1f} = 1 / Σp²",
        "topk=3: the bars numbered 1, 2, 3",
        f"targets {target:.2f}: weight on a key named by you, here key {QUERY - 6}",
        f"waad=4: {at['waad']:.2f} tokens, distances beyond 4 counting as 4",
        "segments: mass on each stretch of keys; key_features: Σ p f for any f",
        "value_norm: ‖Σ p v‖; segment by segment: segment_outputs Σ p v,",
        "segment_value_norms Σ p ‖v‖",
    )
    return [text(BARS, TOP + N * CELL - 34 + 18 * k, line) for k, line in enumerate(lines)]


def main() -> None:
    """Write the file."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "kernels/headstats/statistics.svg")
    p, stats = pattern()
    parts = [box(0, 0, 980, 584, "#ffffff"), *matrix(p, stats), *bars(p, stats), *numbers(stats)]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 584" width="980" height="584" '
    head += 'font-family="Helvetica, Arial, sans-serif"><title>What each statistic of headstats is</title>'
    target.write_text("\n".join([head, *(x for x in parts if x), "</svg>", ""]))


if __name__ == "__main__":
    main()
