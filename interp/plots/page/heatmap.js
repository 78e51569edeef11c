// Heat maps with labelled axes: the pointer shows a cell; a click or the keyboard selects one or several.

import { paint } from "./colors.js";
import { el, roomFor, svg } from "./dom.js";

/** @typedef {import("./data.js").Axis} Axis */
/** @typedef {"hover"|"choose"|"toggle"|"extend"} How  extend: all cells between the last selected one and this one */

/**
 * @typedef {object} MapSpec
 * @property {Axis} rows
 * @property {Axis} columns
 * @property {string} rowTitle
 * @property {string} columnTitle
 * @property {string} title  for screen readers
 * @property {(number|null)[]} values  in row-major order
 * @property {"diverging"|"sequential"} map
 * @property {(value: number) => number} place  value → position along the colour map
 * @property {(cell: number, how: How) => void} visit
 * @property {(cell: number) => number|null} [glyph]  a second quantity in [0, 1], drawn as the area of a dot
 * @property {(cell: number) => boolean} [dim]  whether the filter leaves this cell out
 * @property {string} [key]  keeps the keyboard focus on the map when it is redrawn
 */

/**
 * A heat map with labelled axes. The pointer shows a cell; a click or the arrow keys select it.
 * @param {MapSpec} spec
 * @returns {{node: HTMLElement, mark: (...cells: number[]) => void, drawing: SVGElement}}
 */
export function heatmap(spec) {
  const [R, C] = [spec.rows.values.length, spec.columns.values.length];
  const height = Math.min(Math.max(Math.floor(450 / R), 9), 26);
  const slanted = spec.columns.labels.some((label) => label.length > 3);
  const longest = Math.max(...spec.columns.labels.map((label) => label.length));
  const left = Math.min(Math.max(46, 26 + 6.2 * Math.max(...spec.rows.labels.map((label) => label.length))), 170);
  const right = 14;
  const width = Math.min(Math.max(Math.floor(Math.min(slanted ? 570 : 380, roomFor(left + right)) / C), 12), 42);
  const bottom = slanted ? Math.min(26 + longest * 5.2, 128) : 36;
  const [plotWidth, plotHeight] = [C * width, R * height];
  // Slanted labels extend to the left of their column: the first ones need room.
  const hang = slanted ? Math.max(0, Math.min(longest, 18) * 4.6 - left - width / 2) : 0;
  const [W, H] = [hang + left + plotWidth + right, 6 + plotHeight + bottom];
  const root = svg("svg", { width: W, height: H, viewBox: `${-hang} 0 ${W} ${H}`, tabindex: 0, role: "application",
    "aria-roledescription": "heat map", class: "map", "data-key": spec.key ?? spec.title,
    "aria-label": `${spec.title}. Arrow keys move between cells, Shift and arrows choose several, Space adds one.` });
  spec.values.forEach((value, i) => {
    const rect = svg("rect", { x: left + (i % C) * width, y: 6 + Math.floor(i / C) * height,
      width: width - 1, height: height - 1, class: value === null ? "cell missing" : "cell", "data-cell": i });
    if (value !== null) paint(rect, spec.map, spec.place(value));
    if (spec.dim?.(i)) rect.classList.add("dim");
    root.append(rect);
    const dot = spec.glyph?.(i) ?? null;
    if (dot === null || spec.dim?.(i)) return;
    const radius = Math.sqrt(Math.max(dot, 0)) * (Math.min(width, height) / 2 - 1.2);
    root.append(svg("circle", { cx: left + (i % C + 0.5) * width - 0.5, cy: 6 + (Math.floor(i / C) + 0.5) * height - 0.5,
      r: radius.toFixed(2), class: "dot" }));
  });
  drawAxes(root, spec, { width, height, left, slanted, plotWidth, plotHeight, bottom });
  const outline = (/** @type {string} */ name) => svg("rect", { width: width + 1, height: height + 1, class: name, x: -99, y: -99 });
  const move = (/** @type {SVGElement} */ rect, /** @type {number} */ i) => {
    rect.setAttribute("x", String(left - 1 + (i % C) * width));
    rect.setAttribute("y", String(5 + Math.floor(i / C) * height));
  };
  const hovered = outline("hovered");
  const marks = svg("g");
  root.append(marks, hovered);
  let current = 0;
  // The outline has two tones, so that it is visible on every colour of the map.
  const mark = (/** @type {number[]} */ ...cells) => {
    current = cells[0] ?? current;
    marks.replaceChildren(...["halo", "marked"].flatMap((name) => cells.map((i) => {
      const rect = outline(name);
      move(rect, i);
      return rect;
    })));
  };
  listen(root, R, C, () => current, (i, how) => {
    if (i < 0) hovered.setAttribute("x", "-99");
    else if (how === "hover") move(hovered, i);
    else mark(i);
    spec.visit(i < 0 ? current : i, how);
  });
  return { node: el("div", { class: "scroll" }, root), mark, drawing: root };
}

/**
 * Labels and titles of the axes.
 * @param {SVGElement} root
 * @param {MapSpec} spec
 * @param {{width: number, height: number, left: number, slanted: boolean, plotWidth: number,
 *          plotHeight: number, bottom: number}} at
 */
function drawAxes(root, spec, at) {
  const base = 6 + at.plotHeight;
  const rowStep = Math.ceil(11 / at.height);
  spec.rows.labels.forEach((label, i) => {
    if (i % rowStep) return;
    root.append(svg("text", { x: at.left - 6, y: 6 + (i + 0.5) * at.height - 0.5, class: "tick row" }, label));
  });
  const columnStep = Math.ceil(16 / at.width);
  spec.columns.labels.forEach((label, i) => {
    if (i % columnStep) return;
    const x = at.left + (i + 0.5) * at.width - 0.5;
    const turn = at.slanted ? { transform: `rotate(-45 ${x} ${base + 8})`, class: "tick column slanted" } : { class: "tick column" };
    root.append(svg("text", { x, y: base + 12, ...turn }, label));
  });
  const middle = 6 + at.plotHeight / 2;
  root.append(svg("text", { x: 10, y: middle, class: "axis", transform: `rotate(-90 10 ${middle})` }, spec.rowTitle));
  root.append(svg("text", { x: at.left + at.plotWidth / 2, y: base + at.bottom - 5, class: "axis" }, spec.columnTitle));
}

/**
 * Listen to pointer and keyboard. A visit to cell −1 means that the pointer left the map.
 * @param {SVGElement} root
 * @param {number} R
 * @param {number} C
 * @param {() => number} current
 * @param {(cell: number, how: How) => void} visit
 */
function listen(root, R, C, current, visit) {
  const cellOf = (/** @type {Event} */ event) => Number(/** @type {Element} */ (event.target).getAttribute("data-cell") ?? NaN);
  root.addEventListener("pointermove", (event) => {
    const i = cellOf(event);
    if (!Number.isNaN(i)) visit(i, "hover");
  });
  root.addEventListener("pointerleave", () => visit(-1, "hover"));
  root.addEventListener("click", (event) => {
    const i = cellOf(event);
    if (!Number.isNaN(i)) visit(i, event.shiftKey ? "extend" : event.ctrlKey || event.metaKey ? "toggle" : "choose");
  });
  root.addEventListener("keydown", (event) => {
    const [r, c] = [Math.floor(current() / C), current() % C];
    /** @type {Object<string, number[]>} */
    const moves = { ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
      Home: [r, 0], End: [r, C - 1], PageUp: [0, c], PageDown: [R - 1, c], " ": [r, c], Enter: [r, c] };
    const to = moves[event.key];
    if (!to) return;
    event.preventDefault();
    const how = event.key === " " ? "toggle" : event.shiftKey ? "extend" : "choose";
    if (to[0] >= 0 && to[0] < R && to[1] >= 0 && to[1] < C) visit(to[0] * C + to[1], how);
  });
}
