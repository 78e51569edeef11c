// Effects: one card per panel, with its selectors, heat map, read-out, strongest sites and numbers.

/** @type {Object<string, string[]>} */
const INTERVALS = { effect: ["lo", "hi"], pooled: ["pooled_lo", "pooled_hi"], raw: ["raw_lo", "raw_hi"] };
/** @type {Object<string, string>} */
const AXIS_TITLES = { layer: "layer", head: "head", position: "token", role: "part of the prompt", all: "" };
/** @type {Object<string, string>} */
const ACROSS = { head: "layer × head", position: "layer × token", role: "layer × part of the prompt", all: "by layer" };
/** @type {Object<string, string>} */
const MODES = { denoise: "denoising", noise: "noising" };
const LISTED = 12;

/**
 * @typedef {object} View  what a card shows right now
 * @property {Panel} panel
 * @property {Variant} variant
 * @property {string} value
 * @property {number} slice
 * @property {string} example  "" = the mean over examples
 * @property {Axis} columns
 * @property {Cells} cells
 */

/**
 * @param {View} view
 * @param {string} name
 */
function sliceOf(view, name) {
  const size = view.panel.rows.values.length * view.columns.values.length;
  return view.cells[name].slice(view.slice * size, (view.slice + 1) * size);
}

/**
 * How a cell is called: `L9H6`, or layer, position and token (a word may occur twice).
 * @param {View} view
 * @param {number} cell
 */
function siteName(view, cell) {
  const [r, c] = [Math.floor(cell / view.columns.values.length), cell % view.columns.values.length];
  const layer = view.panel.rows.values[r] === null ? "" : `L${view.panel.rows.values[r]}`;
  const { kind } = view.columns;
  if (kind === "head") return `${layer}H${view.columns.values[c]}`;
  const label = view.columns.labels[c];
  const place = kind === "position" ? `@${view.columns.values[c]}` : "";
  return [layer, place, kind === "all" || place === `@${label}` ? "" : label].filter(Boolean).join(" ") || view.panel.component;
}

/**
 * The full address, as Site.parse reads it: `resid_pre.L3@12`. None for a mean over the tokens of a span:
 * an address with the span's name is something else, all its tokens at once.
 * @param {View} view
 * @param {number} cell
 */
function siteAddress(view, cell) {
  const { panel, columns } = view;
  if (panel.averages_positions && columns.kind === "role") return "";
  const [r, c] = [Math.floor(cell / columns.values.length), cell % columns.values.length];
  /** @type {Object<string, any>} */
  const at = { [panel.rows.kind]: panel.rows.values[r], [columns.kind]: columns.values[c] };
  if (panel.slices) at[panel.slices.kind] = panel.slices.values[view.slice];
  const layer = at.layer === null ? "" : `.L${at.layer}` + (at.head === undefined ? "" : `H${at.head}`);
  const where = at.position ?? at.role;
  return panel.component + layer + (where === undefined || where === "" ? "" : `@${where}`);
}

/** @param {View} view */
function metricOf(view) {
  return view.variant.metric + (view.variant.unit ? ` (${view.variant.unit})` : "");
}

/** @param {View} view */
function valueName(view) {
  return { effect: "recovery", pooled: "recovery (ratio of means)", raw: `change of ${metricOf(view)}` }[view.value] ?? "";
}

/**
 * What red and blue mean; half of reading a map right is knowing its sign.
 * @param {View} view
 * @returns {[string, string]}
 */
function endsOf(view) {
  if (view.value === "raw") return [`lowers ${view.variant.metric}`, `raises ${view.variant.metric}`];
  return view.variant.mode === "denoise"
    ? ["away from the clean answer", "towards the clean answer (1 = all of it)"]
    : ["away from the corrupt answer", "towards the corrupt answer (1 = all the way): the site is needed"];
}

/**
 * Symmetric colour limit. All means of a panel share it, so that variants can be compared; a single
 * example may exceed it, and its few extremes (small clean–corrupt gaps) then saturate.
 * @param {View} view
 */
function limitOf(view) {
  const alike = view.panel.variants.filter((v) => view.value !== "raw" || v.metric === view.variant.metric);
  const sizes = (/** @type {(number|null)[]} */ values) => values.map((x) => Math.abs(x ?? 0));
  const mean = Math.max(...alike.map((v) => sizes(v.cells[view.value]).reduce((a, b) => Math.max(a, b), 0)));
  if (view.example === "") return roundUp(mean);
  const own = sizes(sliceOf(view, view.value)).sort((a, b) => a - b);
  return roundUp(Math.max(mean, own[Math.floor(0.98 * (own.length - 1))]));
}

/**
 * @param {EffectsResult} result
 * @param {Panel} panel
 * @param {string} id
 */
function effectsCard(result, panel, id) {
  const first = panel.variants[0];
  /** @type {View} */
  const view = { panel, variant: first, value: first.value, slice: 0, example: "", columns: panel.columns, cells: first.cells };
  const card = el("article", { class: "card", id });
  const kind = el("p", { class: "kind" });
  const body = el("div", {});
  let turn = 0;
  const update = async () => {
    const mine = ++turn;
    const shown = view.example === "" ? { columns: panel.columns, cells: view.variant.cells }
      : await exampleCells(result, panel, view.variant, Number(view.example));
    if (mine !== turn) return; // something else was chosen while the table was being opened
    Object.assign(view, shown);
    if (sliceOf(view, view.value).every((x) => x === null)) view.value = "raw";
    kind.replaceChildren(el("code", {}, panel.component), ` ${ACROSS[view.columns.kind]}: ${view.variant.intervention}, ${MODES[view.variant.mode] ?? view.variant.mode}`);
    keepFocus(body, () => body.replaceChildren(effectsControls(result, view, update), ...effectsBody(view)));
  };
  card.append(el("header", {}, el("h3", {}, capital(panel.words)), kind), body);
  update().catch((error) => body.replaceChildren(el("p", { class: "caution" }, `This panel could not be drawn: ${error}`)));
  return card;
}

/** @param {string} text */
function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/**
 * @param {EffectsResult} result
 * @param {View} view
 * @param {() => Promise<void>} update
 */
function effectsControls(result, view, update) {
  const { panel, variant } = view;
  const box = el("div", { class: "controls" });
  const keys = /** @type {("intervention"|"mode"|"metric")[]} */ (["intervention", "mode", "metric"]);
  for (const key of keys) {
    const values = [...new Set(panel.variants.map((v) => v[key]))];
    const pick = (/** @type {string} */ value) => {
      // Not every combination was measured: keep as many of the other choices as possible.
      const kept = (/** @type {Variant} */ v) => keys.filter((k) => v[k] === variant[k]).length;
      view.variant = panel.variants.filter((v) => v[key] === value).sort((a, b) => kept(b) - kept(a))[0];
      view.value = view.value === "effect" ? view.variant.value : view.value;
      update();
    };
    box.append(...some(chooser(key, values.map((v) => ({ value: v, text: MODES[v] ?? v })), variant[key], pick)));
  }
  const values = ["effect", "pooled", "raw"].filter((name) => variant.cells[name].some((x) => x !== null));
  const texts = /** @type {Object<string, string>} */ ({ effect: "recovery, mean", pooled: "recovery, ratio of means", raw: `raw change (${variant.metric})` });
  box.append(...some(chooser("value", values.map((v) => ({ value: v, text: texts[v] })), view.value, (v) => { view.value = v; update(); })));
  if (panel.slices) {
    const options = panel.slices.labels.map((text, i) => ({ value: String(i), text }));
    box.append(...some(chooser(AXIS_TITLES[panel.slices.kind], options, String(view.slice), (v) => { view.slice = Number(v); update(); })));
  }
  const examples = result.examples.map((e) => ({ value: String(e.id), text: `example ${e.id}${e.text ? ": " + e.text : ""}` }));
  if (examples.length > 1 || panel.columns.kind === "role") {
    const all = { value: "", text: `mean of ${variant.n} example${variant.n === 1 ? "" : "s"}` };
    box.append(...some(chooser("show", [all, ...examples], view.example, (v) => { view.example = v; update(); })));
  }
  return box;
}

/**
 * @template T
 * @param {T|null} x
 */
function some(x) {
  return x === null ? [] : [x];
}

/**
 * Map and legend on the left; read-out and strongest sites on the right; the numbers below.
 * @param {View} view
 */
function effectsBody(view) {
  const values = sliceOf(view, view.value);
  const limit = limitOf(view);
  const readout = effectsReadout(view);
  const order = values.map((_, i) => i).filter((i) => values[i] !== null)
    .sort((a, b) => Math.abs(values[b] ?? 0) - Math.abs(values[a] ?? 0));
  const map = heatmap({
    rows: view.panel.rows, columns: view.columns, values, map: "diverging",
    rowTitle: "layer", columnTitle: AXIS_TITLES[view.columns.kind],
    title: `${valueName(view)} of ${view.panel.words}`,
    place: (x) => 0.5 + x / (2 * limit),
    visit: (cell, how) => readout.show(cell, how === "choose"),
  });
  const choose = (/** @type {number} */ cell) => { map.mark(cell); readout.show(cell, true); };
  map.mark(order[0] ?? 0);
  readout.show(order[0] ?? 0, false);
  const ticks = [-1, -0.5, 0, 0.5, 1].map((t) => ({ at: 0.5 + t / 2, label: format(t * limit).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") }));
  const most = Math.abs(values[order[0]] ?? 0);
  const clipped = most > limit * 1.0001 ? `; colours saturate, the largest value here is ${format(most)}` : "";
  const spread = view.example === "" ? view.variant.spread : `Example ${view.example} alone, so there are no intervals.`;
  const merged = view.panel.averages_positions && view.columns.kind === "role"
    ? " The prompts differ in wording: each part of the prompt is the mean over its tokens, changed one at a time; choose an example to see its tokens." : "";
  return [
    el("p", { class: "how" }, `${view.variant.scale} ${spread}${merged}`),
    ...(view.variant.caution ? [el("p", { class: "caution" }, view.variant.caution)] : []),
    el("div", { class: "columns" },
      el("div", { class: "figure" }, map.node, legend("diverging", ticks, valueName(view) + clipped, endsOf(view))),
      el("div", { class: "side" }, readout.node, strongest(view, order.slice(0, LISTED), choose))),
    dataTable(`All ${order.length} numbers`, () => effectsTable(view, order)),
  ];
}

/**
 * The numbers of one cell. The table follows the pointer; chosen cells are also spoken.
 * @param {View} view
 */
function effectsReadout(view) {
  const title = el("p", { class: "site" });
  const rows = el("tbody", {});
  const spoken = el("p", { class: "spoken", "aria-live": "polite" });
  const node = el("div", { class: "readout" }, title,
    el("table", {}, el("thead", {}, el("tr", {}, ...["", view.example === "" ? "mean" : "value", "95% interval"].map((t) => el("th", { scope: "col" }, t)))), rows), spoken);
  const show = (/** @type {number} */ cell, /** @type {boolean} */ speak) => {
    const at = (/** @type {string} */ name) => sliceOf(view, name)[cell];
    title.replaceChildren(el("strong", {}, siteName(view, cell)), " ", el("code", {}, siteAddress(view, cell)),
      el("span", { class: "n" }, `n = ${at("n")}`));
    const lines = { effect: "recovery, mean", pooled: "recovery, ratio of means", raw: `raw change of ${metricOf(view)}` };
    rows.replaceChildren(...Object.entries(lines).map(([name, text]) => el("tr", { class: name === view.value ? "shown" : "" },
      el("th", { scope: "row" }, text), el("td", {}, format(at(name), true)),
      el("td", {}, formatInterval(...(/** @type {[number, number]} */ (INTERVALS[name].map(at))))))));
    const [lo, hi] = INTERVALS[view.value].map(at);
    if (speak) {
      spoken.textContent = `${siteName(view, cell)}: ${valueName(view)} ${format(at(view.value), true)}, `
        + `95% interval ${formatInterval(lo, hi)}, n = ${at("n")}, raw change ${format(at("raw"), true)}`;
    }
  };
  return { node, show };
}

/**
 * The strongest sites, with intervals on a common scale.
 * @param {View} view
 * @param {number[]} cells
 * @param {(cell: number) => void} choose
 */
function strongest(view, cells, choose) {
  const [mean, lo, hi] = [view.value, ...INTERVALS[view.value]].map((name) => sliceOf(view, name));
  const ends = cells.flatMap((i) => [mean[i], lo[i], hi[i]]).filter((x) => x !== null);
  const [from, to] = [Math.min(0, .../** @type {number[]} */ (ends)), Math.max(0, .../** @type {number[]} */ (ends))];
  const items = cells.map((i) => el("li", {}, el("button", { type: "button", onclick: () => choose(i) },
    el("span", { class: "name", title: siteName(view, i) }, siteName(view, i)),
    intervalBar(/** @type {number} */ (mean[i]), lo[i], hi[i], from, to),
    el("span", { class: "number" }, format(mean[i], true)),
    el("span", { class: "interval" }, lo[i] === null ? "" : formatInterval(lo[i], hi[i])))));
  return el("section", { class: "strongest" }, el("h4", {}, "Strongest sites"), el("ol", {}, ...items));
}

/**
 * @param {number} mean
 * @param {number|null} lo
 * @param {number|null} hi
 * @param {number} from
 * @param {number} to
 */
function intervalBar(mean, lo, hi, from, to) {
  const [W, H] = [150, 16];
  const x = (/** @type {number} */ v) => 4 + ((v - from) / (to - from || 1)) * (W - 8);
  const bar = svg("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, class: "interval-bar", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: H, class: "zero" }));
  const rect = svg("rect", { x: Math.min(x(0), x(mean)), y: 4, width: Math.abs(x(mean) - x(0)), height: H - 8, class: "swatch" });
  paint(rect, "diverging", mean < 0 ? 0.2 : 0.8);
  bar.append(rect);
  if (lo !== null && hi !== null) {
    bar.append(svg("line", { x1: x(lo), x2: x(hi), y1: H / 2, y2: H / 2, class: "whisker" }));
    for (const end of [lo, hi]) bar.append(svg("line", { x1: x(end), x2: x(end), y1: 4, y2: H - 4, class: "whisker" }));
  }
  return bar;
}

/**
 * @param {View} view
 * @param {number[]} order
 */
function effectsTable(view, order) {
  const names = ["effect", "lo", "hi", "pooled", "pooled_lo", "pooled_hi", "raw", "raw_lo", "raw_hi", "n"];
  const columns = names.map((name) => sliceOf(view, name));
  const exact = (/** @type {number|null} */ x) => (x === null ? "" : String(Number(x.toPrecision(6))));
  return {
    head: ["site", "address", ...names],
    rows: order.map((i) => [siteName(view, i), siteAddress(view, i), ...columns.map((values) => exact(values[i]))]),
  };
}
