// The view of an effects card, and its names: axes, sites, values, and the meaning of red and blue.

/** @typedef {import("./data.js").Panel} Panel */
/** @typedef {import("./data.js").Variant} Variant */
/** @typedef {import("./data.js").Axis} Axis */
/** @typedef {import("./data.js").Cells} Cells */

/** @type {Object<string, string[]>} */
export const INTERVALS = { effect: ["lo", "hi"], pooled: ["pooled_lo", "pooled_hi"], raw: ["raw_lo", "raw_hi"] };
/** @type {Object<string, string>}  the column that counts the examples of a value */
export const COUNTS = { effect: "n", pooled: "n_raw", raw: "n_raw" };
/** @type {Object<string, string>} */
const AXIS_TITLES = { layer: "layer", head: "head", position: "token", role: "part of the prompt", all: "", sender: "sender",
  receiver: "receiver" };
/** @type {Object<string, string>} */
export const MODES = { denoise: "denoising", noise: "noising" };

/**
 * @typedef {object} View  what a card shows now
 * @property {Panel} panel
 * @property {Variant} variant
 * @property {string} value  "effect", "pooled" or "raw"
 * @property {number} slice  index of the third axis
 * @property {string} example  "": the mean over examples
 * @property {Axis} columns
 * @property {Cells} cells
 */

/**
 * The cells of one column of the summary that the card shows.
 * @param {View} view
 * @param {string} name
 */
export function sliceOf(view, name) {
  const size = view.panel.rows.values.length * view.columns.values.length;
  return view.cells[name].slice(view.slice * size, (view.slice + 1) * size);
}

/**
 * The unit of the table's column `head`: neurons of mlp_post, heads of other components.
 * @param {Panel} panel
 */
function unitOf(panel) {
  return panel.component === "mlp_post" ? { word: "neuron", letter: "N" } : { word: "head", letter: "H" };
}

/**
 * The title of an axis.
 * @param {Panel} panel
 * @param {string} kind
 */
export function axisTitle(panel, kind) {
  return kind === "head" ? unitOf(panel).word : AXIS_TITLES[kind];
}

/**
 * The name of a head: `L9H6`.
 * @param {number} layer
 * @param {number} head
 */
export function headName(layer, head) {
  return `L${layer}H${head}`;
}

/**
 * Layer and head of a head's name.
 * @param {string} name
 * @returns {[number, number]}
 */
export function headNumbers(name) {
  const [, layer, head] = /^L(\d+)H(\d+)$/.exec(name) ?? ["", "0", "0"];
  return [Number(layer), Number(head)];
}

/**
 * The name of a cell: `L9H6`, or layer, position and token (a token may occur twice).
 * @param {View} view
 * @param {number} cell
 */
export function siteName(view, cell) {
  const [r, c] = [Math.floor(cell / view.columns.values.length), cell % view.columns.values.length];
  if (view.columns.kind === "receiver") return `${view.panel.rows.labels[r]} → ${view.columns.labels[c]}`;
  const layer = view.panel.rows.values[r] === null ? "" : `L${view.panel.rows.values[r]}`;
  const { kind } = view.columns;
  if (kind === "head") return `${layer}${unitOf(view.panel).letter}${view.columns.values[c]}`;
  const label = view.columns.labels[c];
  const place = kind === "position" ? `@${view.columns.values[c]}` : "";
  return [layer, place, kind === "all" || place === `@${label}` ? "" : label].filter(Boolean).join(" ") || view.panel.component;
}

/**
 * The address that Site.parse reads: `resid_pre.L3@12`. A mean over the tokens of a span has none, because the address of
 * a span means all its tokens at once.
 * @param {View} view
 * @param {number} cell
 */
export function siteAddress(view, cell) {
  const { panel, columns } = view;
  if (!panel.is_site && !panel.edge) return "";  // the name of an edit
  if (panel.averages_positions && columns.kind === "role") return "";
  const [r, c] = [Math.floor(cell / columns.values.length), cell % columns.values.length];
  if (panel.edge) {
    const sender = panel.edge.receiver ? `z.L${panel.rows.values[r]}H${columns.values[c]}` : panel.rows.values[r];
    return `${sender} → ${panel.edge.receiver || columns.values[c]}`;
  }
  /** @type {Object<string, any>} */
  const at = { [panel.rows.kind]: panel.rows.values[r], [columns.kind]: columns.values[c] };
  if (panel.slices) at[panel.slices.kind] = panel.slices.values[view.slice];
  const layer = at.layer === null ? "" : `.L${at.layer}` + (at.head === undefined ? "" : `${unitOf(panel).letter}${at.head}`);
  const where = at.position ?? at.role;
  return panel.component + layer + (where === undefined || where === "" ? "" : `@${where}`);
}

/** Where the metric is read, in words; empty for the last position. @param {{read_at: string}} variant */
export function readAt(variant) {
  return variant.read_at ? `read at ${variant.read_at}` : "";
}

/** Whether every effect is 0, as where nothing reaches the position that is read. @param {Variant} variant */
export function isZero(variant) {
  return variant.cells.raw.every((x) => !x);
}

/** The metric, where it is read, and its unit. @param {View} view */
export function metricOf(view) {
  return [view.variant.metric, readAt(view.variant)].filter(Boolean).join(" ") + (view.variant.unit ? ` (${view.variant.unit})` : "");
}

/** The name of the value that the card shows. @param {View} view */
export function valueName(view) {
  return { effect: "recovery", pooled: "recovery (ratio of means)", raw: `change of ${metricOf(view)}` }[view.value] ?? "";
}

/**
 * The meaning of the two ends of the colours, blue and red.
 * @param {View} view
 * @returns {[string, string]}
 */
export function endsOf(view) {
  if (view.value === "raw") return [`lowers ${view.variant.metric}`, `raises ${view.variant.metric}`];
  return view.variant.mode === "denoise"
    ? ["away from the clean answer", "towards the clean answer (1 = all of it)"]
    : ["away from the corrupt answer", "towards the corrupt answer (1 = all of it): the site is needed"];
}
