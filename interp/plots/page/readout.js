// The numbers of one cell, and the strongest cells with their intervals.

import { paint } from "./colors.js";
import { el, format, formatInterval, svg } from "./dom.js";
import { copy } from "./export.js";
import { COUNTS, INTERVALS, metricOf, siteAddress, siteName, sliceOf, valueName } from "./view.js";

/** @typedef {import("./view.js").View} View */

/**
 * The numbers of one cell. The table follows the pointer; selected cells are also announced.
 * @param {View} view
 */
export function effectsReadout(view) {
  const title = el("p", { class: "site" });
  const rows = el("tbody", {});
  const spoken = el("p", { class: "spoken", "aria-live": "polite" });
  const node = el("div", { class: "readout" }, title,
    el("table", {}, el("thead", {}, el("tr", {}, ...["", view.example === "" && view.variant.n > 1 ? "mean" : "value", "95% interval"].map((t) => el("th", { scope: "col" }, t)))), rows), spoken);
  const show = (/** @type {number} */ cell, /** @type {boolean} */ speak) => {
    const at = (/** @type {string} */ name) => sliceOf(view, name)[cell];
    const address = siteAddress(view, cell);
    title.replaceChildren(el("strong", {}, siteName(view, cell)), " ", el("code", {}, address),
      address ? el("button", { type: "button", class: "plain-button", onclick: () => copy(address, "site") }, "copy as Site") : "",
      el("span", { class: "n" }, `n = ${at(COUNTS[view.value])}`));
    const lines = { effect: "recovery, mean", pooled: "recovery, ratio of means", raw: `raw change of ${metricOf(view)}` };
    rows.replaceChildren(...Object.entries(lines).map(([name, text]) => el("tr", { class: name === view.value ? "shown" : "" },
      el("th", { scope: "row" }, text), el("td", {}, format(at(name), true)),
      el("td", {}, formatInterval(...(/** @type {[number, number]} */ (INTERVALS[name].map(at))))))));
    const [lo, hi] = INTERVALS[view.value].map(at);
    if (speak) {
      spoken.textContent = `${siteName(view, cell)}: ${valueName(view)} ${format(at(view.value), true)}, `
        + `95% interval ${formatInterval(lo, hi)}, n = ${at(COUNTS[view.value])}, raw change ${format(at("raw"), true)}`;
    }
  };
  return { node, show };
}

/**
 * The strongest sites, with intervals on a common scale.
 * @param {View} view
 * @param {number[]} cells
 * @param {(cell: number) => void} choose
 */
export function strongest(view, cells, choose) {
  const [mean, lo, hi] = [view.value, ...INTERVALS[view.value]].map((name) => sliceOf(view, name));
  const ends = cells.flatMap((i) => [mean[i], lo[i], hi[i]]).filter((x) => x !== null);
  const [from, to] = [Math.min(0, .../** @type {number[]} */ (ends)), Math.max(0, .../** @type {number[]} */ (ends))];
  const items = cells.map((i) => el("li", {}, el("button", { type: "button", onclick: () => choose(i) },
    el("span", { class: "name", title: siteName(view, i) }, siteName(view, i)),
    intervalBar(/** @type {number} */ (mean[i]), lo[i], hi[i], from, to),
    el("span", { class: "number" }, format(mean[i], true)),
    el("span", { class: "interval" }, lo[i] === null ? "" : formatInterval(lo[i], hi[i])))));
  return el("section", { class: "strongest" }, el("h4", {}, "Strongest sites"), el("ol", {}, ...items));
}

/**
 * A bar with its interval.
 * @param {number} mean
 * @param {number|null} lo
 * @param {number|null} hi
 * @param {number} from
 * @param {number} to
 * @param {boolean} [plain]  the value has only one direction
 */
export function intervalBar(mean, lo, hi, from, to, plain = false) {
  const [W, H] = [150, 16];
  const x = (/** @type {number} */ v) => 4 + ((v - from) / (to - from || 1)) * (W - 8);
  const bar = svg("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, class: "interval-bar", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: H, class: "zero" }));
  const rect = svg("rect", { x: Math.min(x(0), x(mean)), y: 4, width: Math.abs(x(mean) - x(0)), height: H - 8, class: plain ? "plain" : "swatch" });
  if (!plain) paint(rect, "diverging", mean < 0 ? 0.2 : 0.8);
  bar.append(rect);
  if (lo !== null && hi !== null) {
    bar.append(svg("line", { x1: x(lo), x2: x(hi), y1: H / 2, y2: H / 2, class: "whisker" }));
    for (const end of [lo, hi]) bar.append(svg("line", { x1: x(end), x2: x(end), y1: 4, y2: H - 4, class: "whisker" }));
  }
  return bar;
}
