// Numbers as tables, for screen readers and for copying.

import { el } from "./dom.js";

/**
 * A table that is built when the reader opens it.
 * @param {string} title
 * @param {() => {head: string[], rows: string[][]}} make
 */
export function dataTable(title, make) {
  const box = el("details", { class: "numbers" }, el("summary", {}, title));
  box.addEventListener("toggle", () => {
    if (box.querySelector("table")) return;
    const { head, rows } = make();
    box.append(el("div", { class: "scroll table", tabindex: 0, role: "region", "aria-label": title }, el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, text))))))));
  });
  return box;
}
