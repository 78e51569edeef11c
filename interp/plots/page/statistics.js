// Attention statistics: a layer × head map, and the values of one head token by token.

import { legend, paint, sequentialScale } from "./colors.js";
import { open } from "./data.js";
import { chooser, el, format, keepFocus, rangeOf, some, svg } from "./dom.js";
import { savers } from "./export.js";
import { heatmap } from "./heatmap.js";
import { dataTable } from "./tables.js";
import { headName } from "./view.js";

/** @typedef {import("./data.js").AttentionResult} AttentionResult */
/** @typedef {import("./data.js").Statistic} Statistic */
/** @typedef {import("./data.js").Example} Example */

/**
 * @typedef {object} AttentionView
 * @property {AttentionResult} result
 * @property {Statistic} statistic
 * @property {number} head  layer × n_heads + head
 * @property {number} example
 */

/**
 * The name of the selected head, or of another cell.
 * @param {AttentionView} view
 * @param {number} [cell]
 */
function cellName(view, cell = view.head) {
  return headName(Math.floor(cell / view.result.heads), cell % view.result.heads);
}

/**
 * The card of attention statistics.
 * @param {AttentionResult} result
 * @param {string} id
 * @param {boolean} folded
 */
export function statisticsCard(result, id, folded) {
  const mapped = result.statistics.filter((s) => s.mean !== null);
  const statistic = mapped[0] ?? result.statistics[0];
  /** @type {AttentionView} */
  const view = { result, statistic, head: strongestHeads(statistic)[0] ?? 0, example: 0 };
  const body = el("div", {});
  const strip = el("section", { class: "strip" });
  const update = () => {
    keepFocus(body, () => body.replaceChildren(
      attentionControls(view, mapped, update), ...attentionBody(view, () => drawStrip(view, strip))));
    return drawStrip(view, strip);
  };
  const kind = `layer × head, ${result.n} prompt${result.n === 1 ? "" : "s"}`;
  const heading = [el("h3", {}, "Statistics of each head, token by token"), el("p", { class: "kind" }, kind)];
  if (!folded) {
    update();
    return el("article", { class: "card", id }, el("header", {}, ...heading), body, strip);
  }
  const box = el("details", { class: "card folded", id }, el("summary", {}, ...heading), body, strip);
  box.addEventListener("toggle", () => body.childElementCount || update());
  return box;
}

/** Heads by their mean, largest first. @param {Statistic} statistic */
function strongestHeads(statistic) {
  const mean = statistic.mean ?? [];
  return mean.map((_, i) => i).filter((i) => mean[i] !== null).sort((a, b) => (mean[b] ?? 0) - (mean[a] ?? 0));
}

/**
 * The selector of the statistic.
 * @param {AttentionView} view
 * @param {Statistic[]} mapped
 * @param {() => void} update
 */
function attentionControls(view, mapped, update) {
  const pick = (/** @type {string} */ name) => {
    view.statistic = view.result.statistics.find((s) => s.name === name) ?? view.statistic;
    update();
  };
  return el("div", { class: "controls" }, ...some(
    chooser("statistic", mapped.map((s) => ({ value: s.name, text: s.name })), view.statistic.name, pick)));
}

/**
 * @param {AttentionView} view
 * @param {() => void} headChanged
 */
function attentionBody(view, headChanged) {
  const { statistic, result } = view;
  if (statistic.mean === null) return [];
  const values = statistic.mean;
  const scale = sequentialScale(...rangeOf(values));
  const readout = el("p", { class: "readout line", "aria-live": "polite" });
  const show = (/** @type {number} */ cell) => readout.replaceChildren(
    el("strong", {}, cellName(view, cell)), ` mean ${statistic.name} ${format(values[cell])}`);
  const numbers = (/** @type {number} */ n) => ({ kind: "", values: [...Array(n).keys()], labels: [...Array(n).keys()].map(String) });
  const choose = (/** @type {number} */ cell) => { view.head = cell; map.mark(cell); show(cell); headChanged(); };
  const map = heatmap({
    rows: numbers(result.layers), columns: numbers(result.heads), rowTitle: "layer", columnTitle: "head",
    title: `mean ${statistic.name} of every head`, values, map: scale.map, place: scale.place,
    visit: (cell, how) => (how === "hover" ? show(cell) : choose(cell)),
  });
  map.mark(view.head);
  show(view.head);
  const order = strongestHeads(statistic);
  const what = statistic.definition || `One value per ${statistic.per} token.`;
  return [
    el("p", { class: "how" }, `${what} The map shows the mean over tokens and prompts; each prompt has the same weight, and the first token is left out. Click a head to see it token by token.`),
    el("div", { class: "columns" },
      el("div", { class: "figure" }, map.node, savers(() => map.drawing, `mean ${statistic.name}`), legend(scale.map, scale.ticks, `mean ${statistic.name}`, null)),
      el("div", { class: "side" }, readout, extremeHeads("Highest", view, order.slice(0, 8), choose), extremeHeads("Lowest", view, order.slice(-4).reverse(), choose))),
    dataTable(`All ${order.length} numbers`, () => ({ head: ["head", statistic.name],
      rows: order.map((i) => [cellName(view, i), String(Number((values[i] ?? NaN).toPrecision(6)))]) })),
  ];
}

/**
 * A list of heads with their means.
 * @param {string} title
 * @param {AttentionView} view
 * @param {number[]} cells
 * @param {(cell: number) => void} choose
 */
function extremeHeads(title, view, cells, choose) {
  const mean = /** @type {number[]} */ (view.statistic.mean);
  const top = mean.reduce((a, b) => Math.max(a, b ?? 0), 0);
  const low = mean.reduce((a, b) => Math.min(a, b ?? 0), 0);
  return el("section", { class: "strongest" }, el("h4", {}, `${title} ${view.statistic.name}`), el("ol", {}, ...cells.map((i) =>
    el("li", {}, el("button", { type: "button", onclick: () => choose(i) },
      el("span", { class: "name" }, cellName(view, i)), plainBar(mean[i], low, top),
      el("span", { class: "number" }, format(mean[i])))))));
}

/**
 * A bar for a value without an interval.
 * @param {number} value
 * @param {number} from
 * @param {number} to
 */
function plainBar(value, from, to) {
  const x = (/** @type {number} */ v) => 4 + ((v - from) / (to - from || 1)) * 142;
  const bar = svg("svg", { width: 150, height: 16, viewBox: "0 0 150 16", class: "interval-bar", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("rect", { x: Math.min(x(0), x(value)), y: 4, width: Math.abs(x(value) - x(0)), height: 8, class: "plain" }));
  return bar;
}

/**
 * One head on one prompt: the tokens coloured by the statistic, and a read-out of all statistics.
 * @param {AttentionView} view
 * @param {HTMLElement} strip
 */
async function drawStrip(view, strip) {
  const { result, statistic } = view;
  const requested = JSON.stringify([statistic.name, view.head, view.example]);
  const example = result.examples[view.example];
  const length = example.tokens.length;
  /** @type {Object<string, ArrayLike<number>>} */
  const all = {};
  for (const s of result.statistics) all[s.name] = await open(example.values[s.name]);
  if (requested !== JSON.stringify([view.statistic.name, view.head, view.example])) return; // the reader selected something else
  const at = (/** @type {string} */ name, /** @type {number} */ token) => all[name][view.head * length + token];
  const own = example.tokens.map((_, t) => at(statistic.name, t)).filter(Number.isFinite);
  const [low, high] = rangeOf(own);
  const scale = sequentialScale(low, high);
  const readout = el("dl", { class: "token-readout" });
  const show = (/** @type {number} */ token) => readout.replaceChildren(
    el("div", {}, el("dt", {}, `token ${token * example.every}`), el("dd", {}, el("bdi", {}, example.labels[token]))),
    ...result.statistics.map((s) => el("div", { class: s === statistic ? "shown" : "" }, el("dt", {}, s.name),
      el("dd", {}, tokenValue(s, at(s.name, token), example)))));
  const tokens = example.labels.map((label, t) => {
    const value = at(statistic.name, t);
    const node = el("span", { class: Number.isFinite(value) ? "token" : "token missing", tabindex: 0, role: "img", "aria-label": `${label}: ${statistic.name} ${format(value)}`,
      onpointerenter: () => show(t), onfocus: () => show(t) }, el("bdi", {}, label));
    if (Number.isFinite(value)) paint(node, scale.map, scale.place(value));
    return node;
  });
  const options = result.examples.map((e, i) => ({ value: String(i), text: `prompt ${i}: ${e.labels.join("").replaceAll("\u00b7", " ").trim().slice(0, 60)}` }));
  const thinned = example.every > 1 ? `To keep the page small, it contains every ${example.every}th token of this prompt. ` : "";
  const shown = thinned || result.examples.length < result.n
    ? `${thinned}This page contains the tokens of the first ${result.examples.length} of ${result.n} prompts; the means are over all prompts.` : "";
  show(Math.min(length - 1, Math.max(0, own.indexOf(high))));
  keepFocus(strip, () => strip.replaceChildren(
    el("div", { class: "controls" }, el("h4", {}, `${cellName(view)}, ${statistic.name} per ${statistic.per} token`),
      ...some(chooser("prompt", options, String(view.example), (v) => { view.example = Number(v); drawStrip(view, strip); }))),
    el("p", { class: "tokens" }, ...tokens),
    el("div", { class: "strip-foot" },
      legend(scale.map, scale.ticks, `${statistic.name}, this head and prompt`, null), readout),
    ...(shown ? [el("p", { class: "caution" }, shown)] : [])));
}

/**
 * The text of a value. A statistic that is a position is shown with the token at that position.
 * @param {Statistic} statistic
 * @param {number} value
 * @param {Example} example
 */
function tokenValue(statistic, value, example) {
  if (statistic.mean !== null || !Number.isInteger(value)) return format(value);
  return value in example.labels ? el("span", {}, `${value} `, el("bdi", {}, example.labels[value])) : String(value);
}
