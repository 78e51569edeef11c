// The page: header, heads, sections in order, provenance.

import { attentionView } from "./attention.js";
import { setPalettes } from "./colors.js";
import { button, el } from "./dom.js";
import { copy, saveJson } from "./export.js";
import { gatherHeads, headGrid } from "./heads.js";
import { KINDS } from "./kinds.js";
import { provenance } from "./provenance.js";
import { announcer, notify, on, permalink, readAddress, say, set, state, watchTheme, written } from "./state.js";

/**
 * The section of one result; null if there is nothing to draw.
 * @param {any} result
 * @param {string} id
 * @param {import("./kinds.js").Page} page
 */
function section(result, id, page) {
  if (result.kind === "prose") return el("section", { class: "prose" }, ...heading(result), ...paragraphs(result.text));
  const cards = KINDS[result.kind].cards(result, id, page).filter((card) => card !== null);
  return cards.length ? el("section", { id }, ...heading(result), ...cards) : null;
}

/** @param {{name: string|null}} result */
function heading(result) {
  return result.name ? [el("h2", {}, result.name)] : [];
}

/** @param {string|null} text */
function paragraphs(text) {
  return (text ?? "").split(/\n\s*\n/).filter((t) => t.trim()).map((t) => el("p", {}, t.trim()));
}

/** The card of the head grid and of attention patterns. @param {any[]} results */
function headsCard(results) {
  const heads = gatherHeads(results);
  if (!heads) return null;
  let strongest = "L0H0";
  const patterns = results.find((r) => r.kind === "patterns");
  const grid = headGrid(heads, (name) => { strongest = name; });
  return el("section", { id: "heads" }, el("h2", {}, "Heads: what they cause and what they read"),
    el("article", { class: "card" }, grid, ...(patterns ? [attentionView(patterns, () => strongest)] : [])));
}

/** @param {number} i  place among the results */
function sectionId(i) {
  return `result-${i}`;
}

/** Links to the cards of the page. @param {any[]} results */
function contents(results) {
  const entries = results.flatMap((result, i) => KINDS[result.kind]?.entries(result, sectionId(i)) ?? []);
  const heads = document.getElementById("heads") ? [{ id: "heads", text: "Heads" }] : [];
  const all = [...heads, ...(document.getElementById("sentences") ? [{ id: "sentences", text: "Segments" }] : []), ...entries, { id: "provenance", text: "Provenance" }]
    .filter((e) => document.getElementById(e.id));
  return el("details", { class: "contents" }, el("summary", {}, "Contents"), el("nav", { "aria-label": "On this page" },
    ...all.map((e) => el("a", { href: `#at=${e.id}`, onclick: (/** @type {Event} */ event) => { event.preventDefault(); set({ at: e.id }); go(e.id); } }, e.text))));
}

/** Open a card and scroll to it. @param {string} id */
function go(id) {
  const target = document.getElementById(id);
  if (target instanceof HTMLDetailsElement) target.open = true;
  target?.scrollIntoView({ block: "start" });
}

/** Pins, theme, link and notes. */
function bar() {
  const pins = el("span", { class: "pins" });
  const showPins = () => pins.replaceChildren(...state.pins.map((pin) => button(pin, () => {
    const [head, q] = pin.split("@");
    set({ heads: [head], q: q === undefined ? state.q : Number(q) });
    go("heads");
  }, { "aria-label": `Go to pin ${pin}` })));
  const themes = /** @type {Object<string, "auto"|"light"|"dark">} */ ({ auto: "light", light: "dark", dark: "auto" });
  const theme = button("", () => { set({ theme: themes[state.theme] }); say(`theme: ${state.theme}`); }, { "data-key": "theme" });
  const showTheme = () => { theme.textContent = `theme: ${state.theme}`; };
  on("pins", showPins);
  on("theme", showTheme);
  showPins();
  showTheme();
  return el("div", { class: "bar", role: "region", "aria-label": "This page" }, pins, theme,
    button("copy link", () => copy(location.href.split("#")[0] + permalink(), "link"), { title: "Copy a link to the current view" }),
    button("notes", () => saveJson("notes.json", { format: "interp.notes", report: written.title, pins: state.pins, notes: written.notes, link: permalink() }),
      { title: "Save your pins and notes as JSON", "aria-label": "Save pins and notes as JSON" }));
}

function start() {
  const main = /** @type {HTMLElement} */ (document.getElementById("page"));
  const data = JSON.parse(document.getElementById("interp-report")?.textContent ?? "");
  setPalettes(data.colors);
  written.title = data.title;
  readAddress();
  watchTheme();
  const results = data.results.filter((/** @type {any} */ r) => r.kind !== "prose");
  const facts = ["model", "task", "created"].map((key) => results.map((/** @type {any} */ r) => r.provenance[key])
    .find((/** @type {any} */ v) => typeof v === "string")).filter((text) => text && !data.title.includes(text));
  const heads = headsCard(results);
  const top = el("header", { class: "top" }, bar(), el("h1", {}, data.title), facts.length ? el("p", { class: "facts" }, facts.join(" · ")) : null, ...paragraphs(data.notes));
  const page = { results: data.results, hasGrid: heads !== null };
  const sections = data.results.map((/** @type {any} */ r, /** @type {number} */ i) => section(r, sectionId(i), page)).filter((/** @type {any} */ s) => s !== null);
  main.replaceChildren(announcer(), top, ...(heads ? [heads] : []), ...sections, provenance(results));
  if (main.querySelectorAll("section, article").length > 3) top.append(contents(data.results));
  if (state.at) go(state.at);
  addEventListener("hashchange", () => {
    const changed = readAddress();
    notify(changed);
    if (changed.has("at") && state.at) go(state.at);
  });
}

start();
