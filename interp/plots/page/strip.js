// The prompt, token by token. The document contains only the visible lines, so 8,000 tokens cost no more than 100.

import { paint } from "./colors.js";
import { el } from "./dom.js";

/**
 * @typedef {object} StripSpec
 * @property {string} label
 * @property {string[]} labels  visible text of each token
 * @property {[string, number, number][]} segments
 * @property {(token: number, how: "hover"|"leave"|"pin") => void} visit
 */

const LINE = 30;
const LINES = 11;
const BYTES = /^(\\x[0-9a-f]{2})+$/;
const FONT = '13px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace';

/**
 * The strip of tokens.
 * @param {StripSpec} spec
 */
export function tokenStrip(spec) {
  const inner = el("div", { class: "strip-inner", role: "presentation" });
  const box = el("div", { class: "strip-tokens", tabindex: 0, role: "listbox", "aria-label": spec.label, "data-key": "strip" }, inner);
  const names = new Map(spec.segments.filter(([name]) => name).map(([name, start]) => [start, name]));
  /** @type {[number, number][]} */
  let lines = [];
  /** @type {number[]} */
  const lineOf = [];
  /** @type {{tone: (token: number) => number|null, signed: boolean, query: number|null, pinned: number|null}} */
  const shown = { tone: () => null, signed: false, query: null, pinned: null };

  const lay = () => {
    const width = box.clientWidth - 16;
    if (width <= 0) return;
    lines = breakLines(spec.labels, names, width);
    lines.forEach(([a, b], i) => lineOf.fill(i, a, b));
    inner.style.height = `${lines.length * LINE}px`;
    box.style.height = `${Math.min(lines.length, LINES) * LINE + 14}px`;
    render();
  };
  const render = () => {
    const first = Math.max(0, Math.floor(box.scrollTop / LINE) - 2);
    const last = Math.min(lines.length, first + LINES + 5);
    inner.replaceChildren(...lines.slice(first, last).map(([a, b], i) => {
      const line = el("div", { class: "strip-line", role: "presentation" }, ...tokens(a, b));
      line.style.top = `${(first + i) * LINE}px`;
      return line;
    }));
    activate();
  };
  const activate = () => {
    const active = shown.query === null ? null : inner.querySelector(`#token-${shown.query}`);
    if (active) box.setAttribute("aria-activedescendant", active.id);
    else box.removeAttribute("aria-activedescendant");
  };
  const tokens = (/** @type {number} */ a, /** @type {number} */ b) => {
    const nodes = [];
    for (let t = a; t < b; t++) {
      const name = names.get(t);
      if (name) nodes.push(el("span", { class: "segment-name", role: "presentation" }, name));
      const node = el("span", { id: `token-${t}`, role: "option", "data-token": t, title: `token ${t}` }, el("bdi", {}, spec.labels[t]));
      restyle(node, t);
      nodes.push(node);
    }
    return nodes;
  };
  /** Restyle a token in place: a click would be lost if its element were replaced. */
  const restyle = (/** @type {HTMLElement} */ node, /** @type {number} */ t) => {
    const tone = shown.tone(t);
    const classes = ["token", BYTES.test(spec.labels[t]) ? "bytes" : "", tone === null ? "quiet" : "", t === shown.query ? "query" : "", t === shown.pinned ? "pinned" : ""];
    node.className = classes.filter(Boolean).join(" ");
    node.setAttribute("aria-selected", String(t === shown.pinned));
    if (tone !== null) paint(node, shown.signed ? "diverging" : "sequential", tone);
  };
  const tokenAt = (/** @type {Event} */ event) => Number(/** @type {Element} */ (event.target).closest("[data-token]")?.getAttribute("data-token") ?? NaN);
  box.addEventListener("scroll", () => requestAnimationFrame(render));
  box.addEventListener("pointerover", (event) => { if (!Number.isNaN(tokenAt(event))) spec.visit(tokenAt(event), "hover"); });
  box.addEventListener("pointerleave", () => spec.visit(-1, "leave"));
  box.addEventListener("click", (event) => { if (!Number.isNaN(tokenAt(event))) spec.visit(tokenAt(event), "pin"); });
  box.addEventListener("keydown", (event) => {
    const at = shown.query ?? shown.pinned ?? spec.labels.length - 1;
    const line = lines[lineOf[at]] ?? [0, 1];
    const to = ({ ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - (line[1] - line[0]), ArrowDown: at + (line[1] - line[0]), Home: 0,
      End: spec.labels.length - 1, Enter: at, " ": at })[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const token = Math.min(Math.max(to, 0), spec.labels.length - 1);
    spec.visit(token, event.key === "Enter" || event.key === " " ? "pin" : "hover");
    reveal(token);
  });
  const reveal = (/** @type {number} */ token) => {
    const y = (lineOf[token] ?? 0) * LINE;
    if (y < box.scrollTop || y > box.scrollTop + (LINES - 1) * LINE) box.scrollTop = y - 3 * LINE;
  };
  new ResizeObserver(lay).observe(box);
  /**
   * Colour the tokens by the attention of the query.
   * @param {Partial<typeof shown>} changes
   */
  const show = (changes) => {
    Object.assign(shown, changes);
    for (const node of /** @type {NodeListOf<HTMLElement>} */ (inner.querySelectorAll(".token"))) restyle(node, Number(node.dataset.token));
    activate();
  };
  return { node: box, show, reveal };
}

/**
 * Break the tokens into lines. The width of each distinct token is measured once.
 * @param {string[]} labels
 * @param {Map<number, string>} names
 * @param {number} lineWidth
 * @returns {[number, number][]}
 */
function breakLines(labels, names, lineWidth) {
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (new OffscreenCanvas(1, 1).getContext("2d"));
  context.font = FONT;
  /** @type {Map<string, number>} */
  const widths = new Map();
  const width = (/** @type {string} */ text) => {
    let w = widths.get(text);
    if (w === undefined) widths.set(text, (w = context.measureText(text).width));
    return w;
  };
  /** @type {[number, number][]} */
  const lines = [];
  let [start, used] = [0, 0];
  labels.forEach((label, t) => {
    const name = names.get(t);
    const w = width(label) + 13 + (name ? width(name) + 14 : 0);
    if (used + w > lineWidth && t > start) {
      lines.push([start, t]);
      [start, used] = [t, 0];
    }
    used += w;
  });
  if (labels.length) lines.push([start, labels.length]);
  return lines;
}
