// The embedded JSON: its types, and how packed arrays are unpacked (see codec.py and payload.py).

/** @typedef {{dtype: string, store: string, shape: number[], data: string}} Packed */
/** @typedef {{values: (string|number|null)[], index: Packed}} Dictionary */
/** @typedef {{kind: string, values: (string|number|null)[], labels: string[]}} Axis */
/** @typedef {Object<string, (number|null)[]>} Cells  dense [slices, rows, columns] arrays by name */
/** @typedef {{intervention: string, mode: string, metric: string, model: string, task: string, read_at: string, unit: string, n: number, value: string,
 *             scale: string, spread: string, caution: string, cells: Cells}} Variant */
/** @typedef {{component: string, words: string, is_site: boolean, averages_positions: boolean, note: string, rows: Axis, columns: Axis, slices: Axis|null,
 *             edge: {receiver: string}|null, variants: Variant[]}} Panel */
/** @typedef {{name: string|null, provenance: Object<string, any>, rows: number, panels: Panel[],
 *             token_labels: string[], examples: {id: number, text: string}[],
 *             row_variants: Packed, table: Object<string, any>}} EffectsResult */
/** @typedef {{tokens: string[], labels: string[], every: number, values: Object<string, Packed>}} Example */
/** @typedef {{name: string, per: string, definition: string, mean: (number|null)[]|null}} Statistic */
/** @typedef {{name: string|null, provenance: Object<string, any>, backends: Object<string, string>, n: number,
 *             layers: number, heads: number, statistics: Statistic[], examples: Example[]}} AttentionResult */

/** @typedef {{heads: number[], bins: number, step: number, sheets: string[]}} Sheets  maps stacked vertically */
/** @typedef {{top: number[], data: Packed}} Relative  values of each head in 8 bits, relative to its largest */
/** @typedef {{tokens: string[], labels: string[], maps: Sheets[], blocks: Packed, received: Relative, entropy: Relative,
 *             top: {index: Packed, value: Packed}, rows: {queries: number[], sheet: string}|null,
 *             vertical: (number|null)[]}} PatternRun */
/** @typedef {{tokens: number, edges: Packed, coarse: number, levels: number, segments: [string, number, number][], names: string[],
 *             runs: Object<string, PatternRun>}} PatternExample */
/** @typedef {{name: string|null, provenance: Object<string, any>, n: number, layers: number, heads: number,
 *             names: string[], exact: string[], receiver: (number|null)[], examples: PatternExample[]}} PatternResult */
/** @typedef {{site: string, layer: number|null, head: number|null, kind: string, role: string}} CircuitNode */
/** @typedef {{sender: string, receiver: string, from: number, to: number[], score: number|null, effect: number|null}} CircuitEdge */
/** @typedef {{name: string|null, provenance: Object<string, any>, architecture: Object<string, any>, total: number,
 *             nodes: CircuitNode[], edges: CircuitEdge[]}} CircuitResult */
/** @typedef {{name: string|null, provenance: Object<string, any>, cpr: (number|null)[], cmd: (number|null)[],
 *             measured: Object<string, (number|null)[]>}} CurveResult */

/** @type {Object<string, any>} */
const STORES = {
  uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array, float64: Float64Array,
};

/**
 * Unpack an array: base64, zlib, byte planes.
 * @param {Packed} packed
 * @returns {Promise<ArrayLike<number>>}
 */
async function unpack(packed) {
  const zipped = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const Store = STORES[packed.store];
  const width = Store.BYTES_PER_ELEMENT;
  const n = planes.length / width;
  const bytes = new Uint8Array(planes.length);
  for (let b = 0; b < width; b++) {
    for (let i = 0; i < n; i++) bytes[i * width + b] = planes[b * n + i];
  }
  return new Store(bytes.buffer);
}

/** @type {WeakMap<object, Promise<ArrayLike<number>>>} */
const opened = new WeakMap();

/**
 * Unpack an array once, and return the same values from then on.
 * @param {Packed} packed
 */
export function open(packed) {
  let values = opened.get(packed);
  if (!values) opened.set(packed, (values = unpack(packed)));
  return values;
}

/**
 * The exact values of a grey PNG, decoded by the browser without colour management or alpha.
 * @param {string} data  base64
 * @returns {Promise<Uint8Array>}
 */
export async function readPng(data) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.drawImage(image, 0, 0);
  const { data: rgba } = context.getImageData(0, 0, image.width, image.height);
  const out = new Uint8Array(rgba.length / 4);
  for (let i = 0; i < out.length; i++) out[i] = rgba[4 * i];
  image.close();
  return out;
}

/**
 * Convert float16 to numbers.
 * @param {ArrayLike<number>} bits
 * @returns {Float32Array}
 */
export function halves(bits) {
  return Float32Array.from(bits, (x) => {
    const [exponent, fraction] = [(x >> 10) & 31, x & 1023];
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    return x & 0x8000 ? -size : size;
  });
}

/**
 * The rows of an effects table as functions of the row number.
 * @param {EffectsResult} result
 * @returns {Promise<Object<string, (row: number) => any>>}
 */
async function openTable(result) {
  /** @type {Object<string, (row: number) => any>} */
  const get = {};
  for (const [name, column] of Object.entries(result.table)) {
    if (column.derived) continue;
    const values = await open(column.values ? column.index : column);
    get[name] = column.values ? (row) => column.values[values[row]] : (row) => values[row];
    if (name === "token") get.label = (row) => result.token_labels[values[row]];
  }
  const start = (/** @type {number} */ r) => (get.mode(r) === "denoise" ? get.corrupt(r) : get.clean(r));
  const end = (/** @type {number} */ r) => (get.mode(r) === "denoise" ? get.clean(r) : get.corrupt(r));
  get.raw ??= (r) => get.patched(r) - start(r);
  get.effect ??= (r) => (start(r) === end(r) ? NaN : get.raw(r) / (end(r) - start(r)));
  get.gap = (r) => end(r) - start(r);
  return get;
}

/**
 * Add the address of an edge to the functions of its row: the receiver, or the sender's layer and head if there is one receiver.
 * @param {Object<string, (row: number) => any>} get
 * @param {Panel} panel
 * @returns {Object<string, (row: number) => any>}
 */
function edgeAddress(get, panel) {
  const site = (/** @type {number} */ r) => [get.component(r), get.layer(r) === null ? "" : `.L${get.layer(r)}`,
    get.head(r) === null ? "" : `H${get.head(r)}`, get.position(r) === null ? "" : `@${get.position(r)}`].join("");
  const number = (/** @type {number} */ r, /** @type {RegExp} */ pattern) => Number(pattern.exec(get.sender(r))?.[1] ?? NaN);
  return panel.edge?.receiver ? { ...get, layer: (r) => number(r, /L(\d+)/), head: (r) => number(r, /H(\d+)/) }
    : { ...get, receiver: site };
}

/**
 * The cells of a panel for one example: its own tokens as columns, no intervals.
 * @param {EffectsResult} result
 * @param {Panel} panel
 * @param {Variant} variant
 * @param {number} example
 * @returns {Promise<{columns: Axis, cells: Cells}>}
 */
export async function exampleCells(result, panel, variant, example) {
  const table = await openTable(result);
  const get = panel.edge ? edgeAddress(table, panel) : table;
  const owner = await open(result.row_variants);
  const number = result.panels.flatMap((p) => p.variants).indexOf(variant);
  const rows = [];
  for (let r = 0; r < result.rows; r++) if (owner[r] === number && get.example(r) === example) rows.push(r);
  const hasPositions = !panel.edge && panel.columns.kind !== "head" && rows.length > 0 && get.position(rows[0]) !== null;
  const columns = hasPositions ? tokenAxis(rows, get) : panel.columns;
  const axes = panel.slices ? [panel.slices, panel.rows, columns] : [panel.rows, columns];
  return { columns, cells: gather(rows, get, axes) };
}

/**
 * The positions of one example, labelled by its tokens.
 * @param {number[]} rows
 * @param {Object<string, (row: number) => any>} get
 * @returns {Axis}
 */
function tokenAxis(rows, get) {
  const labels = new Map(rows.map((r) => [get.position(r), get.label(r) || String(get.position(r))]));
  // positions counted from the end, which are negative, stand after those counted from the start
  const values = [...labels.keys()].sort((a, b) => Number(a < 0) - Number(b < 0) || a - b);
  return { kind: "position", values, labels: values.map((v) => labels.get(v)) };
}

/**
 * Average rows into dense cells (several rows of one example and site are samples of the same effect).
 * @param {number[]} rows
 * @param {Object<string, (row: number) => any>} get
 * @param {Axis[]} axes
 * @returns {Cells}
 */
function gather(rows, get, axes) {
  const size = axes.reduce((n, axis) => n * axis.values.length, 1);
  const places = axes.map((axis) => new Map(axis.values.map((v, i) => [v, i])));
  /** @type {Object<string, number[]>} */
  const sums = { effect: [], raw: [], gap: [], count: [] };
  for (const sum of Object.values(sums)) sum.push(...new Array(size).fill(0));
  for (const r of rows) {
    let cell = 0;
    axes.forEach((axis, a) => {
      const value = axis.kind === "all" ? null : (get[axis.kind](r) ?? (axis.kind === "role" ? "" : null));
      cell = cell * axis.values.length + (places[a].get(value) ?? NaN);
    });
    if (Number.isNaN(cell)) continue;
    sums.count[cell] += 1;
    for (const name of ["effect", "raw", "gap"]) sums[name][cell] += get[name](r);
  }
  const finite = (/** @type {number} */ x) => (Number.isFinite(x) ? x : null);
  const missing = new Array(size).fill(null);
  return {
    effect: sums.effect.map((x, i) => finite(x / sums.count[i])),
    raw: sums.raw.map((x, i) => finite(x / sums.count[i])),
    pooled: sums.raw.map((x, i) => finite(x / sums.gap[i])),
    n: sums.effect.map((x, i) => (sums.count[i] && Number.isFinite(x) ? 1 : 0)), n_raw: sums.count.map((c) => (c ? 1 : 0)),
    lo: missing, hi: missing, raw_lo: missing, raw_hi: missing, pooled_lo: missing, pooled_hi: missing,
  };
}
