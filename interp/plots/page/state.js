// The state of the view, stored in the address so that a link shows the same view; and the reader's notes.

import { el } from "./dom.js";

/**
 * @typedef {object} State
 * @property {string[]} heads  selected heads, such as "L9H6"; the first one has the focus
 * @property {number|null} q  the query that is pinned
 * @property {"blocks"|"map"|"rows"} zoom
 * @property {"clean"|"corrupt"|"difference"} run
 * @property {"sqrt"|"linear"|"log"} scale
 * @property {boolean} mute  leave out the column of the first token
 * @property {number} ex  prompt
 * @property {string} color  id of the measurement that colours the head grid
 * @property {string} glyph  id of the statistic that its dots show
 * @property {"auto"|"light"|"dark"} theme
 * @property {string} at  the card to open and scroll to
 * @property {string[]} pins  "L9H6" or "L9H6@14"
 * @property {string} cut  circuit and number of its edges that are shown: "result-3:120"
 */

/** @type {State} */
export const state = { heads: [], q: null, zoom: "map", run: "clean", scale: "sqrt", mute: false, ex: 0, color: "", glyph: "",
  theme: "auto", at: "", pins: [], cut: "" };
const START = { ...state };

/** Notes of the reader. @type {{notes: Object<string, string>, title: string}} */
export const written = { notes: {}, title: "" };

/** @type {[Set<string>, (changed: Set<string>) => void][]} */
const listeners = [];

/**
 * Call a listener when one of these fields of the state changes.
 * @param {string} keys  separated by spaces
 * @param {(changed: Set<string>) => void} listener
 */
export function on(keys, listener) {
  listeners.push([new Set(keys.split(" ")), listener]);
}

/**
 * Change the state and the address, and call the listeners.
 * @param {Partial<State>} changes
 */
export function set(changes) {
  const changed = new Set(Object.keys(changes).filter((k) =>
    JSON.stringify(/** @type {any} */ (state)[k]) !== JSON.stringify(/** @type {any} */ (changes)[k])));
  if (!changed.size) return;
  Object.assign(state, changes);
  updateAddress();
  notify(changed);
}

/** @param {Set<string>} changed */
export function notify(changed) {
  for (const [keys, listener] of listeners) if ([...changed].some((k) => keys.has(k))) listener(changed);
}

const FIELDS = /** @type {(keyof State)[]} */ (Object.keys(START));

/** The part of the address after #, without the fields that have their initial value. */
export function permalink() {
  const parts = FIELDS.filter((k) => JSON.stringify(state[k]) !== JSON.stringify(START[k])).map((k) => {
    const value = state[k];
    const text = Array.isArray(value) ? value.join(",") : value === true ? "1" : String(value ?? "");
    return `${k}=${encodeURIComponent(text).replaceAll("%2C", ",").replaceAll("%40", "@").replaceAll("%3A", ":")}`;
  });
  return parts.length ? `#${parts.join("&")}` : "#";
}

function updateAddress() {
  try {
    history.replaceState(null, "", permalink());
  } catch { /* a frame inside a notebook has no address */ }
}

/** Read the state from the address, without invalid values. @returns {Set<string>} the changed fields */
export function readAddress() {
  const options = { zoom: ["blocks", "map", "rows"], run: ["clean", "corrupt", "difference"],
    scale: ["sqrt", "linear", "log"], theme: ["auto", "light", "dark"] };
  /** @type {any} */
  const next = { ...START, theme: state.theme };
  for (const part of location.hash.slice(1).split("&")) {
    const [key, ...rest] = part.split("=");
    const text = decode(rest.join("="));
    if (!(key in START) || text === null) continue;
    if (key === "heads") next.heads = text.split(",").filter((h) => /^L\d+H\d+$/.test(h));
    else if (key === "pins") next.pins = text.split(",").filter((p) => /^L\d+H\d+(@\d+)?$/.test(p));
    else if (key === "q") next.q = /^\d+$/.test(text) ? Number(text) : null;
    else if (key === "ex") next.ex = /^\d+$/.test(text) ? Number(text) : 0;
    else if (key === "mute") next.mute = text === "1";
    else if (!(key in options) || /** @type {any} */ (options)[key].includes(text)) next[key] = text;
  }
  const before = { ...state };
  Object.assign(state, next);
  return new Set(FIELDS.filter((k) => JSON.stringify(before[k]) !== JSON.stringify(state[k])));
}

/** @param {string} text */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return null;
  }
}

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Show the selected theme, or that of the reader's system. */
export function applyTheme() {
  const shown = state.theme === "auto" ? (dark.matches ? "dark" : "light") : state.theme;
  const root = document.documentElement;
  if (root.dataset.theme === shown) return;
  root.dataset.theme = shown;
  notify(new Set(["shown-theme"]));
}

/** Follow the theme of the reader's system, and print on white. */
export function watchTheme() {
  dark.addEventListener("change", applyTheme);
  on("theme", applyTheme);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    notify(new Set(["shown-theme", "print"]));
  });
  addEventListener("afterprint", applyTheme);
  applyTheme();
}

const spoken = el("p", { class: "spoken", "aria-live": "polite", id: "spoken" });

/** The element of announcements. */
export function announcer() {
  return spoken;
}

/**
 * Announce a text to screen readers.
 * @param {string} text
 */
export function say(text) {
  spoken.textContent = text;
}

/** @param {string} pin */
export function togglePin(pin) {
  const pinned = state.pins.includes(pin);
  set({ pins: pinned ? state.pins.filter((p) => p !== pin) : [...state.pins, pin] });
  say(`${pin} ${pinned ? "is no longer pinned" : "pinned"}`);
}
