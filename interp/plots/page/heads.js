// The head grid: the causal effect of every head as colour, a statistic of its attention as the size of a dot.

import { divergingScale, legend, sequentialScale } from "./colors.js";
import { chooser, el, format, keepFocus, rangeOf, roundUp, some, svg } from "./dom.js";
import { savers } from "./export.js";
import { headList, headReadout } from "./headlist.js";
import { heatmap } from "./heatmap.js";
import { INDIRECT, mediationOf } from "./mediation.js";
import { on, say, set, state } from "./state.js";
import { endsOf, headName, headNumbers, INTERVALS, isZero, MODES, readAt, valueName } from "./view.js";

/** @typedef {import("./data.js").Panel} Panel */
/** @typedef {import("./data.js").Variant} Variant */
/** @typedef {import("./colors.js").Scale} Scale */
/** @typedef {import("./heatmap.js").How} How */

/** @typedef {import("./headlist.js").Heads} Heads */
/** @typedef {import("./headlist.js").Measure} Measure */
/** @typedef {import("./headlist.js").Counted} Counted */

const QUERY_HEADS = ["z", "result", "q"];

/**
 * Whether the head grid shows all of a panel. It has no cells for key and value heads, neurons, and heads at single positions.
 * @param {Panel} panel
 */
export function inGrid(panel) {
  return panel.rows.kind === "layer" && panel.columns.kind === "head" && !panel.slices && (!!panel.edge || QUERY_HEADS.includes(panel.component));
}

/**
 * Gather the effects and statistics of heads from all results; null if there are none.
 * @param {any[]} results
 * @returns {Heads|null}
 */
export function gatherHeads(results) {
  const panels = results.filter((r) => r.kind === "effects").flatMap((r) => r.panels.map((/** @type {Panel} */ panel) => ({ r, panel })))
    .filter(({ panel }) => inGrid(panel));
  const stats = results.filter((r) => (r.kind === "attention" && !r.stack) || r.kind === "patterns");
  const most = (/** @type {number[]} */ xs) => xs.reduce((a, b) => Math.max(a, b), 0);
  const layers = most([...stats.map((r) => r.layers), ...panels.map(({ panel }) => 1 + most(panel.rows.values.map(Number)))]);
  const heads = most([...stats.map((r) => r.heads), ...panels.map(({ panel }) => 1 + most(panel.columns.values.map(Number)))]);
  if (!layers || !heads) return null;
  const measures = panels.flatMap(({ r, panel }) => panel.variants.map((/** @type {Variant} */ v, /** @type {number} */ i) =>
    measureOf(`${results.indexOf(r)}.${r.panels.indexOf(panel)}.${i}`, panel, v, heads)));
  const counted = stats.flatMap((r) => countedOf(r, `${results.indexOf(r)}`));
  const duplicates = new Set(measures.map((m) => m.label).filter((label, i, all) => all.indexOf(label) < i));
  for (const m of measures) if (duplicates.has(m.label) && !m.label.endsWith(m.variant.metric)) m.label += `, ${m.variant.metric}`;
  measures.sort((a, b) => countCells(b) - countCells(a) || Number(isSameForAllHeads(a)) - Number(isSameForAllHeads(b))
    || Number(isZero(a.variant)) - Number(isZero(b.variant))); // sweeps of all heads first
  return { layers, heads, measures, counted };
}

/**
 * Whether a measurement is about the same for every head, as the total and the direct effect of a mediation are.
 * @param {Measure} m
 */
function isSameForAllHeads(m) {
  const mediation = mediationOf(m.panel, m.variant);
  return mediation !== null && m.variant !== mediation[INDIRECT];
}

/** Number of measured cells. @param {Measure} m */
function countCells(m) {
  return m.variant.cells.n_raw.filter((n) => n).length;
}

/**
 * One variant of a panel as a measurement of heads.
 * @param {string} id
 * @param {Panel} panel
 * @param {Variant} variant
 * @param {number} heads
 * @returns {Measure}
 */
function measureOf(id, panel, variant, heads) {
  const rows = new Map(panel.rows.values.map((v, i) => [v, i]));
  const columns = new Map(panel.columns.values.map((v, i) => [v, i]));
  const at = (/** @type {number} */ head, /** @type {string} */ name) => {
    const [r, c] = [rows.get(Math.floor(head / heads)), columns.get(head % heads)];
    return r === undefined || c === undefined ? null : variant.cells[name][r * panel.columns.values.length + c];
  };
  const intervention = [panel.edge ? `path into ${panel.edge.receiver}` : variant.intervention, MODES[variant.mode] ?? variant.mode];
  const metric = new Set(panel.variants.map((v) => v.metric)).size > 1 ? [variant.metric] : [];
  const read = new Set(panel.variants.map((v) => v.read_at)).size > 1 ? [readAt(variant) || "read at the last position"] : [readAt(variant)];
  const component = panel.component === "z" || panel.edge ? [] : [panel.component];
  const joined = [...read, variant.model, variant.task].filter(Boolean);
  return { id, label: [...component, ...intervention, ...metric, ...joined].join(", "), panel, variant, at };
}

/**
 * The statistics of heads in a result.
 * @param {any} result
 * @param {string} id
 * @returns {Counted[]}
 */
function countedOf(result, id) {
  if (result.kind === "attention") {
    return result.statistics.filter((/** @type {any} */ s) => s.mean).map((/** @type {any} */ s) => ({ id: `${id}.${s.name}`,
      label: s.name, definition: s.definition, values: s.mean }));
  }
  const values = new Array(result.layers * result.heads).fill(null);
  result.names.forEach((/** @type {string} */ name, /** @type {number} */ i) => {
    const [layer, head] = headNumbers(name);
    values[layer * result.heads + head] = result.receiver[i];
  });
  return values.some((v) => v !== null) ? [{ id: `${id}.receiver`, label: "receiver-head score", values,
    definition: "Excess kurtosis of the vertical scores of a prompt's segments (Thought Anchors): high for a head that singles out a few segments" }] : [];
}

/**
 * The card's upper half: grid, read-out, list.
 * @param {Heads} all
 * @param {(name: string) => void} tellStrongest  receives the strongest head, for views in which no head is selected
 */
export function headGrid(all, tellStrongest) {
  const nameOf = (/** @type {number} */ i) => headName(Math.floor(i / all.heads), i % all.heads);
  const filter = { least: 0, sure: false };
  const box = el("div", {});
  const readout = headReadout(all, nameOf);
  let anchor = 0;
  /** @type {(hovered?: number) => void} */
  let refresh = () => {};
  const draw = () => {
    const measure = all.measures.find((m) => m.id === state.color) ?? (state.color.includes("stat:") ? null : all.measures[0] ?? null);
    const counted = all.counted.find((c) => `stat:${c.id}` === state.color);
    const shown = measure ? null : counted ?? all.counted[0] ?? null;
    const dots = all.counted.find((c) => c.id === state.glyph) ?? null;
    const value = measure?.variant.value ?? "effect";
    const colored = Array.from({ length: all.layers * all.heads }, (_, i) => (measure ? measure.at(i, value) : shown?.values[i] ?? null));
    const scale = headColors(measure, colored);
    const ends = INTERVALS[value];
    const sizeOf = (/** @type {number} */ i) => (measure ? Math.abs(colored[i] ?? 0) : colored[i] ?? -Infinity); // effects can be large in both directions
    const isLeftOut = (/** @type {number} */ i) => {
      const x = colored[i];
      if (x === null || (filter.least > 0 && sizeOf(i) < filter.least)) return true;
      const [lo, hi] = measure ? ends.map((name) => measure.at(i, name)) : [null, null];
      return filter.sure && (lo === null || hi === null || (lo <= 0 && hi >= 0));
    };
    const order = colored.map((_, i) => i).filter((i) => colored[i] !== null)
      .sort((a, b) => sizeOf(b) - sizeOf(a));
    tellStrongest(nameOf(order[0] ?? 0));
    const [low, high] = dots ? rangeOf(dots.values) : [0, 1];
    const choose = (/** @type {number} */ cell, /** @type {How} */ how) => {
      const name = nameOf(cell);
      const others = state.heads.filter((h) => h !== name);
      const next = how === "toggle" ? (others.length < state.heads.length ? others : [name, ...others])
        : how === "extend" ? [name, ...rectangle(anchor, cell, all.heads).map(nameOf).filter((h) => h !== name)] : [name];
      if (how !== "extend") anchor = cell;
      set({ heads: next });
      const x = colored[cell];
      say(`${name}: ${measure ? valueName(/** @type {any} */ ({ ...measure, value })) : shown?.label} ${format(x, !!measure)}`
        + (next.length > 1 ? `; ${next.length} heads selected` : ""));
    };
    const axis = (/** @type {number} */ n) => ({ kind: "", values: [...Array(n).keys()], labels: [...Array(n).keys()].map(String) });
    const map = heatmap({ key: "heads", rows: axis(all.layers), columns: axis(all.heads), rowTitle: "layer", columnTitle: "head",
      title: `${measure ? measure.label : shown?.label ?? "heads"} of every head`, values: colored, map: scale.map, place: scale.place,
      dim: isLeftOut, glyph: dots ? (i) => (dots.values[i] === null ? null : ((dots.values[i] ?? 0) - low) / (high - low || 1)) : undefined,
      visit: (cell, how) => (how === "hover" ? refresh(cell) : choose(cell, how)) });
    const list = headList({ all, measure, shown, colored, sizeOf, dots, ends, isLeftOut, order, nameOf, choose });
    refresh = (hovered) => {
      const selected = state.heads.map(indexOf).filter((i) => i < colored.length);
      map.mark(...(selected.length ? selected : [order[0] ?? 0]));
      readout.show(hovered ?? selected[0] ?? order[0] ?? 0);
      list.mark(selected);
    };
    const legends = [legend(scale.map, scale.ticks, measure ? `colour: ${measure.label}, ${valueName(/** @type {any} */ ({ ...measure, value }))}` : `colour: ${shown?.label ?? ""}`,
      measure ? endsOf(/** @type {any} */ ({ variant: measure.variant, value })) : null), ...(dots ? [dotLegend(dots, low, high)] : [])];
    const about = [measure ? `${measure.variant.scale} ${measure.variant.spread}` : "", dots ? `Dots: ${dots.label}, ${dots.definition}.` : ""].filter(Boolean).join(" ");
    keepFocus(box, () => box.replaceChildren(
      controls(all, measure, shown, filter, scale.limit, draw),
      el("p", { class: "how" }, about || shown?.definition || ""),
      ...(measure?.variant.caution ? [el("p", { class: "caution" }, measure.variant.caution)] : []),
      el("div", { class: "columns" },
        el("div", { class: "figure" }, map.node, savers(() => map.drawing, "head grid"), ...legends,
          el("p", { class: "hint" }, "Click a head; Shift-click a range; Ctrl-click adds one. Arrow keys move, Space adds.")),
        el("div", { class: "side" }, readout.node, list.node))));
    refresh();
  };
  const indexOf = (/** @type {string} */ name) => headNumbers(name)[0] * all.heads + headNumbers(name)[1];
  on("color glyph", draw);
  on("heads pins", () => refresh());
  draw();
  return box;
}

/**
 * Colours of the grid: effects in both directions from zero, statistics from their lowest to their highest value.
 * @param {Measure|null} measure
 * @param {(number|null)[]} colored
 * @returns {Scale & {limit: number}}
 */
function headColors(measure, colored) {
  if (measure) {
    const limit = roundUp(colored.reduce((/** @type {number} */ a, x) => Math.max(a, Math.abs(x ?? 0)), 0));
    return { ...divergingScale(limit), limit };
  }
  const [low, high] = rangeOf(colored);
  return { ...sequentialScale(low, high), limit: high };
}

/**
 * All cells of the rectangle between two cells.
 * @param {number} a
 * @param {number} b
 * @param {number} width
 */
function rectangle(a, b, width) {
  const [r0, r1] = [a, b].map((i) => Math.floor(i / width)).sort((x, y) => x - y);
  const [c0, c1] = [a % width, b % width].sort((x, y) => x - y);
  const cells = [];
  for (let r = r0; r <= r1; r++) for (let c = c0; c <= c1; c++) cells.push(r * width + c);
  return cells;
}

/**
 * The selectors and filters of the grid.
 * @param {Heads} all
 * @param {Measure|null} measure
 * @param {Counted|null} shown
 * @param {{least: number, sure: boolean}} filter
 * @param {number} limit
 * @param {() => void} draw
 */
function controls(all, measure, shown, filter, limit, draw) {
  const colors = [...all.measures.map((m) => ({ value: m.id, text: m.label })), ...all.counted.map((c) => ({ value: `stat:${c.id}`, text: `statistic: ${c.label}` }))];
  const glyphs = [{ value: "", text: "none" }, ...all.counted.map((c) => ({ value: c.id, text: c.label }))];
  const least = /** @type {HTMLInputElement} */ (el("input", { type: "range", min: 0, max: limit, step: limit / 100, "data-key": "least",
    "aria-label": "smallest value to show", oninput: () => { filter.least = Number(least.value); draw(); } }));
  least.value = String(filter.least);
  const sure = /** @type {HTMLInputElement} */ (el("input", { type: "checkbox", "data-key": "sure", onchange: () => { filter.sure = sure.checked; draw(); } }));
  sure.checked = filter.sure;
  return el("div", { class: "controls" },
    ...some(chooser("colour", colors, measure?.id ?? `stat:${shown?.id}`, (v) => set({ color: v }))),
    ...some(chooser("dots", glyphs, state.glyph, (v) => set({ glyph: v }))),
    el("label", { class: filter.least > 0 ? "chooser active" : "chooser" }, "at least", least, el("output", {}, format(filter.least))),
    ...(measure && measure.variant.n > 1 ? [el("label", { class: "chooser" }, sure, "interval excludes 0")] : []));
}

/**
 * The legend of the dots.
 * @param {Counted} dots
 * @param {number} low
 * @param {number} high
 */
function dotLegend(dots, low, high) {
  const drawing = svg("svg", { width: 280, height: 34, role: "img", "aria-label": `dot area: ${dots.label}` });
  [0.02, 0.25, 0.5, 1].forEach((t, i) => {
    drawing.append(svg("circle", { cx: 28 + i * 68, cy: 9, r: (Math.sqrt(t) * 7).toFixed(1), class: "dot" }));
    drawing.append(svg("text", { x: 28 + i * 68, y: 30, class: "tick middle" }, format(low + (i ? t : 0) * (high - low))));
  });
  return el("div", { class: "legend" }, el("p", { class: "caption" }, `dot area: ${dots.label}`), drawing);
}
