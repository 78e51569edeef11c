// The numbers of one head, and a sortable list of all heads.

import { el, exact, format, formatInterval, keepFocus } from "./dom.js";
import { copy } from "./export.js";
import { intervalBar } from "./readout.js";
import { on, state, togglePin, written } from "./state.js";
import { dataTable } from "./tables.js";
import { COUNTS, INTERVALS } from "./view.js";

/** @typedef {import("./data.js").Panel} Panel */
/** @typedef {import("./data.js").Variant} Variant */

/**
 * @typedef {object} Measure  an effect that was measured for heads
 * @property {string} id
 * @property {string} label
 * @property {Panel} panel
 * @property {Variant} variant
 * @property {(head: number, name: string) => number|null} at  a column of its summary; head = layer × heads + head
 */

/**
 * @typedef {object} Counted  a statistic of heads
 * @property {string} id
 * @property {string} label
 * @property {string} definition
 * @property {(number|null)[]} values
 */

/**
 * @typedef {object} Heads  all effects and statistics of heads on the page
 * @property {number} layers
 * @property {number} heads
 * @property {Measure[]} measures
 * @property {Counted[]} counted
 */

const HEADS_LISTED = 40;

/**
 * All measurements and statistics of one head, its address, and the reader's note.
 * @param {Heads} all
 * @param {(head: number) => string} nameOf
 */
export function headReadout(all, nameOf) {
  const node = el("div", { class: "readout" });
  let shown = -1;
  const show = (/** @type {number} */ head) => {
    if (head !== shown) keepFocus(node, () => node.replaceChildren(...contents(head)));
    shown = head;
  };
  const contents = (/** @type {number} */ head) => {
    const name = nameOf(head);
    const rows = all.measures.map((m) => {
      const value = m.variant.value;
      const at = (/** @type {string} */ column) => m.at(head, column);
      const [lo, hi] = INTERVALS[value];
      return at(value) === null ? null : el("tr", {}, el("th", { scope: "row" }, m.label), el("td", {}, format(at(value), true)),
        el("td", {}, formatInterval(at(lo), at(hi))), el("td", {}, String(at(COUNTS[value]))));
    }).filter((row) => row !== null);
    const counted = all.counted.map((c) => el("div", {}, el("dt", {}, c.label), el("dd", {}, format(c.values[head]))));
    const note = /** @type {HTMLTextAreaElement} */ (el("textarea", { rows: 2, "aria-label": `Note on ${name}`, placeholder: "Your note (the “notes” button saves it)",
      oninput: () => { written.notes[name] = note.value; } }));
    note.value = written.notes[name] ?? "";
    return [
      el("p", { class: "site" }, el("strong", {}, name), el("code", {}, `z.${name}`),
        el("button", { type: "button", class: "plain-button", onclick: () => copy(`z.${name}`, "site") }, "copy as Site"),
        el("button", { type: "button", class: "plain-button pin", "aria-pressed": state.pins.includes(name), onclick: () => togglePin(name) },
          state.pins.includes(name) ? "pinned" : "pin")),
      ...(rows.length ? [el("table", {}, el("thead", {}, el("tr", {}, ...["intervention", "effect", "95% interval", "n"].map((t) => el("th", { scope: "col" }, t)))),
        el("tbody", {}, ...rows))] : []),
      ...(counted.length ? [el("dl", { class: "token-readout" }, ...counted)] : []),
      note,
    ];
  };
  on("pins", () => { const again = shown; shown = -1; if (again >= 0) show(again); });
  return { node, show };
}

/**
 * @typedef {object} ListSpec
 * @property {Heads} all
 * @property {Measure|null} measure  the effect that colours the grid; null: a statistic does
 * @property {Counted|null} shown  the statistic that colours the grid
 * @property {(number|null)[]} colored  the value of each head
 * @property {(i: number) => number} sizeOf  by which heads are sorted
 * @property {Counted|null} dots
 * @property {string[]} ends  columns of the interval
 * @property {(i: number) => boolean} isLeftOut  by the filter
 * @property {number[]} order  heads with a value, largest first
 * @property {(i: number) => string} nameOf
 * @property {(cell: number, how: "choose"|"toggle") => void} choose
 */

/**
 * The sortable list of heads.
 * @param {ListSpec} spec
 */
export function headList(spec) {
  const { measure, shown: counted, colored, sizeOf, dots, ends, isLeftOut, order, nameOf, choose } = spec;
  const passing = order.filter((i) => !isLeftOut(i));
  const bounds = (/** @type {number} */ i) => (measure ? ends.map((name) => measure.at(i, name)) : [null, null]);
  const extremes = passing.slice(0, HEADS_LISTED).flatMap((i) => [colored[i], ...bounds(i)]).filter((x) => x !== null).map(Number);
  const [from, to] = [Math.min(0, ...extremes), Math.max(0, ...extremes)];
  const sorts = [{ key: "head", text: "head" }, { key: "size", text: measure ? "effect" : counted?.label ?? "value" }, ...(dots ? [{ key: "dots", text: dots.label }] : [])];
  const sort = { key: "size", down: true };
  const body = el("tbody", {});
  const heading = el("tr", {});
  const count = el("p", { class: "hint" });
  const compare = (/** @type {number} */ a, /** @type {number} */ b) => {
    const sizes = sort.key === "head" ? [b, a] : sort.key === "dots" ? [dots?.values[a] ?? -Infinity, dots?.values[b] ?? -Infinity]
      : [sizeOf(a), sizeOf(b)];
    return (sort.down ? 1 : -1) * (sizes[1] - sizes[0]);
  };
  const draw = () => {
    const shown = [...passing].sort(compare).slice(0, HEADS_LISTED);
    heading.replaceChildren(...sorts.map((s) => el("th", { scope: "col", "aria-sort": s.key === sort.key ? (sort.down ? "descending" : "ascending") : "none" },
      el("button", { type: "button", "data-key": `sort ${s.key}`, onclick: () => {
        Object.assign(sort, { key: s.key, down: s.key === sort.key ? !sort.down : true });
        keepFocus(table, draw);
      } }, s.text, el("span", { class: "arrow", "aria-hidden": "true" }, s.key === sort.key ? (sort.down ? " ▾" : " ▴") : "")))));
    body.replaceChildren(...shown.map((i) => {
      const [lo, hi] = bounds(i);
      return el("tr", { "data-head": nameOf(i), class: state.heads.includes(nameOf(i)) ? "chosen" : "" },
        el("th", { scope: "row" }, el("button", { type: "button", class: "row-button", "aria-pressed": state.heads.includes(nameOf(i)),
          onclick: (/** @type {MouseEvent} */ e) => choose(i, e.ctrlKey || e.metaKey ? "toggle" : "choose") }, nameOf(i))),
        el("td", {}, el("span", { class: "bar-cell" }, intervalBar(colored[i] ?? 0, lo, hi, from, to, !measure),
          el("span", { class: "number" }, format(colored[i], !!measure)), el("span", { class: "interval" }, lo === null ? "" : formatInterval(lo, hi)))),
        ...(dots ? [el("td", { class: "number" }, format(dots.values[i]))] : []));
    }));
    count.textContent = `${shown.length} of ${order.length} heads${passing.length < order.length ? `, ${passing.length} pass the filter` : ""}`;
  };
  const table = el("table", { class: "head-list" }, el("thead", {}, heading), body);
  draw();
  const mark = (/** @type {number[]} */ heads) => {
    const names = new Set(heads.map(nameOf));
    for (const row of body.querySelectorAll("tr")) {
      const isSelected = names.has(row.getAttribute("data-head") ?? "");
      row.classList.toggle("chosen", isSelected);
      row.querySelector("button")?.setAttribute("aria-pressed", String(isSelected));
    }
  };
  const numbers = dataTable(`All ${order.length} heads`, () => ({
    head: ["head", "value", ...(measure ? ends : []), ...spec.all.counted.map((c) => c.label)],
    rows: order.map((i) => [nameOf(i), exact(colored[i]), ...(measure ? bounds(i).map(exact) : []), ...spec.all.counted.map((c) => exact(c.values[i]))]) }));
  return { node: el("section", { class: "listing" }, el("div", { class: "scroll list-scroll", tabindex: 0, role: "region", "aria-label": "Heads, sorted" }, table), count, numbers), mark };
}
