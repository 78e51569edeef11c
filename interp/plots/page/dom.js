// Elements and formatted numbers. All text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const MINUS = "\u2212";

/**
 * An HTML element with attributes and children (strings become text).
 * @param {string} tag
 * @param {Object<string, any>} [attributes]
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && (value !== false || name.startsWith("aria-"))) node.setAttribute(name, String(value));
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
export function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  if (text !== undefined) node.textContent = text;
  return node;
}

/**
 * Width in pixels that a card has for a plot, without its axes. A wider drawing scrolls.
 * @param {number} axes  width of the axes
 */
export function roomFor(axes) {
  const page = document.documentElement.clientWidth;
  return Math.max(page - (page > 560 ? 104 : 56) - axes, 120); // 104 and 56: the padding in page.css
}

/**
 * A number for reading: three decimals, fewer if large, two digits if small, a typographic minus sign.
 * @param {number|null|undefined} x
 * @param {boolean} [signed]
 */
export function format(x, signed = false) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "\u2013";
  const size = Math.abs(x);
  const digits = size !== 0 && size < 0.001 ? size.toExponential(1)
    : size !== 0 && size < 0.0095 ? size.toPrecision(2) : size < 10 ? size.toFixed(3) : size < 1000 ? size.toFixed(1) : size.toPrecision(4);
  return (x < 0 ? MINUS : signed && x > 0 ? "+" : "") + digits;
}

/**
 * An interval as text; a dash if it is missing.
 * @param {number|null} lo
 * @param {number|null} hi
 */
export function formatInterval(lo, hi) {
  return lo === null || hi === null ? "\u2013" : `[${format(lo)}, ${format(hi)}]`;
}

/**
 * A number with six significant digits, for tables.
 * @param {number|null|undefined} x
 */
export function exact(x) {
  return x === null || x === undefined || !Number.isFinite(x) ? "" : String(Number(x.toPrecision(6)));
}

/**
 * The next round number that is at least x, for the ends of legends.
 * @param {number} x
 */
export function roundUp(x) {
  if (!(x > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(x));
  return ([1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8].find((step) => step * power >= x * (1 - 1e-9)) ?? 10) * power;
}

/**
 * A labelled drop-down; null if there are fewer than two options.
 * @param {string} label
 * @param {{value: string, text: string}[]} options
 * @param {string} current
 * @param {(value: string) => void} change
 */
export function chooser(label, options, current, change) {
  if (options.length < 2) return null;
  const select = /** @type {HTMLSelectElement} */ (el("select", { onchange: () => change(select.value) },
    ...options.map((o) => el("option", { value: o.value }, o.text))));
  select.value = current;
  return el("label", { class: "chooser" }, label, select);
}

/**
 * A labelled check box.
 * @param {string} label
 * @param {boolean} on
 * @param {(on: boolean) => void} change
 */
export function tick(label, on, change) {
  const box = /** @type {HTMLInputElement} */ (el("input", { type: "checkbox", onchange: () => change(box.checked) }));
  box.checked = on;
  return el("label", { class: "chooser tick-box" }, box, label);
}

/**
 * A row of buttons of which one is pressed; null if there are fewer than two options.
 * @param {string} label
 * @param {{value: string, text: string, title?: string}[]} options
 * @param {string} current
 * @param {(value: string) => void} change
 */
export function switcher(label, options, current, change) {
  if (options.length < 2) return null;
  return el("div", { class: "switcher", role: "group", "aria-label": label }, el("span", { class: "switch-label" }, label),
    ...options.map((o) => el("button", { type: "button", "aria-pressed": o.value === current, title: o.title ?? null,
      "data-value": o.value, onclick: () => change(o.value) }, o.text)));
}

/**
 * A small button.
 * @param {string} text
 * @param {() => void} action
 * @param {Object<string, any>} [more]
 */
export function button(text, action, more = {}) {
  return el("button", { type: "button", class: "plain-button", onclick: action, ...more }, text);
}

/**
 * Redraw a box of controls; the control that has the keyboard focus keeps it.
 * @param {HTMLElement} box
 * @param {() => void} redraw
 */
export function keepFocus(box, redraw) {
  const all = () => /** @type {HTMLElement[]} */ ([...box.querySelectorAll("select, button, input, [tabindex]")]);
  const name = (/** @type {HTMLElement} */ n) => n.getAttribute("data-key") ?? `${n.tagName} ${n.parentElement?.firstChild?.textContent} ${n.tagName === "BUTTON" ? n.textContent : ""}`;
  const focused = all().find((n) => n === document.activeElement);
  const key = focused && name(focused);
  redraw();
  if (key) all().find((n) => name(n) === key)?.focus({ preventScroll: true });
}

/**
 * A list of one item, or of none if it is null.
 * @template T
 * @param {T|null} x
 */
export function some(x) {
  return x === null ? [] : [x];
}

/** @param {string} text */
export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/**
 * Smallest and largest of the finite values.
 * @param {Iterable<number|null>} values
 * @returns {[number, number]}
 */
export function rangeOf(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const x of values) {
    if (x === null || !Number.isFinite(x)) continue;
    if (x < low) low = x;
    if (x > high) high = x;
  }
  return [low, high];
}
