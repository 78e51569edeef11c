// Drawing: elements, colours, heat maps, legends, lists. Every text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const MINUS = "\u2212";

/**
 * An HTML element with attributes and children (strings become text).
 * @param {string} tag
 * @param {Object<string, any>} [attributes]
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((c) => c !== null));
  return node;
}

/**
 * An SVG element.
 * @param {string} tag
 * @param {Object<string, any>} [attributes]
 * @param {string} [text]
 * @returns {SVGElement}
 */
function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  if (text !== undefined) node.textContent = text;
  return node;
}

/**
 * A number for people: three decimals, fewer when large, a real minus sign.
 * @param {number|null|undefined} x
 * @param {boolean} [signed]
 */
function format(x, signed = false) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "\u2013";
  const size = Math.abs(x);
  const digits = size !== 0 && size < 0.001 ? size.toExponential(1)
    : size < 10 ? size.toFixed(3) : size < 1000 ? size.toFixed(1) : size.toPrecision(4);
  return (x < 0 ? MINUS : signed && x > 0 ? "+" : "") + digits;
}

/**
 * @param {number|null} lo
 * @param {number|null} hi
 */
function formatInterval(lo, hi) {
  return lo === null || hi === null ? "\u2013" : `[${format(lo)}, ${format(hi)}]`;
}

/**
 * A round number at least as large as x, so that legends end on something readable.
 * @param {number} x
 */
function roundUp(x) {
  if (!(x > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(x));
  return ([1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8].find((step) => step * power >= x * (1 - 1e-9)) ?? 10) * power;
}

/** @type {{diverging: Object<string, string[]>, sequential: Object<string, string[]>}} */
let palettes;

/**
 * Colour at t in [0, 1] along evenly spaced stops.
 * @param {string[]} stops
 * @param {number} t
 * @returns {number[]}
 */
function mix(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const left = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [stops[left], stops[left + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return a.map((x, i) => Math.round(x + (b[i] - x) * (place - left)));
}

/**
 * Give a node its colours in both themes; the style sheet picks one, so nothing is redrawn on a change.
 * @param {ElementCSSInlineStyle & Element} node
 * @param {"diverging"|"sequential"} map
 * @param {number} t
 */
function paint(node, map, t) {
  for (const theme of ["light", "dark"]) {
    const rgb = mix(palettes[map][theme], t);
    node.style.setProperty(`--${theme}`, `rgb(${rgb.join(" ")})`);
    const [r, g, b] = rgb.map((x) => (x / 255) ** 2.2);
    const bright = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2;
    node.style.setProperty(`--on-${theme}`, bright ? "#101418" : "#fff");
  }
}

/**
 * @typedef {object} MapSpec
 * @property {Axis} rows
 * @property {Axis} columns
 * @property {string} rowTitle
 * @property {string} columnTitle
 * @property {string} title  what the map shows, for screen readers
 * @property {(number|null)[]} values  row-major
 * @property {"diverging"|"sequential"} map
 * @property {(value: number) => number} place  value → position along the colour map
 * @property {(cell: number, how: "hover"|"choose") => void} visit
 */

/**
 * A heat map with labelled axes. Hover reads a cell out, a click or the arrow keys choose it.
 * @param {MapSpec} spec
 * @returns {{node: HTMLElement, mark: (cell: number) => void}}
 */
function heatmap(spec) {
  const [R, C] = [spec.rows.values.length, spec.columns.values.length];
  const height = Math.min(Math.max(Math.floor(450 / R), 9), 26);
  const slanted = spec.columns.labels.some((label) => label.length > 3);
  const width = Math.min(Math.max(Math.floor((slanted ? 570 : 380) / C), 12), 42);
  const longest = Math.max(...spec.columns.labels.map((label) => label.length));
  const left = 46;
  const right = 14;
  const bottom = slanted ? Math.min(26 + longest * 5.2, 128) : 36;
  const [plotWidth, plotHeight] = [C * width, R * height];
  // Slanted labels hang to the left of their column: the first ones need room.
  const hang = slanted ? Math.max(0, Math.min(longest, 18) * 4.6 - left - width / 2) : 0;
  const [W, H] = [hang + left + plotWidth + right, 6 + plotHeight + bottom];
  const root = svg("svg", { width: W, height: H, viewBox: `${-hang} 0 ${W} ${H}`, tabindex: 0, role: "img",
    class: "map", "aria-label": `${spec.title}. Arrow keys move between cells.` });
  spec.values.forEach((value, i) => {
    const rect = svg("rect", { x: left + (i % C) * width, y: 6 + Math.floor(i / C) * height,
      width: width - 1, height: height - 1, class: value === null ? "cell missing" : "cell", "data-cell": i });
    if (value !== null) paint(rect, spec.map, spec.place(value));
    root.append(rect);
  });
  drawAxes(root, spec, { width, height, left, slanted, plotWidth, plotHeight, bottom });
  const outline = (/** @type {string} */ name) => svg("rect", { width: width + 1, height: height + 1, class: name, x: -99, y: -99 });
  // Two tones, so that the outline shows on every colour of the map.
  const [hovered, halo, marked] = [outline("hovered"), outline("halo"), outline("marked")];
  root.append(halo, marked, hovered);
  const move = (/** @type {SVGElement} */ rect, /** @type {number} */ i) => {
    rect.setAttribute("x", String(left - 1 + (i % C) * width));
    rect.setAttribute("y", String(5 + Math.floor(i / C) * height));
  };
  let current = 0;
  const mark = (/** @type {number} */ i) => [halo, marked].forEach((rect) => move(rect, (current = i)));
  listen(root, R, C, () => current, (i, how) => {
    if (i < 0) hovered.setAttribute("x", "-99");
    else if (how === "hover") move(hovered, i);
    else mark(i);
    spec.visit(i < 0 ? current : i, how);
  });
  return { node: el("div", { class: "scroll" }, root), mark };
}

/**
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
  const columnStep = Math.ceil((at.slanted ? 12 : 16) / at.width);
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
 * Pointer and keyboard on a map. A visit to cell −1 means that the pointer left.
 * @param {SVGElement} root
 * @param {number} R
 * @param {number} C
 * @param {() => number} current
 * @param {(cell: number, how: "hover"|"choose") => void} visit
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
    if (!Number.isNaN(i)) visit(i, "choose");
  });
  root.addEventListener("keydown", (event) => {
    const [r, c] = [Math.floor(current() / C), current() % C];
    /** @type {Object<string, number[]>} */
    const moves = { ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
      Home: [r, 0], End: [r, C - 1], PageUp: [0, c], PageDown: [R - 1, c] };
    const to = moves[event.key];
    if (!to) return;
    event.preventDefault();
    if (to[0] >= 0 && to[0] < R && to[1] >= 0 && to[1] < C) visit(to[0] * C + to[1], "choose");
  });
}

/**
 * A colour bar with ticks at its ends and, for diverging maps, at zero.
 * @param {"diverging"|"sequential"} map
 * @param {{at: number, label: string}[]} ticks  positions along the map
 * @param {string} caption
 * @param {[string, string]|null} ends  what the two ends mean
 */
function legend(map, ticks, caption, ends) {
  const [steps, width] = [48, 240];
  const bar = svg("svg", { width: width + 40, height: 34, class: "legend-bar", role: "img", "aria-label": caption });
  for (let i = 0; i < steps; i++) {
    const rect = svg("rect", { x: 20 + (i * width) / steps, y: 0, width: width / steps + 0.5, height: 12, class: "swatch" });
    paint(rect, map, i / (steps - 1));
    bar.append(rect);
  }
  for (const tick of ticks) {
    const x = 20 + tick.at * width;
    const zero = map === "diverging" && tick.at === 0.5;
    bar.append(svg("line", { x1: x, x2: x, y1: zero ? 0 : 12, y2: 17, class: zero ? "tickmark strong" : "tickmark" }));
    bar.append(svg("text", { x, y: 29, class: "tick middle" }, tick.label));
  }
  const meaning = ends && el("p", { class: "ends" },
    swatch(map, 0.08), ends[0], el("br"), swatch(map, 0.92), ends[1]);
  return el("div", { class: "legend" }, el("p", { class: "caption" }, caption), bar, meaning);
}

/**
 * @param {"diverging"|"sequential"} map
 * @param {number} t
 */
function swatch(map, t) {
  const node = el("span", { class: "chip", "aria-hidden": "true" });
  paint(node, map, t);
  return node;
}

/**
 * A labelled drop-down; null if there is nothing to choose.
 * @param {string} label
 * @param {{value: string, text: string}[]} options
 * @param {string} current
 * @param {(value: string) => void} change
 */
function chooser(label, options, current, change) {
  if (options.length < 2) return null;
  const select = /** @type {HTMLSelectElement} */ (el("select", { onchange: () => change(select.value) },
    ...options.map((o) => el("option", { value: o.value }, o.text))));
  select.value = current;
  return el("label", { class: "chooser" }, label, select);
}

/**
 * Redraw a box that holds choosers; the one being used keeps the keyboard.
 * @param {HTMLElement} box
 * @param {() => void} redraw
 */
function keepFocus(box, redraw) {
  const choosers = () => /** @type {HTMLElement[]} */ ([...box.querySelectorAll(".chooser")]);
  const used = choosers().find((c) => c.contains(document.activeElement))?.firstChild?.textContent;
  redraw();
  if (used) choosers().find((c) => c.firstChild?.textContent === used)?.querySelector("select")?.focus();
}

/**
 * A table that is only built when it is opened.
 * @param {string} title
 * @param {() => {head: string[], rows: string[][]}} make
 */
function dataTable(title, make) {
  const box = el("details", { class: "numbers" }, el("summary", {}, title));
  box.addEventListener("toggle", () => {
    if (box.querySelector("table")) return;
    const { head, rows } = make();
    box.append(el("div", { class: "scroll table" }, el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, text))))))));
  });
  return box;
}
