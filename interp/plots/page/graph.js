// The drawing of a circuit: layers from bottom to top, edges by size and sign of their effects.

import { roomFor, svg } from "./dom.js";
import { headName } from "./view.js";

/** @typedef {import("./data.js").CircuitResult} CircuitResult */
/** @typedef {import("./data.js").CircuitNode} CircuitNode */
/** @typedef {import("./data.js").CircuitEdge} CircuitEdge */

const [ROW, BOX, HIGH, LEFT] = [40, 46, 20, 46];

/** @param {CircuitNode} node */
export function nodeName(node) {
  if (node.kind === "head") return headName(node.layer ?? 0, node.head ?? 0);
  return node.kind === "mlp" ? `MLP ${node.layer}` : node.kind;
}

/**
 * Edges that lie on a path from the input to the logits. A head passes on what it reads through q, k and v.
 * @param {CircuitResult} circuit
 * @param {CircuitEdge[]} edges
 */
export function onPaths(circuit, edges) {
  const reach = (/** @type {number} */ start, /** @type {(e: CircuitEdge) => number[]} */ from, /** @type {(e: CircuitEdge) => number[]} */ to) => {
    const reached = new Set([start]);
    for (let grew = true; grew;) {
      grew = false;
      for (const e of edges) {
        if (!from(e).some((n) => reached.has(n))) continue;
        for (const n of to(e)) if (!reached.has(n)) { reached.add(n); grew = true; }
      }
    }
    return reached;
  };
  const [input, output] = ["input", "logits"].map((kind) => circuit.nodes.findIndex((n) => n.kind === kind));
  const forward = reach(input, (e) => [e.from], (e) => e.to);
  const backward = reach(output, (e) => e.to, (e) => [e.from]);
  return edges.filter((e) => forward.has(e.from) && e.to.some((n) => backward.has(n)));
}

/**
 * The position of each node: a line for each layer that has nodes, the logits on top.
 * @param {CircuitResult} circuit
 * @param {Set<number>} shown
 */
function layout(circuit, shown) {
  const depth = (/** @type {CircuitNode} */ n) => (n.kind === "input" ? -1 : n.kind === "logits" ? Infinity : 2 * (n.layer ?? 0) + Number(n.kind === "mlp"));
  const lines = [...new Set([...shown].map((i) => depth(circuit.nodes[i])))].sort((a, b) => a - b);
  const widest = Math.max(...lines.map((d) => [...shown].filter((i) => depth(circuit.nodes[i]) === d).length));
  const width = Math.min(Math.max(Math.min(460, roomFor(LEFT + 16)), widest * (BOX + 12) + 40), 900);
  /** @type {Map<number, {x: number, y: number}>} */
  const at = new Map();
  lines.forEach((d, line) => {
    const nodes = [...shown].filter((i) => depth(circuit.nodes[i]) === d).sort((a, b) => (circuit.nodes[a].head ?? 0) - (circuit.nodes[b].head ?? 0));
    // Lines with one node are shifted, so that edges that pass a line do not cross its node.
    const shift = nodes.length === 1 && Number.isFinite(d) && d >= 0 ? ((line % 5) - 2) * (width / 9) : 0;
    nodes.forEach((i, k) => at.set(i, { x: LEFT + ((k + 0.5) / nodes.length) * width + shift, y: 18 + (lines.length - 1 - line) * ROW }));
  });
  return { at, width: width + LEFT + 16, height: 36 + (lines.length - 1) * ROW, lines: lines.map((d, line) => ({ layer: Number.isFinite(d) && d >= 0 ? Math.floor(d / 2) : null, y: 18 + (lines.length - 1 - line) * ROW })) };
}

/**
 * Draw the given edges of a circuit.
 * @param {CircuitResult} circuit
 * @param {CircuitEdge[]} edges
 * @param {number} selected  node
 * @param {(node: number) => void} choose
 */
export function drawGraph(circuit, edges, selected, choose) {
  const senders = new Set(edges.map((e) => e.from));
  const ends = (/** @type {CircuitEdge} */ e) => { // a key or value feeds a group of heads: only those with an outgoing edge
    const sending = e.to.filter((n) => senders.has(n));
    return sending.length ? sending : e.to;
  };
  const shown = new Set(edges.flatMap((e) => [e.from, ...ends(e)]));
  circuit.nodes.forEach((n, i) => { if (n.kind === "input" || n.kind === "logits") shown.add(i); });
  const { at, width, height, lines } = layout(circuit, shown);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "graph", role: "group", "aria-label": `Circuit of ${edges.length} edges` });
  root.append(svg("text", { x: 9, y: height / 2, class: "axis", transform: `rotate(-90 9 ${height / 2})` }, "layer"));
  let last = -1;
  for (const { layer, y } of lines) {
    if (layer === null || layer === last) continue;
    last = layer;
    root.append(svg("text", { x: LEFT - 12, y, class: "tick row" }, String(layer)));
  }
  const most = edges.reduce((a, e) => Math.max(a, Math.abs(e.score ?? 0)), 0) || 1;
  const weight = (/** @type {CircuitEdge} */ e) => (e.score === null ? 0.2 : Math.abs(e.score) / most);
  for (const e of [...edges].sort((a, b) => weight(a) - weight(b))) {
    for (const to of ends(e)) {
      const [a, b] = [at.get(e.from), at.get(to)];
      if (a && b) root.append(edgePath(e, a, b, weight(e), e.from === selected || to === selected));
    }
  }
  for (const i of shown) {
    const place = at.get(i);
    if (place) root.append(nodeBox(circuit.nodes[i], place, width, i === selected, () => choose(i)));
  }
  return root;
}

/**
 * The path of one edge.
 * @param {CircuitEdge} e
 * @param {{x: number, y: number}} a
 * @param {{x: number, y: number}} b
 * @param {number} weight
 * @param {boolean} near
 */
function edgePath(e, a, b, weight, near) {
  const through = ({ q: -9, k: 0, v: 9 })[e.receiver[0]] ?? 0;
  const [y0, y1, x1] = [a.y - HIGH / 2, b.y + HIGH / 2, b.x + through];
  const bend = Math.max(14, (y0 - y1) * 0.45);
  const sign = e.effect === null ? "plain-edge" : e.effect < 0 ? "negative" : "positive";
  const path = svg("path", { d: `M${a.x} ${y0}C${a.x} ${y0 - bend} ${x1} ${y1 + bend} ${x1} ${y1}`, class: `edge ${sign}${near ? " near" : ""}`,
    "stroke-width": (0.6 + 4.4 * weight).toFixed(2), "stroke-opacity": (0.25 + 0.65 * weight).toFixed(2) });
  path.append(svg("title", {}, `${e.sender} → ${e.receiver}: ${e.effect === null ? "no score" : e.effect.toPrecision(3)}`));
  return path;
}

/**
 * The box of one node.
 * @param {CircuitNode} node
 * @param {{x: number, y: number}} at
 * @param {number} width  of the drawing, which decides the side of the role's text
 * @param {boolean} isSelected
 * @param {() => void} choose
 */
function nodeBox(node, at, width, isSelected, choose) {
  const group = svg("g", { class: `node ${node.kind}${isSelected ? " chosen" : ""}`, tabindex: 0, role: "button", "data-key": `node ${node.site}`,
    "aria-label": `${nodeName(node)}${node.role ? `, ${node.role}` : ""}`, "aria-pressed": isSelected });
  const wide = node.kind === "logits" || node.kind === "mlp" ? BOX + 8 : BOX;
  group.append(svg("rect", { x: at.x - wide / 2, y: at.y - HIGH / 2, width: wide, height: HIGH, rx: node.kind === "head" ? 9 : 2 }),
    svg("text", { x: at.x, y: at.y, class: "tick middle central" }, nodeName(node)));
  const role = node.role.slice(0, 24);
  const before = at.x + wide / 2 + 4 + 6.5 * role.length > width;
  if (role) group.append(svg("text", { x: at.x + (before ? -1 : 1) * (wide / 2 + 4), y: at.y, class: before ? "role end" : "role" }, role));
  group.addEventListener("click", choose);
  group.addEventListener("keydown", (event) => {
    const { key } = /** @type {KeyboardEvent} */ (event);
    if (key !== "Enter" && key !== " ") return;
    event.preventDefault();
    choose();
  });
  return group;
}
