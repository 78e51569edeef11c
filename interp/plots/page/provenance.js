// The provenance of the results: once if all results agree, else for each result.

import { el } from "./dom.js";
import { KINDS } from "./kinds.js";

/**
 * A provenance value as text; long values are folded.
 * @param {any} value
 * @returns {Node}
 */
function provenanceValue(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 1);
  if (text.length < 240) return el("span", { class: "value" }, typeof value === "string" ? text : text.replace(/\s*\n\s*/g, " "));
  const size = Array.isArray(value) ? `${value.length} items` : `${text.length} characters`;
  return el("details", {}, el("summary", {}, size), el("pre", { tabindex: 0 }, text));
}

/**
 * The values that all results share, then the other values of each result.
 * @param {any[]} results
 */
export function provenance(results) {
  const keys = [...new Set(results.flatMap((r) => Object.keys(r.provenance)))];
  const common = keys.filter((k) => results.every((r) => JSON.stringify(r.provenance[k]) === JSON.stringify(results[0].provenance[k])));
  const table = (/** @type {[string, any][]} */ rows) => el("div", { class: "scroll" }, el("table", { class: "provenance" },
    el("tbody", {}, ...rows.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, provenanceValue(value)))))));
  const own = results.map((r) => {
    const rows = /** @type {[string, any][]} */ (Object.entries(r.provenance).filter(([k]) => !common.includes(k)));
    if (r.backends && Object.keys(r.backends).length) rows.push(["attention backend", backendsOf(r)]);
    return rows.length ? el("details", { class: "own" }, el("summary", {}, resultName(r)), table(rows)) : null;
  }).filter((x) => x !== null);
  const all = /** @type {[string, any][]} */ (common.map((k) => [k, results[0].provenance[k]]));
  return el("footer", { id: "provenance" }, el("h2", {}, "Provenance"),
    el("p", { class: "how" }, "How these numbers were made. The page contains the full tables: interp.Report.read(path) returns them."),
    ...(all.length ? [table(all)] : []), ...own, ...(keys.length ? [] : [el("p", {}, "These results carry no provenance.")]));
}

/** The attention backend of each layer. @param {any} r */
function backendsOf(r) {
  return [...new Set(Object.values(r.backends))].map((name) => {
    const layers = Object.keys(r.backends).filter((layer) => r.backends[layer] === name);
    return `${name}: ${layers.length === r.layers ? "every layer" : "layers " + layers.join(", ")}`;
  }).join("; ");
}

/** The name of a result. @param {any} result */
function resultName(result) {
  return result.name || KINDS[result.kind].describe(result);
}
