// Effects: one card for each panel, with selectors, heat map, read-out, strongest sites and numbers.

import { divergingScale, legend } from "./colors.js";
import { exampleCells } from "./data.js";
import { capital, chooser, el, exact, format, keepFocus, roundUp, some } from "./dom.js";
import { savers } from "./export.js";
import { heatmap } from "./heatmap.js";
import { INDIRECT, mediationOf, mediationTable } from "./mediation.js";
import { effectsReadout, strongest } from "./readout.js";
import { dataTable } from "./tables.js";
import { axisTitle, endsOf, isZero, MODES, readAt, siteAddress, siteName, sliceOf, valueName } from "./view.js";

/** @typedef {import("./data.js").Panel} Panel */
/** @typedef {import("./data.js").Variant} Variant */
/** @typedef {import("./data.js").EffectsResult} EffectsResult */
/** @typedef {import("./view.js").View} View */

/** @type {Object<string, string>} */
const ACROSS = { position: "layer × token", role: "layer × part of the prompt", all: "by layer",
  receiver: "sender × receiver" };
const LISTED = 12;

/**
 * Symmetric colour limit. All means of a panel share it, so that variants can be compared. A single example may exceed
 * it; then its few extremes, from small clean–corrupt gaps, saturate.
 * @param {View} view
 */
function limitOf(view) {
  const comparable = view.panel.variants.filter((v) => view.value !== "raw" || v.metric === view.variant.metric);
  const sizes = (/** @type {(number|null)[]} */ values) => values.map((x) => Math.abs(x ?? 0));
  const mean = Math.max(...comparable.map((v) => sizes(v.cells[view.value]).reduce((a, b) => Math.max(a, b), 0)));
  if (view.example === "") return roundUp(mean);
  const own = sizes(sliceOf(view, view.value)).sort((a, b) => a - b);
  return roundUp(Math.max(mean, own[Math.floor(0.98 * (own.length - 1))]));
}

/**
 * The card of one panel.
 * @param {EffectsResult} result
 * @param {Panel} panel
 * @param {string} id
 * @param {boolean} folded  start closed, because the head grid shows the panel too
 */
export function effectsCard(result, panel, id, folded) {
  const mediation = mediationOf(panel);
  const first = mediation?.[INDIRECT] ?? panel.variants.find((v) => !isZero(v)) ?? panel.variants[0]; // the total effect is the same for every mediator
  /** @type {View} */
  const view = { panel, variant: first, value: first.value, slice: 0, example: "", columns: panel.columns, cells: first.cells };
  const kind = el("p", { class: "kind" });
  const body = el("div", {});
  let latest = 0;
  const update = async () => {
    const mine = ++latest;
    const shown = view.example === "" ? { columns: panel.columns, cells: view.variant.cells }
      : await exampleCells(result, panel, view.variant, Number(view.example));
    if (mine !== latest) return; // the reader selected something else while the table was being unpacked
    Object.assign(view, shown);
    if (sliceOf(view, view.value).every((x) => x === null)) view.value = "raw";
    describe();
    keepFocus(body, () => body.replaceChildren(effectsControls(result, view, update), ...effectsBody(view)));
  };
  const describe = () => kind.replaceChildren(el("code", {}, panel.component),
    ` ${view.columns.kind === "head" ? `layer × ${axisTitle(panel, "head")}` : ACROSS[view.columns.kind]}: `,
    [view.variant.intervention, MODES[view.variant.mode] ?? view.variant.mode, readAt(view.variant)].filter(Boolean).join(", "));
  const draw = () => update().catch((error) => body.replaceChildren(el("p", { class: "caution" }, `This panel could not be drawn: ${error}`)));
  const title = el("h3", {}, capital(panel.words));
  const inside = mediation ? [mediationTable(panel, mediation), body] : [body];
  describe();
  if (!folded || mediation) {
    draw();
    return el("article", { class: "card", id }, el("header", {}, title, kind), ...inside);
  }
  const box = /** @type {HTMLDetailsElement} */ (el("details", { class: "card folded", id },
    el("summary", {}, title, kind), ...inside));
  box.addEventListener("toggle", () => body.childElementCount || draw());
  return box;
}

/**
 * The selectors of a card.
 * @param {EffectsResult} result
 * @param {View} view
 * @param {() => Promise<void>} update
 */
function effectsControls(result, view, update) {
  const { panel, variant } = view;
  const box = el("div", { class: "controls" });
  const keys = /** @type {("model"|"task"|"intervention"|"mode"|"metric"|"read_at")[]} */ (["model", "task", "intervention", "mode", "metric", "read_at"]);
  const words = (/** @type {string} */ key, /** @type {string} */ value) => key === "read_at" ? value || "last position" : MODES[value] ?? value;
  for (const key of keys) {
    const values = [...new Set(panel.variants.map((v) => v[key]))];
    const pick = (/** @type {string} */ value) => {
      // Not every combination was measured: change as few of the other selections as possible.
      const matches = (/** @type {Variant} */ v) => keys.filter((k) => v[k] === variant[k]).length;
      view.variant = panel.variants.filter((v) => v[key] === value).sort((a, b) => matches(b) - matches(a))[0];
      view.value = view.value === "effect" ? view.variant.value : view.value;
      update();
    };
    box.append(...some(chooser(key.replace("_", " "), values.map((v) => ({ value: v, text: words(key, v) })), variant[key], pick)));
  }
  const values = ["effect", "pooled", "raw"].filter((name) => variant.cells[name].some((x) => x !== null));
  const texts = /** @type {Object<string, string>} */ ({ effect: "recovery, mean", pooled: "recovery, ratio of means", raw: `raw change (${variant.metric})` });
  box.append(...some(chooser("value", values.map((v) => ({ value: v, text: texts[v] })), view.value, (v) => { view.value = v; update(); })));
  if (panel.slices) {
    const options = panel.slices.labels.map((text, i) => ({ value: String(i), text }));
    box.append(...some(chooser(axisTitle(panel, panel.slices.kind), options, String(view.slice), (v) => { view.slice = Number(v); update(); })));
  }
  const examples = result.examples.map((e) => ({ value: String(e.id), text: `example ${e.id}${e.text ? ": " + e.text : ""}` }));
  if (examples.length > 1 || panel.columns.kind === "role") {
    const all = { value: "", text: `mean of ${variant.n} example${variant.n === 1 ? "" : "s"}` };
    box.append(...some(chooser("show", [all, ...examples], view.example, (v) => { view.example = v; update(); })));
  }
  return box;
}

/**
 * Map and legend on the left; read-out and strongest sites on the right; the numbers below.
 * @param {View} view
 */
function effectsBody(view) {
  const values = sliceOf(view, view.value);
  const limit = limitOf(view);
  const scale = divergingScale(limit);
  const readout = effectsReadout(view);
  const order = values.map((_, i) => i).filter((i) => values[i] !== null)
    .sort((a, b) => Math.abs(values[b] ?? 0) - Math.abs(values[a] ?? 0));
  const map = heatmap({
    rows: view.panel.rows, columns: view.columns, values, map: scale.map, place: scale.place,
    rowTitle: axisTitle(view.panel, view.panel.rows.kind), columnTitle: axisTitle(view.panel, view.columns.kind),
    title: `${valueName(view)} of ${view.panel.words}`,
    visit: (cell, how) => readout.show(cell, how !== "hover"),
  });
  const choose = (/** @type {number} */ cell) => { map.mark(cell); readout.show(cell, true); };
  map.mark(order[0] ?? 0);
  readout.show(order[0] ?? 0, false);
  const most = Math.abs(values[order[0]] ?? 0);
  const clipped = most > limit * 1.0001 ? `; colours saturate, the largest value here is ${format(most)}` : "";
  const spread = view.example === "" ? view.variant.spread : `Example ${view.example} alone, so there are no intervals.`;
  const merged = view.panel.averages_positions && view.columns.kind === "role"
    ? " The prompts differ in wording, so each part of the prompt shows the mean over its tokens, changed one at a time. Select an example to see its tokens." : "";
  const note = view.example === "" && view.panel.note ? ` ${view.panel.note}` : "";
  return [
    el("p", { class: "how" }, `${view.variant.scale} ${spread}${merged}${note}`),
    ...(view.variant.caution ? [el("p", { class: "caution" }, view.variant.caution)] : []),
    el("div", { class: "columns" },
      el("div", { class: "figure" }, map.node, savers(() => map.drawing, `${view.panel.words} ${valueName(view)}`),
        legend(scale.map, scale.ticks, valueName(view) + clipped, endsOf(view))),
      el("div", { class: "side" }, readout.node, strongest(view, order.slice(0, LISTED), choose))),
    dataTable(`All ${order.length} numbers`, () => effectsTable(view, order)),
  ];
}

/**
 * All numbers of a card.
 * @param {View} view
 * @param {number[]} order
 */
function effectsTable(view, order) {
  const names = ["effect", "lo", "hi", "pooled", "pooled_lo", "pooled_hi", "raw", "raw_lo", "raw_hi", "n", "n_raw"];
  const columns = names.map((name) => sliceOf(view, name));
  return {
    head: ["site", "address", ...names],
    rows: order.map((i) => [siteName(view, i), siteAddress(view, i), ...columns.map((values) => exact(values[i]))]),
  };
}
