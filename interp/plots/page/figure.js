// The drawing of one attention map: the map, its axes, its marginals and a cross hair.

import { pixels } from "./colors.js";
import { el, format, roomFor, svg } from "./dom.js";

/** @typedef {import("./patterns.js").Square} Square */

/**
 * @typedef {object} FigureSpec
 * @property {string} name  for the title and for files
 * @property {Square} square
 * @property {boolean} signed
 * @property {number} top  the weight at the end of the colour map
 * @property {"sqrt"|"linear"|"log"} scale
 * @property {boolean} mute  the first column is grey and does not set the scale
 * @property {boolean} causal
 * @property {number} side  pixels
 * @property {string[]|null} labels  of rows and columns; null: numbers at the ends
 * @property {number} last  position of the last token
 * @property {Float32Array|null} received  drawn above the columns
 * @property {Float32Array|null} entropy  drawn to the right of the rows
 * @property {(line: number, column: number, how: "hover"|"choose"|"step") => void} visit
 */

const LOG_DECADES = 4;
const AWAY = -9999; // a coordinate outside the drawing for every size of cell
/** @type {Object<string, string>} */
export const SCALES = { sqrt: "√p", linear: "p", log: "log p" };

/**
 * The position of a weight along the colour map.
 * @param {number} share  weight / largest, in [0, 1]
 * @param {string} scale
 */
export function toned(share, scale) {
  if (scale === "sqrt") return Math.sqrt(share);
  return scale === "log" ? Math.max(0, 1 + Math.log10(Math.max(share, 1e-9)) / LOG_DECADES) : share;
}

/**
 * The weight at a position along the colour map: the inverse of `toned`.
 * @param {number} t
 * @param {string} scale
 */
export function untoned(t, scale) {
  return scale === "sqrt" ? t * t : scale === "log" ? 10 ** ((t - 1) * LOG_DECADES) : t;
}

/**
 * The largest weight, which sets the scale of the colours.
 * @param {Square} square
 * @param {boolean} mute
 */
export function largest(square, mute) {
  let top = 0;
  for (let i = 0; i < square.values.length; i++) {
    const x = Math.abs(square.values[i]);
    if (x > top && !(mute && i % square.size === 0)) top = x;
  }
  return top || 1;
}

/**
 * The map as an image with one pixel for each cell.
 * @param {FigureSpec} spec
 */
function raster(spec) {
  const { top, square: { size, values } } = spec;
  const colors = pixels(spec.signed ? "diverging" : "sequential");
  const canvas = /** @type {HTMLCanvasElement} */ (document.createElement("canvas"));
  canvas.width = canvas.height = size;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(size, size);
  const out = new Uint32Array(image.data.buffer);
  for (let i = 0; i < values.length; i++) {
    const [r, c] = [Math.floor(i / size), i % size];
    if (spec.causal && c > r) continue; // the query cannot see this key: keep the background
    if (spec.mute && c === 0) out[i] = 0x60808080;
    else {
      const t = toned(Math.min(Math.abs(values[i]) / top, 1), spec.scale);
      out[i] = colors[Math.round(255 * (spec.signed ? 0.5 + (Math.sign(values[i]) * t) / 2 : t))];
    }
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

/**
 * Draw one attention map.
 * @param {FigureSpec} spec
 * @returns {{node: HTMLElement, drawing: SVGElement, cross: (line: number|null, pinned: boolean) => void}}
 */
export function figure(spec) {
  const { square: { size } } = spec;
  const longest = spec.labels ? Math.max(...spec.labels.map((l) => l.length)) : 0;
  const [left, above, beside] = [spec.labels ? Math.min(Math.max(56, 14 + longest * 6.6), 132) : 56, 34, spec.entropy ? 62 : 0];
  const below = spec.labels ? Math.min(20 + longest * 5, 104) : 24;
  const side = Math.min(spec.side, Math.max(roomFor(left + beside + 18), 140));
  const [W, H] = [left + side + beside + 18, above + side + below];
  const cell = side / size;
  const root = svg("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, class: "pattern", tabindex: 0, role: "application",
    "aria-roledescription": "attention map", "data-key": `map ${spec.name}`,
    "aria-label": `${spec.name}: queries down, keys across. Up and down choose a query.` });
  root.append(svg("rect", { x: left, y: above, width: side, height: side, class: "plot-paper" }));
  const image = svg("image", { x: left, y: above, width: side, height: side, href: raster(spec), preserveAspectRatio: "none", class: "raster" });
  root.append(image, svg("rect", { x: left, y: above, width: side, height: side, class: "plot-frame" }));
  axes(root, spec, { left, above, side, cell, below });
  if (spec.received) root.append(scaled(spec.received, "", { x: left - 5, y: above - 20, class: "tick row" }), bars(spec.received, (v, i, most) => ({ x: left + i * cell, y: above - 4 - 24 * (v / most), width: Math.max(cell, 0.6), height: 24 * (v / most) })),
    svg("text", { x: left - 5, y: above - 8, class: "tick row" }, "received"));
  if (spec.entropy) root.append(scaled(spec.entropy, " nats", { x: left + side + 4, y: above - 8, class: "tick" }), bars(spec.entropy, (v, i, most) => ({ x: left + side + 4, y: above + i * cell, width: 24 * (v / most), height: Math.max(cell, 0.6) })),
    svg("text", { x: left + side + 4, y: above - 20, class: "tick" }, "entropy"));
  const lines = [svg("rect", { class: "cross", x: left, width: side, height: Math.max(cell, 2), y: AWAY }), svg("rect", { class: "cross", y: above, height: side, width: Math.max(cell, 2), x: AWAY }),
    svg("rect", { class: "cross pinned", x: left, width: side, height: Math.max(cell, 2), y: AWAY })];
  root.append(...lines);
  const cross = (/** @type {number|null} */ line, /** @type {boolean} */ pinned) =>
    (pinned ? lines[2] : lines[0]).setAttribute("y", String(line === null ? AWAY : above + line * cell));
  listenFigure(root, spec, (line, column) => {
    cross(line, false);
    lines[1].setAttribute("x", String(column === null ? AWAY : left + column * cell));
  }, { left, above, side });
  return { node: el("div", { class: "scroll" }, root), drawing: root, cross };
}

/**
 * The value of the longest bar of a marginal.
 * @param {Float32Array} values
 * @param {string} unit
 * @param {Object<string, any>} at
 */
function scaled(values, unit, at) {
  return svg("text", at, `\u2264 ${format(values.reduce((a, b) => Math.max(a, b), 0))}${unit}`);
}

/**
 * The bars of a marginal.
 * @param {Float32Array} values
 * @param {(value: number, i: number, most: number) => {x: number, y: number, width: number, height: number}} place
 */
function bars(values, place) {
  const most = values.reduce((a, b) => Math.max(a, b), 0) || 1;
  const path = Array.from(values, (v, i) => {
    const b = place(Number.isFinite(v) ? v : 0, i, most);
    return `M${b.x.toFixed(2)} ${b.y.toFixed(2)}h${b.width.toFixed(2)}v${b.height.toFixed(2)}h${(-b.width).toFixed(2)}z`;
  });
  return svg("path", { d: path.join(""), class: "margin" });
}

/**
 * Labels and titles of the axes.
 * @param {SVGElement} root
 * @param {FigureSpec} spec
 * @param {{left: number, above: number, side: number, cell: number, below: number}} at
 */
function axes(root, spec, at) {
  const base = at.above + at.side;
  if (!spec.labels) {
    for (const [i, place] of [[0, 0], [spec.last, 1]]) {
      root.append(svg("text", { x: at.left - 5, y: at.above + place * at.side + (place ? -5 : 6), class: "tick row" }, String(i)));
      root.append(svg("text", { x: at.left + place * at.side, y: base + 13, class: place ? "tick end" : "tick" }, String(i)));
    }
  } else {
    const step = Math.ceil(11 / at.cell);
    spec.labels.forEach((label, i) => {
      if (i % step) return;
      const [x, y] = [at.left + (i + 0.5) * at.cell, at.above + (i + 0.5) * at.cell];
      root.append(svg("text", { x: at.left - 5, y, class: "tick row" }, label));
      root.append(svg("text", { x, y: base + 10, class: "tick column slanted", transform: `rotate(-45 ${x} ${base + 8})` }, label));
    });
  }
  root.append(svg("text", { x: 9, y: at.above + at.side / 2, class: "axis", transform: `rotate(-90 9 ${at.above + at.side / 2})` }, "query"));
  root.append(svg("text", { x: at.left + at.side / 2, y: base + at.below - 3, class: "axis" }, "key"));
}

/**
 * Listen to pointer and keyboard.
 * @param {SVGElement} root
 * @param {FigureSpec} spec
 * @param {(line: number|null, column: number|null) => void} cross
 * @param {{left: number, above: number, side: number}} at
 */
function listenFigure(root, spec, cross, at) {
  const size = spec.square.size;
  const cellOf = (/** @type {PointerEvent|MouseEvent} */ event) => {
    const box = root.getBoundingClientRect();
    const shrunk = box.width / Number(root.getAttribute("width"));
    const [c, r] = [(event.clientX - box.left) / shrunk - at.left, (event.clientY - box.top) / shrunk - at.above].map((x) => Math.floor((x / at.side) * size));
    return r >= 0 && r < size && c >= 0 && c < size ? [r, c] : null;
  };
  root.addEventListener("pointermove", (event) => {
    const cell = cellOf(/** @type {PointerEvent} */ (event));
    cross(cell?.[0] ?? null, cell?.[1] ?? null);
    if (cell) spec.visit(cell[0], cell[1], "hover");
  });
  root.addEventListener("pointerleave", () => cross(null, null));
  root.addEventListener("click", (event) => {
    const cell = cellOf(/** @type {MouseEvent} */ (event));
    if (cell) spec.visit(cell[0], cell[1], "choose");
  });
  root.addEventListener("keydown", (event) => {
    const by = ({ ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 })[/** @type {KeyboardEvent} */ (event).key];
    if (by === undefined) return;
    event.preventDefault();
    spec.visit(by, 0, "step");
  });
}

/**
 * Whether no query has weight on a later key.
 * @param {Square} square
 */
export function isCausal(square) {
  for (let r = 0; r < square.size; r++) {
    for (let c = r + 1; c < square.size; c++) if (square.values[r * square.size + c] !== 0) return false;
  }
  return true;
}

/**
 * Ticks of a legend, labelled by weights.
 * @param {number} top
 * @param {string} scale
 * @param {boolean} signed
 */
export function scaleTicks(top, scale, signed) {
  if (signed) return [-1, 0, 1].map((t) => ({ at: 0.5 + t / 2, label: format(t * top, true) }));
  return [0, 0.25, 0.5, 0.75, 1].map((t) => ({ at: t, label: t === 0 && scale === "log" ? `≤${format(untoned(0, scale) * top)}` : format(untoned(t, scale) * top) }));
}
