// The row of one query: its largest weights as a list, and a drawing of their positions.

import { paint } from "./colors.js";
import { el, format, roomFor, svg } from "./dom.js";
import { SCALES, toned } from "./figure.js";

/** @typedef {import("./patterns.js").Row} Row */

const KEYS_LISTED = 10;

/**
 * @typedef {object} RowSpec
 * @property {string} name
 * @property {Row} row
 * @property {number} query
 * @property {string[]} labels
 * @property {boolean} signed
 * @property {string} scale
 * @property {boolean} mute
 */

/**
 * The largest weights of a row, largest first.
 * @param {Row} row
 * @param {boolean} mute
 * @param {number} count
 * @returns {[number, number][]}
 */
export function strongestKeys(row, mute, count) {
  /** @type {[number, number][]} */
  const best = [];
  for (const [key, weight] of row.weights) {
    const size = Math.abs(weight);
    if ((mute && key === 0) || (best.length === count && size <= Math.abs(best[count - 1][1]))) continue;
    let place = best.length;
    while (place > 0 && Math.abs(best[place - 1][1]) < size) place--;
    best.splice(place, 0, [key, weight]);
    best.length = Math.min(best.length, count);
  }
  return best;
}

/** The drawing and the list of a row. @param {RowSpec} spec */
export function rowFigure(spec) {
  const best = strongestKeys(spec.row, spec.mute, KEYS_LISTED);
  const top = Math.abs(best[0]?.[1] ?? 0) || 1;
  const [W, H, left] = [Math.min(520, roomFor(0)), 76, 8];
  const n = spec.labels.length;
  const columns = Math.min(n, W - 2 * left);
  const heights = new Float32Array(columns);
  for (const [key, weight] of spec.row.weights) {
    if (spec.mute && key === 0) continue;
    const c = Math.floor((key / n) * columns);
    if (Math.abs(weight) > Math.abs(heights[c])) heights[c] = weight;
  }
  const drawing = svg("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, class: "row-figure", role: "img",
    "aria-label": `${spec.name}: weights of query ${spec.query} by position of the key` });
  const step = (W - 2 * left) / columns;
  const height = `height: ${spec.signed ? "|clean − corrupt|" : "weight"}, as ${SCALES[spec.scale]}, up to ${format(top)}`;
  for (const sign of spec.signed ? [1, -1] : [1]) {
    const outline = [...heights.keys()].filter((c) => Math.sign(heights[c]) === sign).map((c) => {
      const h = Math.max(1.5, 40 * toned(Math.min(Math.abs(heights[c]) / top, 1), spec.scale));
      return `M${(left + c * step).toFixed(1)} ${(56 - h).toFixed(1)}h${Math.max(step - 0.6, 1.2).toFixed(1)}v${h.toFixed(1)}h${(-Math.max(step - 0.6, 1.2)).toFixed(1)}z`;
    });
    const bars = svg("path", { d: outline.join(""), class: "swatch" });
    paint(bars, spec.signed ? "diverging" : "sequential", spec.signed ? 0.5 + 0.38 * sign : 0.72);
    drawing.append(bars);
  }
  const x = left + ((spec.query + 0.5) / n) * (W - 2 * left);
  drawing.append(svg("line", { x1: left, x2: W - left, y1: 56.5, y2: 56.5, class: "zero" }),
    svg("line", { x1: x, x2: x, y1: 14, y2: 60, class: "query-mark" }), svg("text", { x: left, y: 9, class: "tick quiet" }, height),
    svg("text", { x: left, y: 71, class: "tick" }, x > 80 ? "0" : ""), svg("text", { x: W - left, y: 71, class: "tick end" }, x < W - 110 ? String(n - 1) : ""),
    svg("text", { x: Math.min(Math.max(x, 60), W - 60), y: 71, class: "tick middle" }, `query ${spec.query}`));
  const list = el("ol", { class: "keys" }, ...best.map(([key, weight]) => el("li", {},
    el("bdi", { class: "key" }, spec.labels[key] ?? ""), el("span", { class: "place" }, `@${key}`), el("span", { class: "number" }, format(weight, spec.signed)))));
  return { node: el("div", { class: "row-view" }, el("div", { class: "scroll" }, drawing), best.length ? list : el("p", { class: "hint" }, "Only the first token has weight."),
    el("p", { class: "hint" }, capitalised(spec.row.how))), drawing };
}

/** @param {string} text */
function capitalised(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
}
