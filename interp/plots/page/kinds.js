// The kinds of results that a page shows, one row for each: the cards that draw it, and its lines in the contents.

import { circuitCard, curveCard, curveOf } from "./circuit.js";
import { effectsCard } from "./effects.js";
import { inGrid } from "./heads.js";
import { sentenceCard } from "./sentences.js";
import { statisticsCard } from "./statistics.js";
import { axisTitle } from "./view.js";

/** @typedef {import("./data.js").Panel} Panel */

/**
 * @typedef {object} ResultKind
 * @property {(result: any) => string} describe  names a result that has no name
 * @property {(result: any, id: string, page: Page) => (HTMLElement|null)[]} cards  null: nothing to draw
 * @property {(result: any, id: string) => {id: string, text: string}[]} entries  lines of the contents
 */

/**
 * @typedef {object} Page  what a card may depend on besides its result
 * @property {any[]} results
 * @property {boolean} hasGrid  the page starts with the head grid
 */

/** @type {Object<string, ResultKind>} */
export const KINDS = {
  effects: {
    describe: (result) => `effects of ${result.panels.map((/** @type {Panel} */ p) => p.component).join(", ")}`,
    cards: (result, id, { hasGrid }) => result.panels.map((/** @type {Panel} */ panel, /** @type {number} */ i) =>
      effectsCard(result, panel, `${id}-${i}`, hasGrid && inGrid(panel))),
    entries: (result, id) => result.panels.map((/** @type {Panel} */ panel, /** @type {number} */ i) =>
      ({ id: `${id}-${i}`, text: (result.panels.length === 1 && result.name) || panelEntry(result, panel) })),
  },
  attention: {
    describe: () => "attention statistics",
    cards: (result, id, { hasGrid }) => [statisticsCard(result, `${id}-0`, hasGrid)],
    entries: (result, id) => [{ id: `${id}-0`, text: result.name ?? "Statistics" }],
  },
  patterns: {
    describe: () => "attention patterns",
    cards: (result) => [sentenceCard(result)],
    entries: () => [], // page.js lists the card of segments right after the heads
  },
  circuit: {
    describe: () => "circuit",
    cards: (result, id, { results }) => [circuitCard(result, results.find((r) => curveOf(r, result)) ?? null, id)],
    entries: (result, id) => [{ id, text: result.name ?? "Circuit" }],
  },
  curve: {
    describe: () => "faithfulness curve",
    cards: (result, _, { results }) => (results.some((r) => curveOf(result, r)) ? [] : [curveCard(result)]),
    entries: (result, id) => [{ id, text: result.name ?? "Faithfulness" }],
  },
};

/**
 * @param {{name: string|null}} result
 * @param {Panel} panel
 */
function panelEntry(result, panel) {
  const across = panel.columns.kind === "all" ? [] : [`by ${axisTitle(panel, panel.columns.kind)}`];
  const interventions = [...new Set(panel.variants.map((v) => v.intervention))].join(", ");
  return [...(result.name ? [`${result.name}:`] : []), panel.component, ...across, `(${interventions})`].join(" ");
}
