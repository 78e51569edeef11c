// Mediation: total, direct and indirect effect of each mediator, side by side.

import { el, exact, format, formatInterval } from "./dom.js";
import { intervalBar } from "./readout.js";
import { dataTable } from "./tables.js";
import { metricOf, siteAddress, siteName } from "./view.js";

/** @typedef {import("./data.js").Panel} Panel */
/** @typedef {import("./data.js").Variant} Variant */

const EFFECTS = ["total effect", "natural direct effect", "natural indirect effect", "interaction"];
/** @type {Object<string, string>} */
const SHORT = { "total effect": "TE", "natural direct effect": "NDE", "natural indirect effect": "NIE", interaction: "interaction" };
const MEDIATORS = 15;
/** @type {("mode"|"metric"|"model"|"task"|"read_at")[]}  what the effects of one analysis share */
const ALIKE = ["mode", "metric", "model", "task", "read_at"];
export const INDIRECT = 2; // index of the indirect effect in EFFECTS

/**
 * The four variants of a mediation analysis, for one metric; null if the panel is not one.
 * @param {Panel} panel
 * @param {Variant} like  one of its variants
 * @returns {Variant[]|null}
 */
export function mediationOf(panel, like = panel.variants[0]) {
  const alike = panel.variants.filter((v) => ALIKE.every((key) => v[key] === like[key]));
  const variants = EFFECTS.map((name) => alike.find((v) => v.intervention === name));
  return variants.every((v) => v !== undefined) ? /** @type {Variant[]} */ (variants) : null;
}

/**
 * The table of the mediators with the largest indirect effects.
 * @param {Panel} panel
 * @param {Variant[]} variants  in the order of EFFECTS
 */
export function mediationTable(panel, variants) {
  const [raw, lo, hi] = ["raw", "raw_lo", "raw_hi"].map((name) => variants.map((v) => v.cells[name]));
  const size = panel.rows.values.length * panel.columns.values.length;
  const order = [...raw[INDIRECT].keys()].filter((i) => raw[INDIRECT][i] !== null)
    .sort((a, b) => Math.abs(raw[INDIRECT][b] ?? 0) - Math.abs(raw[INDIRECT][a] ?? 0));
  /** @type {any} */
  const view = { panel, variant: variants[0], slice: 0, columns: panel.columns };
  const at = (/** @type {number} */ i) => ({ ...view, slice: Math.floor(i / size) });
  const shown = order.slice(0, MEDIATORS);
  const ends = shown.flatMap((i) => EFFECTS.flatMap((_, e) => [raw[e][i] ?? 0, lo[e][i] ?? 0, hi[e][i] ?? 0]));
  const [from, to] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  const cell = (/** @type {number} */ e, /** @type {number} */ i) => el("td", {},
    intervalBar(raw[e][i] ?? 0, lo[e][i], hi[e][i], from, to),
    el("span", { class: "number" }, format(raw[e][i], true)), " ",
    el("span", { class: "interval" }, lo[e][i] === null ? "" : formatInterval(lo[e][i], hi[e][i])));
  const rows = shown.map((i) => el("tr", {}, el("th", { scope: "row", title: siteAddress(at(i), i % size) }, siteName(at(i), i % size)),
    ...EFFECTS.map((_, e) => cell(e, i))));
  return el("section", { class: "mediation" },
    el("h4", {}, "Total, direct and indirect effects"),
    el("p", { class: "how" }, `Change of ${metricOf(view)} when the prompt changes from clean to corrupt. TE: prompt and mediator change; `
      + "NDE: only the prompt; NIE: only the mediator; interaction: TE − NDE − NIE, 0 if NDE and NIE add up to TE. "
      + `The ${shown.length} mediators with the largest |NIE|${order.length > MEDIATORS ? ` of ${order.length}` : ""}; 95% intervals.`),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Mediation table" }, el("table", { class: "effects-table" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "mediator"), ...EFFECTS.map((name) => el("th", { scope: "col", title: name }, SHORT[name])))),
      el("tbody", {}, ...rows))),
    dataTable(`All ${order.length} mediators`, () => ({
      head: ["site", "address", ...EFFECTS.flatMap((name) => [SHORT[name], "lo", "hi"])],
      rows: order.map((i) => [siteName(at(i), i % size), siteAddress(at(i), i % size),
        ...EFFECTS.flatMap((_, e) => [exact(raw[e][i]), exact(lo[e][i]), exact(hi[e][i])])]) })));
}
