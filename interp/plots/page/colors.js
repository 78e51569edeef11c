// Colour: the maps that the plotly figures use too, the scales that give a value its colour, legends.

import { el, format, svg } from "./dom.js";

/** @typedef {"diverging"|"sequential"} MapName */

/** @type {Object<string, Object<string, string[]>>} */
let palettes = {};

/** @param {Object<string, Object<string, string[]>>} colors  stops of each map and theme, from colors.py */
export function setPalettes(colors) {
  palettes = colors;
}

/**
 * Colour at t in [0, 1] along evenly spaced stops.
 * @param {string[]} stops
 * @param {number} t
 * @returns {number[]}
 */
export function mix(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const left = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [stops[left], stops[left + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return a.map((x, i) => Math.round(x + (b[i] - x) * (place - left)));
}

/**
 * Set the colours of a node for both themes. The style sheet selects one, so a change of theme redraws nothing.
 * @param {ElementCSSInlineStyle & Element} node
 * @param {MapName} map
 * @param {number} t
 */
export function paint(node, map, t) {
  for (const theme of ["light", "dark"]) {
    const rgb = mix(palettes[map][theme], t);
    node.style.setProperty(`--${theme}`, `rgb(${rgb.join(" ")})`);
    const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
    const bright = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179; // at 0.179 black and white text have equal contrast
    node.style.setProperty(`--on-${theme}`, bright ? "#000" : "#fff");
  }
}

/** The current theme. @returns {"light"|"dark"} */
export function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

/**
 * 256 colours of a map in the current theme, as 32-bit pixels.
 * @param {MapName} map
 * @returns {Uint32Array}
 */
export function pixels(map) {
  const out = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const [r, g, b] = mix(palettes[map][theme()], i / 255);
    out[i] = (255 << 24 | b << 16 | g << 8 | r) >>> 0;
  }
  return out;
}

/**
 * A colour bar with ticks and a caption, and the meaning of its two ends.
 * @param {MapName} map
 * @param {{at: number, label: string}[]} ticks  positions along the map
 * @param {string} caption
 * @param {[string, string]|null} ends  meaning of the two ends
 */
export function legend(map, ticks, caption, ends) {
  const [steps, width] = [48, 240];
  const bar = svg("svg", { width: width + 40, height: 34, class: "legend-bar", role: "img", "aria-label": caption });
  for (let i = 0; i < steps; i++) {
    const rect = svg("rect", { x: 20 + (i * width) / steps, y: 0, width: width / steps + 0.5, height: 12, class: "swatch" });
    paint(rect, map, i / (steps - 1));
    bar.append(rect);
  }
  for (const tick of ticks) {
    const x = 20 + tick.at * width;
    const zero = map === "diverging" && tick.at === 0.5;
    bar.append(svg("line", { x1: x, x2: x, y1: zero ? 0 : 12, y2: 17, class: zero ? "tickmark strong" : "tickmark" }));
    bar.append(svg("text", { x, y: 29, class: "tick middle" }, tick.label));
  }
  const meaning = ends && el("p", { class: "ends" },
    swatch(map, 0.08), ends[0], el("br"), swatch(map, 0.92), ends[1]);
  return el("div", { class: "legend" }, el("p", { class: "caption" }, caption), bar, meaning);
}

/**
 * @typedef {object} Scale  how values become colours
 * @property {MapName} map
 * @property {(value: number) => number} place  position of a value along the colour map
 * @property {{at: number, label: string}[]} ticks  of the legend
 */

/**
 * Colours of values with two directions: red above zero, blue below, as far as the limit on both sides.
 * @param {number} limit
 * @returns {Scale}
 */
export function divergingScale(limit) {
  const short = (/** @type {number} */ x) => format(x).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return { map: "diverging", place: (x) => 0.5 + x / (2 * limit),
    ticks: [-1, -0.5, 0, 0.5, 1].map((t) => ({ at: 0.5 + t / 2, label: short(t * limit) })) };
}

/**
 * Colours of values with one direction, from the lowest to the highest.
 * @param {number} low
 * @param {number} high
 * @returns {Scale}
 */
export function sequentialScale(low, high) {
  return { map: "sequential", place: (x) => (high > low ? (x - low) / (high - low) : 0),
    ticks: [0, 0.5, 1].map((t) => ({ at: t, label: format(low + t * (high - low)) })) };
}

/**
 * A small square of one colour.
 * @param {MapName} map
 * @param {number} t
 */
export function swatch(map, t) {
  const node = el("span", { class: "chip", "aria-hidden": "true" });
  paint(node, map, t);
  return node;
}
