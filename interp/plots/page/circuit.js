// The card of a circuit: a threshold, faithfulness at that size, roles and notes that can be saved.

import { button, el, exact, format, formatInterval, keepFocus, roomFor, svg, tick } from "./dom.js";
import { copy, saveJson, savers } from "./export.js";
import { drawGraph, nodeName, onPaths } from "./graph.js";
import { say, set, state, written } from "./state.js";
import { dataTable } from "./tables.js";

/** @typedef {import("./data.js").CircuitResult} CircuitResult */
/** @typedef {import("./data.js").CurveResult} CurveResult */

/**
 * The card of a circuit.
 * @param {CircuitResult} circuit
 * @param {CurveResult|null} curve
 * @param {string} id
 */
export function circuitCard(circuit, curve, id) {
  const ranked = [...circuit.edges].sort((a, b) => Math.abs(b.score ?? 0) - Math.abs(a.score ?? 0));
  const view = { edges: shownEdges(id, ranked.length), paths: true, selected: -1 };
  const graph = el("div", { class: "scroll" });
  const facts = el("p", { class: "readout line", "aria-live": "polite" });
  const side = el("div", { class: "node-panel" });
  const chart = el("div", {});
  const slider = /** @type {HTMLInputElement} */ (el("input", { type: "range", min: 1, max: ranked.length, "aria-label": "number of edges, strongest first",
    oninput: () => { view.edges = Number(slider.value); draw(); }, onchange: () => set({ cut: `${id}:${view.edges}` }) }));
  slider.value = String(view.edges);
  const draw = () => {
    const cut = ranked.slice(0, view.edges);
    const connected = onPaths(circuit, cut);
    const shown = view.paths ? connected : cut;
    const least = Math.abs(cut[cut.length - 1].score ?? NaN);
    keepFocus(graph, () => graph.replaceChildren(drawGraph(circuit, shown, view.selected, choose)));
    const nodes = new Set(shown.flatMap((e) => [e.from, ...e.to])).size;
    facts.replaceChildren(el("strong", {}, `${view.edges} of ${ranked.length} edges`), `${Number.isFinite(least) ? ` with |score| ≥ ${format(least)}` : ", not ranked"}: ${connected.length} on a path from the input to the logits, ${nodes} nodes. `
      + `${(100 * view.edges / circuit.total).toPrecision(2)}% of the model’s ${circuit.total.toLocaleString("en")} edges.`, curve ? ` ${faithfulnessAt(curve, view.edges / circuit.total)}` : "");
    chart.replaceChildren(...(curve ? [curveChart(curve, view.edges / circuit.total)] : []));
  };
  const choose = (/** @type {number} */ i) => {
    view.selected = i;
    draw();
    side.replaceChildren(...nodePanel(circuit, i, id, draw));
    say(`${nodeName(circuit.nodes[i])} selected`);
  };
  draw();
  const heading = circuit.name ?? "Circuit";
  return el("article", { class: "card", id },
    el("header", {}, el("h3", {}, heading), el("p", { class: "kind" }, String(circuit.provenance.selection ?? circuit.provenance.method ?? ""))),
    el("p", { class: "how" }, "Senders are below, the logits on top. The width of an edge is its |score|; red edges help the attributed metric, blue edges work against it. Select a node to see its edges, give it a role, or open its attention."),
    el("div", { class: "controls" }, el("label", { class: "chooser" }, "edges kept", slider), tick("only paths to the logits", view.paths, (on) => { view.paths = on; draw(); }),
      savers(() => graph.querySelector("svg"), heading), button("Save JSON", () => saveJson("circuit.json", circuitFile(circuit, id)), { class: "plain-button", "data-key": "save circuit" })),
    facts,
    el("div", { class: "columns" }, el("div", { class: "figure" }, graph), el("div", { class: "side" }, chart, side)),
    dataTable(`All ${ranked.length} edges`, () => ({ head: ["sender", "receiver", "score", "effect"], rows: ranked.map((e) => [e.sender, e.receiver, exact(e.score), exact(e.effect)]) })));
}

/**
 * Whether a result is the curve of the ranking that a circuit was cut from. Another curve does not describe the circuit.
 * @param {any} curve
 * @param {any} circuit
 */
export function curveOf(curve, circuit) {
  if (curve.kind !== "curve" || circuit.kind !== "circuit") return false;
  const { scores } = curve.provenance;
  return circuit.edges.some((/** @type {any} */ e) => e.score !== null)
    && (!scores || ["method", "prompts"].every((key) => scores[key] === circuit.provenance[key]));
}

/**
 * A curve without its circuit.
 * @param {CurveResult} curve
 */
export function curveCard(curve) {
  return el("article", { class: "card" }, el("header", {}, el("h3", {}, "Faithfulness by circuit size")), curveChart(curve, null));
}

/**
 * Number of edges to show: that in the address, or 60.
 * @param {string} id
 * @param {number} all
 */
function shownEdges(id, all) {
  const [owner, n] = state.cut.split(":");
  return owner === id && Number(n) >= 1 ? Math.min(Number(n), all) : Math.min(all, 60);
}

/**
 * The panel of the selected node.
 * @param {CircuitResult} circuit
 * @param {number} i
 * @param {string} id
 * @param {() => void} redraw
 */
function nodePanel(circuit, i, id, redraw) {
  const node = circuit.nodes[i];
  const role = /** @type {HTMLInputElement} */ (el("input", { type: "text", "aria-label": "role", maxlength: 80, oninput: () => { node.role = role.value; }, onchange: redraw }));
  role.value = node.role;
  const note = /** @type {HTMLTextAreaElement} */ (el("textarea", { rows: 3, "aria-label": "note", oninput: () => { written.notes[`${id} ${node.site}`] = note.value; } }));
  note.value = written.notes[`${id} ${node.site}`] ?? "";
  const head = node.kind === "head" ? nodeName(node) : null;
  const list = (/** @type {string} */ title, /** @type {import("./data.js").CircuitEdge[]} */ edges, /** @type {(e: import("./data.js").CircuitEdge) => string} */ text) =>
    edges.length ? [el("h4", {}, title), el("ul", { class: "edge-list" }, ...edges.sort((a, b) => Math.abs(b.score ?? 0) - Math.abs(a.score ?? 0)).slice(0, 8)
      .map((e) => el("li", {}, el("code", {}, text(e)), " ", el("span", { class: "number" }, format(e.effect, true)))))] : [];
  return [
    el("p", { class: "site" }, el("strong", {}, nodeName(node)), el("code", {}, node.site), button("copy as Site", () => copy(node.site, "site")),
      ...(head ? [button("open its attention", () => {
        set({ heads: [head] });
        document.getElementById("attention")?.scrollIntoView({ block: "start" });
      })] : [])),
    el("label", { class: "field" }, "role", role), el("label", { class: "field" }, "note", note),
    ...list("reads", circuit.edges.filter((e) => e.to.includes(i)), (e) => `${e.sender} → ${e.receiver}`),
    ...list("sends", circuit.edges.filter((e) => e.from === i), (e) => `→ ${e.receiver}`),
  ];
}

/**
 * The file that `Circuit.write` makes, for `Circuit.read`, with the reader's roles. Notes go into the provenance.
 * @param {CircuitResult} circuit
 * @param {string} id
 */
function circuitFile(circuit, id) {
  const notes = Object.fromEntries(circuit.nodes.map((n) => [n.site, written.notes[`${id} ${n.site}`]]).filter(([, text]) => text));
  return { format: "interp.Circuit", schema: 1, architecture: circuit.architecture,
    provenance: Object.keys(notes).length ? { ...circuit.provenance, notes } : circuit.provenance,
    roles: Object.fromEntries(circuit.nodes.filter((n) => n.role && n.kind !== "logits").map((n) => [n.site, n.role])),
    edges: circuit.edges.map((e) => [e.sender, e.receiver, e.score]) };
}

/**
 * A sentence about the faithfulness at one size.
 * @param {CurveResult} curve
 * @param {number} share
 */
function faithfulnessAt(curve, share) {
  const { size, faithfulness } = curve.measured;
  const after = size.findIndex((s) => (s ?? 0) >= share);
  if (after === 0) return `Smaller than all measured circuits (the smallest: f = ${format(faithfulness[0])} at ${percent(size[0])} of the edges).`;
  const [a, b] = after < 0 ? [size.length - 1, size.length - 1] : [after - 1, after];
  const t = a === b ? 0 : (share - (size[a] ?? 0)) / ((size[b] ?? 1) - (size[a] ?? 0));
  const f = (faithfulness[a] ?? 0) + t * ((faithfulness[b] ?? 0) - (faithfulness[a] ?? 0));
  return `Faithfulness about ${format(f)} (interpolated between ${percent(size[a])} and ${percent(size[b])}).`;
}

/**
 * Shares with a tick: decades, or the two ends if there is only one decade.
 * @param {number} least  log10 of the smallest share
 */
function sizeTicks(least) {
  const decades = Array.from({ length: 1 + Math.floor(-least) }, (_, i) => 10 ** -i);
  return decades.length > 1 ? decades : [10 ** least, 1];
}

/** @param {number|null} x */
function percent(x) {
  return `${Number((100 * (x ?? 0)).toPrecision(2))}%`;
}

/**
 * Faithfulness by circuit size, with its interval and a mark at the current size.
 * @param {CurveResult} curve
 * @param {number|null} share
 */
function curveChart(curve, share) {
  const { size, faithfulness, lo, hi } = curve.measured;
  const [W, H, left, base] = [Math.min(420, roomFor(0)), 190, 44, 150];
  const [low, high] = [Math.min(0, ...faithfulness.map(Number), ...lo.map((x) => x ?? 0)), Math.max(1, ...faithfulness.map(Number), ...hi.map((x) => x ?? 0))];
  const least = Math.log10(Math.max(Number(size.find((s) => (s ?? 0) > 0)), 1e-6));
  const x = (/** @type {number} */ s) => left + ((Math.log10(Math.max(s, 10 ** least)) - least) / -least) * (W - left - 18);
  const y = (/** @type {number} */ f) => base - ((f - low) / (high - low)) * (base - 14);
  const root = svg("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, class: "curve", role: "img", "aria-label": "Faithfulness by circuit size" });
  const points = size.map((s, i) => `${x(s ?? 0).toFixed(1)} ${y(faithfulness[i] ?? 0).toFixed(1)}`);
  if (lo.every((v) => v !== null)) {
    const band = [...size.map((s, i) => `${x(s ?? 0).toFixed(1)} ${y(hi[i] ?? 0).toFixed(1)}`), ...size.map((s, i) => `${x(s ?? 0).toFixed(1)} ${y(lo[i] ?? 0).toFixed(1)}`).reverse()];
    root.append(svg("path", { d: `M${band.join("L")}Z`, class: "band" }));
  }
  for (const f of [0, 0.5, 1]) root.append(svg("line", { x1: left, x2: W - 18, y1: y(f), y2: y(f), class: "zero" }), svg("text", { x: left - 6, y: y(f), class: "tick row" }, String(f)));
  root.append(svg("path", { d: `M${points.join("L")}`, class: "curve-line" }));
  size.forEach((s, i) => root.append(svg("circle", { cx: x(s ?? 0), cy: y(faithfulness[i] ?? 0), r: 2.5, class: "point" })));
  for (const s of sizeTicks(least)) root.append(svg("line", { x1: x(s), x2: x(s), y1: base, y2: base + 3, class: "zero" }), svg("text", { x: x(s), y: base + 14, class: "tick middle" }, percent(s)));
  if (share !== null) root.append(svg("line", { x1: x(share), x2: x(share), y1: 8, y2: base, class: "query-mark" }));
  root.append(svg("text", { x: (W + left) / 2, y: H - 8, class: "axis" }, "share of edges kept (log)"), svg("text", { x: 10, y: base / 2, class: "axis", transform: `rotate(-90 10 ${base / 2})` }, "faithfulness"));
  const area = (/** @type {string} */ name, /** @type {(number|null)[]} */ v) => el("span", {}, el("strong", {}, name), ` ${format(v[0])} ${v[1] === null ? "" : formatInterval(v[1], v[2])}`);
  return el("figure", { class: "curve-figure" }, el("figcaption", {}, area("CPR", curve.cpr), area("CMD", curve.cmd), el("span", { class: "hint" }, ` ${String(curve.provenance.ablation ?? "")}`)),
    el("div", { class: "scroll" }, root), savers(() => root, "faithfulness curve"),
    dataTable("Measured sizes", () => ({ head: ["share", "edges", "faithfulness", "lo", "hi"], rows: size.map((s, i) => [exact(s), exact(curve.measured.edges[i]), exact(faithfulness[i]), exact(lo[i]), exact(hi[i])]) })));
}
