"""Draw docs/pictures/*.svg, one picture for each idea behind interp.

Run: python experiments/draw_concepts.py [FOLDER].
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

INK, SOFT, LINE = "#1b1f24", "#57606a", "#8c959f"
BLUE, RED, GREEN, PALE = "#1f6feb", "#c2410c", "#15803d", "#f6f8fa"
CLEAN, CORRUPT, FRESH = "#dbeafe", "#fde68a", "#fecaca"
FONT = "system-ui, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
WORDS = ("John", "and", "Mary", "met", "John", "told")


def text(
    x: float, y: float, words: str, size: int = 14, fill: str = INK, anchor: str = "middle", more: str = ""
) -> str:
    """Return one line of text as SVG."""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def box(x: float, y: float, w: float, h: float, fill: str = PALE, stroke: str = LINE, words: str = "") -> str:
    """Return a rectangle with text in its middle."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" stroke="{stroke}"/>'
    return shape + (text(x + w / 2, y + h / 2 + 5, words) if words else "")


def arrow(x0: float, y0: float, x1: float, y1: float, colour: str = LINE, width: float = 1.6, bend: float = 0) -> str:
    """Return an arrow, straight or bent sideways."""
    middle = f"Q{(x0 + x1) / 2 + bend:g} {(y0 + y1) / 2:g} {x1:g} {y1:g}" if bend else f"L{x1:g} {y1:g}"
    head = f'marker-end="url(#{colour[1:]})"'
    return f'<path d="M{x0:g} {y0:g}{middle}" fill="none" stroke="{colour}" stroke-width="{width}" {head}/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole SVG on a white background, with a title for screen readers."""
    heads = "".join(
        f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{c}"/></marker>'
        for c in (LINE, BLUE, RED, GREEN)
    )
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{FONT}"><title>{escape(title)}</title><defs>{heads}</defs>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    )
    return "\n".join([start, *parts, "</svg>"]) + "\n"


def directions() -> str:
    """Draw denoising and noising: the runs that are read from and written into."""
    parts = []
    for x, mode, source, into in ((30, "denoising", "clean", "corrupt"), (440, "noising", "corrupt", "clean")):
        colours = {"clean": CLEAN, "corrupt": CORRUPT}
        parts.append(text(x + 180, 32, mode, 18, more='font-weight="600"'))
        for column, run in ((x, source), (x + 220, into)):
            parts.append(text(column + 70, 60, f"{run} run", 14, SOFT))
            parts += [box(column, 230 - 50 * i, 140, 34, colours[run], words=f"layer {i}") for i in range(4)]
            parts += [arrow(column + 70, 230 - 50 * i, column + 70, 216 - 50 * i) for i in range(3)]
        parts.append(box(x + 220, 180, 140, 34, colours[source], RED, "layer 1, patched"))
        parts.append(arrow(x + 142, 197, x + 216, 197, RED, 2.4))
        ends = ("how much of the answer comes back?", "how much of the answer is lost?")
        parts.append(text(x + 180, 300, ends[mode == "noising"], 14))
    return picture(830, 324, "Denoising writes clean into corrupt, noising corrupt into clean", parts)


def scale() -> str:
    """Draw the recovery scale as a number line."""

    def at(v: float) -> float:
        return 150 + 400 * v

    parts = [f'<path d="M50 120H730" stroke="{INK}" stroke-width="1.6"/>']
    marks = ((-0.2, "−0.2"), (0, "0"), (0.6, "0.6"), (1, "1"), (1.25, "1.25"))
    for v, label in marks:
        parts.append(f'<path d="M{at(v):g} 113V127" stroke="{INK}" stroke-width="1.6"/>')
        parts.append(text(at(v), 146, label))
    notes = ((0, "corrupt run", SOFT), (1, "clean run", SOFT), (0.6, "patched run", RED))
    for v, words, colour in notes:
        parts.append(arrow(at(v), 82, at(v), 108, RED if colour == RED else LINE))
        parts.append(text(at(v), 72, words, 14, colour))
    parts.append(text(at(-0.2), 172, "made it worse", 12, SOFT))
    parts.append(text(at(1.25), 172, "more than all of it", 12, SOFT))
    parts.append(text(390, 34, "effect = (patched − corrupt) / (clean − corrupt)", 17, more='font-weight="600"'))
    parts.append(text(390, 204, "Noising swaps the two ends: 0 is the clean run, 1 the corrupt run.", 14, SOFT))
    return picture(780, 222, "The recovery scale: 0 is the run patched into, 1 the run patched from", parts)


def sites() -> str:
    """Draw one block of a transformer with the names of its sites."""
    mono = 'font-family="monospace"'
    parts = [f'<path d="M130 440V40" stroke="{LINE}" stroke-width="5" stroke-linecap="round"/>']
    parts.append(text(130, 468, "residual stream", 13, SOFT))
    for y, name in ((412, "resid_pre"), (236, "resid_mid"), (62, "resid_post")):
        parts.append(f'<circle cx="130" cy="{y}" r="7" fill="{BLUE}"/>')
        parts.append(text(114, y + 5, name, 14, BLUE, "end", mono))
    parts += [box(210, 266, 540, 134), text(480, 288, "attention, one head", 13, SOFT), arrow(138, 404, 222, 372)]
    for x, y, name in ((230, 304, "q"), (290, 304, "k"), (290, 356, "v")):
        parts.append(box(x, y, 44, 32, "#ffffff", BLUE) + text(x + 22, y + 21, name, 14, BLUE))
    parts += [box(400, 304, 100, 32, "#ffffff", LINE, "pattern"), box(560, 330, 44, 32, "#ffffff", BLUE)]
    parts += [text(582, 351, "z", 14, BLUE), arrow(336, 320, 398, 320), arrow(502, 320, 558, 342)]
    parts += [arrow(336, 372, 558, 350), arrow(606, 346, 650, 346)]
    parts.append(box(652, 330, 80, 32, "#ffffff", BLUE) + text(692, 351, "result", 14, BLUE))
    parts.append(f'<path d="M692 330V248H170" fill="none" stroke="{LINE}" stroke-width="1.6"/>')
    parts += [arrow(172, 248, 140, 248), text(440, 241, "attn_out: the results of all heads", 14, BLUE, more=mono)]
    parts += [box(210, 96, 540, 88), text(480, 116, "MLP", 13, SOFT), arrow(138, 226, 222, 166)]
    parts += [box(230, 132, 150, 32, "#ffffff", LINE, "in, gate"), arrow(382, 148, 418, 148)]
    parts.append(box(420, 132, 184, 32, "#ffffff", BLUE) + text(512, 153, "mlp_post (neurons)", 14, BLUE))
    parts += [arrow(606, 148, 650, 148), box(652, 132, 80, 32, "#ffffff", LINE, "out")]
    parts.append(f'<path d="M692 132V74H170" fill="none" stroke="{LINE}" stroke-width="1.6"/>')
    parts += [arrow(172, 74, 140, 74), text(440, 67, "mlp_out", 14, BLUE, more=mono)]
    return picture(780, 484, "One block, with the sites that can be patched in blue", parts)


def edges() -> str:
    """Draw what a patch changes: all after a node, or what one receiver reads."""
    parts = []
    for x, title, direct in (
        (30, "patching a head: everything after it", False),
        (430, "patching an edge: one reader", True),
    ):
        parts.append(text(x + 180, 32, title, 16, more='font-weight="600"'))
        parts.append(box(x, 250, 120, 36, FRESH, RED, "head L0H1"))
        low, mid, high = (x + 60, 250), (x + 260, 170), (x + 150, 84)
        parts.append(box(x + 200, 152, 120, 36, PALE if direct else FRESH, LINE, "MLP 0"))
        parts.append(box(x + 90, 60, 120, 36, FRESH, LINE, "head L1H2"))
        parts.append(arrow(low[0] + 8, 248, high[0] - 12, 100, RED, 2.4))
        off = LINE if direct else RED
        parts.append(arrow(low[0] + 50, 248, mid[0] - 36, 192, off, 1.6))
        parts.append(arrow(mid[0] - 24, 150, high[0] + 24, 100, off, 1.6))
        parts.append(text(x + 96, 168, "k", 15, RED, "end", 'font-weight="600"'))
        mlp_note = "frozen: as in the base run" if direct else "recomputed"
        parts.append(text(x + 262, 246, mlp_note, 12, SOFT))
    return picture(820, 306, "A patched head changes all that reads it; a patched edge one reader alone", parts)


def saved() -> str:
    """Draw what a sweep reads from the recorded run, and what it computes."""
    layers, left, top, w, h, at_layer, at_position = 6, 110, 54, 78, 30, 2, 3
    parts = [text(left + w * 3, 30, "one cell: resid_pre at layer 2, position 3", 16, more='font-weight="600"')]
    for layer in range(layers):
        y = top + h * (layers - 1 - layer)
        parts.append(text(left - 12, y + 20, f"layer {layer}", 13, SOFT, "end"))
        for position in range(len(WORDS)):
            patched = (layer, position) == (at_layer, at_position)
            again = layer >= at_layer and position >= at_position
            parts.append(box(left + w * position, y, w - 4, h - 4, RED if patched else FRESH if again else PALE))
    for position, word in enumerate(WORDS):
        parts.append(text(left + w * position + w / 2 - 2, top + h * layers + 18, word, 13))
    key = top + h * layers + 46
    n_read = layers * len(WORDS) - (layers - at_layer) * (len(WORDS) - at_position)
    for x, fill, words in (
        (left, PALE, f"read from the recorded run: {n_read} of {layers * len(WORDS)}"),
        (left + 330, FRESH, f"computed: {layers * len(WORDS) - n_read}"),
    ):
        parts += [box(x, key - 14, 18, 18, fill), text(x + 26, key, words, 13, INK, "start")]
    return picture(620, key + 20, "Only layers above and positions from the patch on are computed again", parts)


PICTURES = {f.__name__: f for f in (directions, scale, sites, edges, saved)}


def main(folder: Path) -> None:
    """Write every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    pictures = Path(__file__).parents[1] / "docs" / "pictures"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else pictures)
