// What the reader is looking at: kept in the address, so that a link shows the same; and their notes.

import { el } from "./dom.js";

/**
 * @typedef {object} State
 * @property {string[]} heads  chosen heads, the one in focus first: "L9H6"
 * @property {number|null} q  the query that is pinned
 * @property {"blocks"|"map"|"rows"} zoom
 * @property {"clean"|"corrupt"|"difference"} run
 * @property {"sqrt"|"linear"|"log"} scale
 * @property {boolean} mute  leave the first token's column out
 * @property {number} ex  prompt
 * @property {string} color  which measurement colours the head grid
 * @property {string} glyph  which statistic is drawn in its cells
 * @property {"auto"|"light"|"dark"} theme
 * @property {string} at  the card to open and scroll to
 * @property {string[]} pins  "L9H6" or "L9H6@14"
 * @property {string} cut  edges kept, of each circuit: "result-3:120"
 */

/** @type {State} */
export const state = { heads: [], q: null, zoom: "map", run: "clean", scale: "sqrt", mute: false, ex: 0, color: "", glyph: "",
  theme: "auto", at: "", pins: [], cut: "" };
const START = { ...state };

/** @type {{notes: Object<string, string>, title: string}} */
export const written = { notes: {}, title: "" };

/** @type {[Set<string>, (changed: Set<string>) => void][]} */
const listeners = [];

/**
 * Call when any of these parts of the state changes.
 * @param {string} keys
 * @param {(changed: Set<string>) => void} listener
 */
export function on(keys, listener) {
  listeners.push([new Set(keys.split(" ")), listener]);
}

/**
 * Change the state, the address, and whatever listens.
 * @param {Partial<State>} changes
 */
export function set(changes) {
  const changed = new Set(Object.keys(changes).filter((k) =>
    JSON.stringify(/** @type {any} */ (state)[k]) !== JSON.stringify(/** @type {any} */ (changes)[k])));
  if (!changed.size) return;
  Object.assign(state, changes);
  address();
  notify(changed);
}

/** @param {Set<string>} changed */
export function notify(changed) {
  for (const [keys, listener] of listeners) if ([...changed].some((k) => keys.has(k))) listener(changed);
}

const FIELDS = /** @type {(keyof State)[]} */ (Object.keys(START));

/** The part of the address that says all this; what is as at the start is left out. */
export function permalink() {
  const parts = FIELDS.filter((k) => JSON.stringify(state[k]) !== JSON.stringify(START[k])).map((k) => {
    const value = state[k];
    const text = Array.isArray(value) ? value.join(",") : value === true ? "1" : String(value ?? "");
    return `${k}=${encodeURIComponent(text).replaceAll("%2C", ",").replaceAll("%40", "@").replaceAll("%3A", ":")}`;
  });
  return parts.length ? `#${parts.join("&")}` : "#";
}

function address() {
  try {
    history.replaceState(null, "", permalink());
  } catch { /* a frame inside a notebook has no address of its own */ }
}

/** Read the state from the address; what makes no sense is left as it was. */
export function readAddress() {
  const known = { zoom: ["blocks", "map", "rows"], run: ["clean", "corrupt", "difference"],
    scale: ["sqrt", "linear", "log"], theme: ["auto", "light", "dark"] };
  /** @type {any} */
  const found = { ...START, theme: state.theme };
  for (const part of location.hash.slice(1).split("&")) {
    const [key, ...rest] = part.split("=");
    const text = decode(rest.join("="));
    if (!(key in START) || text === null) continue;
    if (key === "heads") found.heads = text.split(",").filter((h) => /^L\d+H\d+$/.test(h));
    else if (key === "pins") found.pins = text.split(",").filter((p) => /^L\d+H\d+(@\d+)?$/.test(p));
    else if (key === "q") found.q = /^\d+$/.test(text) ? Number(text) : null;
    else if (key === "ex") found.ex = /^\d+$/.test(text) ? Number(text) : 0;
    else if (key === "mute") found.mute = text === "1";
    else if (!(key in known) || /** @type {any} */ (known)[key].includes(text)) found[key] = text;
  }
  const before = { ...state };
  Object.assign(state, found);
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

/** Show the theme that was chosen, or the reader's own. */
export function applyTheme() {
  const shown = state.theme === "auto" ? (dark.matches ? "dark" : "light") : state.theme;
  const root = document.documentElement;
  if (root.dataset.theme === shown) return;
  root.dataset.theme = shown;
  notify(new Set(["shown-theme"]));
}

/** Follow the reader's system, print on white paper. */
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

/** Where announcements are made. */
export function announcer() {
  return spoken;
}

/**
 * Read out to those who do not see the page.
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
