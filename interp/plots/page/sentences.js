// Segments of a prompt: how much later segments attend to each, and the heads that single out a few segments.

import { paint, sequentialScale } from "./colors.js";
import { el, exact, format, rangeOf } from "./dom.js";
import { set } from "./state.js";
import { dataTable } from "./tables.js";

/** @typedef {import("./data.js").PatternResult} PatternResult */

const RECEIVERS = 20;

/**
 * The card of segments; null if no prompt has enough segments for scores.
 * @param {PatternResult} result
 */
export function sentenceCard(result) {
  const number = result.examples.findIndex((e) => e.runs.clean.vertical.some((v) => v !== null));
  if (number < 0) return null;
  const example = result.examples[number];
  const run = example.runs.clean;
  const scale = sequentialScale(...rangeOf(run.vertical));
  const ranked = result.names.map((name, i) => ({ name, score: result.receiver[i] })).filter((h) => h.score !== null)
    .sort((a, b) => (b.score ?? 0) - (a.score ?? 0));
  const text = (/** @type {number} */ a, /** @type {number} */ b) => run.labels.slice(a, b).join("").replaceAll("\u00b7", " ").trim();
  const items = example.segments.map(([name, a, b], i) => {
    const score = run.vertical[i];
    const mark = el("span", { class: score === null ? "score none" : "score" }, format(score));
    if (score !== null) paint(mark, scale.map, scale.place(score));
    return el("li", {}, mark, el("span", { class: "n" }, name), el("bdi", {}, text(a, b).slice(0, 240)));
  });
  const chips = ranked.slice(0, RECEIVERS).map((h) => el("button", { type: "button", class: "plain-button", onclick: () => {
    set({ heads: [h.name], zoom: "blocks", ex: number });
    document.getElementById("attention")?.scrollIntoView({ block: "start" });
  } }, `${h.name} ${format(h.score)}`));
  return el("article", { class: "card", id: "sentences" },
    el("header", {}, el("h3", {}, "Which segments are read later"), el("p", { class: "kind" }, `${example.segments.length} segments, prompt ${number}`)),
    el("p", { class: "how" }, "Vertical score (Thought Anchors): the mean weight on the tokens of a segment from segments at least 4 later, "
      + `averaged over the ${Math.min(RECEIVERS, ranked.length)} receiver heads: those whose vertical scores have the highest excess kurtosis. Tokens between named segments do not count, nor does the segment of the first token, the attention sink of most heads. Select a head to see its segment × segment map.`),
    el("div", { class: "chips" }, ...chips),
    el("ol", { class: "sentences" }, ...items),
    dataTable(`All ${ranked.length} heads`, () => ({ head: ["head", "receiver score"], rows: ranked.map((h) => [h.name, exact(h.score)]) })),
    dataTable(`All ${items.length} segments`, () => ({ head: ["segment", "tokens", "vertical score"], rows: example.segments.map(([name, a, b], i) => [name || text(a, b).slice(0, 40), `${a}–${b - 1}`, exact(run.vertical[i])]) })));
}
