// The attention patterns of the page: maps, marginals and rows. Exact values and pooled values are kept separate.

import { halves, open, readPng } from "./data.js";

/** @typedef {import("./data.js").PatternResult} PatternResult */
/** @typedef {import("./data.js").PatternExample} PatternExample */
/** @typedef {import("./data.js").PatternRun} PatternRun */
/** @typedef {import("./data.js").Sheets} Sheets */
/** @typedef {import("./data.js").Relative} Relative */

/** @typedef {{size: number, values: Float32Array}} Square  weights in row-major order, or differences of weights */
/** @typedef {{weights: Map<number, number>, how: string}} Row  key → weight, and how exact the weights are */

/** @type {Float32Array} */
const SQUARES = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** 2);

/** @type {WeakMap<object, Promise<Uint8Array>[]>} */
const sheets = new WeakMap();

/**
 * The map of a head in one run.
 * @param {PatternRun} run
 * @param {number} head  index in the result's list
 * @returns {Promise<Square>}
 */
async function mapOfRun(run, head) {
  const group = /** @type {Sheets} */ (run.maps.findLast((g) => g.heads.includes(head)));
  const place = group.heads.indexOf(head);
  const [sheet, slot] = [Math.floor(place / group.step), place % group.step];
  let opened = sheets.get(group);
  if (!opened) sheets.set(group, (opened = []));
  const grey = await (opened[sheet] ??= readPng(group.sheets[sheet]));
  const size = group.bins;
  return { size, values: Float32Array.from(grey.subarray(slot * size * size, (slot + 1) * size * size), (v) => SQUARES[v]) };
}

/**
 * The segment × segment map of a head in one run.
 * @param {PatternRun} run
 * @param {number} head
 * @param {number} segments
 * @returns {Promise<Square>}
 */
async function blocksOfRun(run, head, segments) {
  const all = await open(run.blocks);
  const start = head * segments * segments;
  return { size: segments, values: Float32Array.from({ length: segments * segments }, (_, i) => SQUARES[all[start + i]]) };
}

/**
 * The square to draw for a head: its map or its blocks, of one run or of the difference of two runs.
 * @param {PatternExample} example
 * @param {number} head
 * @param {"clean"|"corrupt"|"difference"} run
 * @param {"blocks"|"map"|"rows"} zoom
 * @returns {Promise<Square>}
 */
export async function squareOf(example, head, run, zoom) {
  const read = (/** @type {PatternRun} */ r) => (zoom === "blocks" ? blocksOfRun(r, head, example.segments.length) : mapOfRun(r, head));
  if (run !== "difference") return read(runOf(example, run));
  const [a, b] = [await read(example.runs.clean), await read(example.runs.corrupt)];
  return { size: a.size, values: a.values.map((x, i) => x - b.values[i]) };
}

/**
 * A run of a prompt; the clean run if there is no other.
 * @param {PatternExample} example
 * @param {string} run
 */
export function runOf(example, run) {
  return example.runs[run] ?? example.runs.clean;
}

/**
 * The values of a marginal, one for each bin.
 * @param {Relative} packed
 * @param {number} head
 * @param {number} bins
 */
export async function marginal(packed, head, bins) {
  const all = await open(packed.data);
  return Float32Array.from({ length: bins }, (_, i) => (all[head * bins + i] / 255) * packed.top[head]);
}

/**
 * The row of one query, with the most exact weights that the page contains.
 * @param {PatternResult} result
 * @param {PatternExample} example
 * @param {number} head
 * @param {"clean"|"corrupt"|"difference"} which
 * @param {number} query
 * @param {ArrayLike<number>} edges
 * @returns {Promise<Row>}
 */
export async function rowOf(result, example, head, which, query, edges) {
  if (which === "difference") {
    const [a, b] = await Promise.all(/** @type {("clean"|"corrupt")[]} */ (["clean", "corrupt"]).map((r) => rowOf(result, example, head, r, query, edges)));
    const keys = new Set([...a.weights.keys(), ...b.weights.keys()]);
    return { how: `${a.how}; clean − corrupt`, weights: new Map([...keys].map((k) => [k, (a.weights.get(k) ?? 0) - (b.weights.get(k) ?? 0)])) };
  }
  const run = runOf(example, which);
  const map = await mapOfRun(run, head);
  if (example.tokens === map.size) {
    const { size, values } = map;
    const levels = result.exact.includes(result.names[head]) ? 256 : example.levels;
    return { how: `every weight; √p in ${levels < 256 ? `${levels} levels` : "8 bits"}`, weights: new Map(Array.from({ length: size }, (_, k) => /** @type {[number, number]} */ ([k, values[query * size + k]])).filter(([, v]) => v > 0)) };
  }
  const exactHead = result.exact.indexOf(result.names[head]);
  const line = run.rows?.queries.indexOf(query) ?? -1;
  if (exactHead >= 0 && run.rows && line >= 0) {
    const grey = await (rowSheets.get(run.rows) ?? readRows(run.rows));
    const start = (exactHead * run.rows.queries.length + line) * example.tokens;
    return { how: "the whole row; √p in 8 bits", weights: new Map(Array.from({ length: query + 1 }, (_, k) => /** @type {[number, number]} */ ([k, SQUARES[grey[start + k]]])).filter(([, v]) => v > 0)) };
  }
  if (exactHead >= 0 && run.top.index.shape[2] > 0) {
    const [index, bits] = await Promise.all([open(run.top.index), open(run.top.value)]);
    const k = index.length / result.exact.length / example.tokens;
    const start = (exactHead * example.tokens + query) * k;
    const values = halves(Array.from({ length: k }, (_, i) => bits[start + i]));
    return { how: `the ${k} largest weights, to 3 digits; the others are not in this page`,
      weights: new Map(Array.from(values, (v, i) => /** @type {[number, number]} */ ([index[start + i], v])).filter(([key]) => key >= 0)) };
  }
  return pooledRow(map, query, edges);
}

/** @type {WeakMap<object, Promise<Uint8Array>>} */
const rowSheets = new WeakMap();

/** Decode the rows of a run once. @param {{sheet: string}} rows */
function readRows(rows) {
  const read = readPng(rows.sheet);
  rowSheets.set(rows, read);
  return read;
}

/**
 * The row of one query from a pooled map: all tokens of a cell get its weight.
 * @param {Square} map
 * @param {number} query
 * @param {ArrayLike<number>} edges
 * @returns {Row}
 */
function pooledRow(map, query, edges) {
  const by = Math.ceil((edges.length - 1) / map.size); // bins in a row of the map
  const line = Math.floor(binOf(edges, query) / by);
  const weights = new Map();
  for (let c = 0; c < map.size; c++) {
    const v = map.values[line * map.size + c];
    const end = edges[Math.min((c + 1) * by, edges.length - 1)];
    if (v > 0) for (let k = edges[c * by]; k < end; k++) weights.set(k, v);
  }
  const cell = edges[Math.min(by, edges.length - 1)];
  return { how: `pooled: the largest weight among ${cell} × ${cell} neighbours; the rows of this head are not in this page`, weights };
}

/**
 * The bin that contains a token.
 * @param {ArrayLike<number>} edges
 * @param {number} token
 */
export function binOf(edges, token) {
  let [low, high] = [0, edges.length - 2];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (edges[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}
