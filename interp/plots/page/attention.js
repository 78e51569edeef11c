// The attention of selected heads: three levels of detail, two runs and their difference, linked to the prompt below.

import { legend } from "./colors.js";
import { open } from "./data.js";
import { button, chooser, el, format, keepFocus, some, switcher, tick } from "./dom.js";
import { savers } from "./export.js";
import { figure, isCausal, largest, SCALES, scaleTicks, toned } from "./figure.js";
import { binOf, marginal, rowOf, runOf, squareOf } from "./patterns.js";
import { rowFigure, strongestKeys } from "./rows.js";
import { on, say, set, state, togglePin } from "./state.js";
import { tokenStrip } from "./strip.js";

/** @typedef {import("./data.js").PatternResult} PatternResult */
/** @typedef {import("./data.js").PatternExample} PatternExample */
/** @typedef {import("./patterns.js").Row} Row */
/** @typedef {import("./patterns.js").Square} Square */

const DRAWN = 4; // heads side by side
const NAMED = 44; // axes show tokens or segments up to this number

/**
 * The view of attention patterns.
 * @param {PatternResult} result
 * @param {() => string} strongest  the head to show if none is selected
 */
export function attentionView(result, strongest) {
  const box = el("section", { class: "attention", id: "attention", "aria-label": "Attention of the selected heads" });
  const controls = el("div", {});
  const explanation = el("p", { class: "how" });
  const figures = el("div", { class: "figures" });
  const beside = el("div", { class: "beside" });
  const legends = el("div", {});
  const rowBox = el("div", {});
  const line = el("p", { class: "readout line", id: "reads" });
  const strips = el("div", {});
  /** @type {{head: string, cross: (line: number|null, pinned: boolean) => void}[]} */
  let drawn = [];
  /** @type {ReturnType<typeof tokenStrip>|null} */
  let strip = null;
  /** @type {ArrayLike<number>} */
  let edges = [0, 1];
  /** @type {number|null} */
  let hovered = null;
  let latest = 0;

  const example = () => result.examples[Math.min(state.ex, result.examples.length - 1)];
  const selectedHeads = () => {
    const heads = (state.heads.length ? state.heads : [strongest()]).filter((h) => result.names.includes(h));
    return heads.length || state.heads.length ? heads : result.names.slice(0, 1);
  };
  const run = () => (example().runs.corrupt ? state.run : "clean");
  const labels = () => runOf(example(), run()).labels;
  const query = () => Math.min(hovered ?? state.q ?? example().tokens - 1, example().tokens - 1);
  const lineOf = (/** @type {number} */ token) => (state.zoom === "blocks" ? example().segments.findIndex(([, a, b]) => token >= a && token < b)
    : Math.floor(binOf(edges, token) / Math.ceil((edges.length - 1) / squareSize)));
  let squareSize = 1;

  /** Redraw everything: after a change of head, prompt, run, zoom, scale or theme. */
  const draw = async () => {
    const mine = ++latest;
    const heads = selectedHeads().slice(0, DRAWN);
    const e = example();
    const newEdges = await open(e.edges);
    const numbers = heads.map((h) => result.names.indexOf(h));
    const squares = state.zoom === "rows" ? [] : await Promise.all(numbers.map((h) => squareOf(e, h, run(), state.zoom)));
    const sides = run() === "difference" || state.zoom !== "map" ? [] : await Promise.all(numbers.map((h) => Promise.all(
      [runOf(e, run()).received, runOf(e, run()).entropy].map((m) => marginal(m, h, newEdges.length - 1)))));
    if (mine !== latest) return; // the reader selected something else meanwhile
    edges = newEdges;
    keepFocus(controls, () => controls.replaceChildren(patternControls(result, example(), run())));
    explanation.textContent = explain(heads);
    const signed = run() === "difference";
    const top = squares.reduce((a, s) => Math.max(a, largest(s, state.mute)), 0) || 1;
    squareSize = squares[0]?.size ?? newEdges.length - 1;
    drawn = [];
    if (state.zoom !== "rows") keepFocus(figures, () => figures.replaceChildren(...squares.map((square, i) => headFigure(heads[i], square, sides[i], signed, top)),
      ...(squares.length ? [beside] : [])));
    legends.replaceChildren(...(squares.length ? [legend(signed ? "diverging" : "sequential", scaleTicks(top, state.scale, signed), `${signed ? "clean − corrupt" : "attention weight"}, colour by ${signed ? "p" : SCALES[state.scale]}`, null)] : []));
    beside.replaceChildren(legends, rowBox);
    if (!heads.length) figures.replaceChildren(el("p", { class: "caution" }, `This page contains no attention patterns of ${state.heads.join(", ")}. It contains ${result.names.length} heads: ${result.names.slice(0, 12).join(", ")}${result.names.length > 12 ? ", …" : ""}`));
    drawTokens(e);
    await follow();
  };
  const explain = (/** @type {string[]} */ heads) => {
    const all = selectedHeads().length;
    const detail = {
      map: describeMap(result, example(), run(), edges.length - 1),
      blocks: "Share of the attention of each query segment that each key segment receives; rows sum to 1.",
      rows: "One query at a time. Point at a token below, or click it to pin it.",
    }[state.zoom];
    return [detail, all > heads.length ? `${heads.length} of ${all} selected heads are drawn.` : "",
      state.mute ? "The first token’s column is grey and does not set the scale; other weights are unchanged." : "",
      result.examples.length < result.n ? `This page contains ${result.examples.length} of ${result.n} prompts.` : ""].filter(Boolean).join(" ");
  };
  const headFigure = (/** @type {string} */ head, /** @type {Square} */ square, /** @type {Float32Array[]|undefined} */ sides, /** @type {boolean} */ signed, /** @type {number} */ top) => {
    const e = example();
    const blocks = state.zoom === "blocks";
    const names = blocks ? e.segments.map(([name, a, b]) => name || labels().slice(a, b).join("").slice(0, 14)) : e.tokens <= NAMED && square.size === e.tokens ? labels() : null;
    const made = figure({ name: head, square, signed, top, scale: signed ? "linear" : state.scale, mute: state.mute, causal: isCausal(square), side: blocks || names ? 330 : 384,
      labels: names && names.length <= NAMED ? names : null, last: blocks ? e.segments.length - 1 : e.tokens - 1, received: sides?.[0] ?? null, entropy: sides?.[1] ?? null,
      visit: (lineNumber, column, how) => visitMap(head, square, lineNumber, column, how) });
    drawn.push({ head, cross: made.cross });
    return el("figure", { class: "pattern-figure" }, el("figcaption", {}, el("strong", {}, head), " ", savers(() => made.drawing, `${head} attention ${run()}`),
      button(state.pins.includes(`${head}@${query()}`) ? "pinned" : "pin view", () => { togglePin(`${head}@${query()}`); set({ q: query() }); }, { class: "plain-button pin" })), made.node);
  };
  const visitMap = (/** @type {string} */ head, /** @type {Square} */ square, /** @type {number} */ at, /** @type {number} */ column, /** @type {string} */ how) => {
    const e = example();
    if (how === "step") {
      set({ q: Math.min(Math.max(query() + at, 0), e.tokens - 1) });
      strip?.reveal(query());
      return;
    }
    const by = Math.ceil((edges.length - 1) / square.size);
    const token = state.zoom === "blocks" ? e.segments[at][2] - 1 : edges[Math.min((at + 1) * by, edges.length - 1)] - 1;
    if (how === "choose") set({ q: token });
    hovered = how === "hover" ? token : null;
    follow(`${head}: ${describeCell(square, at, column)}`);
    if (how === "choose") strip?.reveal(token);
  };
  const describeCell = (/** @type {Square} */ square, /** @type {number} */ r, /** @type {number} */ c) => {
    const by = Math.ceil((edges.length - 1) / square.size);
    const span = (/** @type {number} */ i) => {
      const [a, b] = [edges[i * by], edges[Math.min((i + 1) * by, edges.length - 1)] - 1];
      return a === b ? `${labels()[a]} @${a}` : `tokens ${a}–${b}`;
    };
    const name = (/** @type {number} */ i) => (state.zoom === "blocks" ? `segment ${example().segments[i][0] || i}` : span(i));
    return `${name(r)} → ${name(c)}: ${format(square.values[r * square.size + c], run() === "difference")}`;
  };

  /** Redraw what depends on the query: cross hair, tint, read-out, row. */
  const follow = async (/** @type {string} */ prefix = "") => {
    const mine = latest;
    const at = query();
    const e = example();
    const heads = selectedHeads().slice(0, DRAWN);
    for (const f of drawn) {
      f.cross(hovered === null ? null : lineOf(at), false);
      f.cross(state.q === null ? null : lineOf(Math.min(state.q, e.tokens - 1)), true);
    }
    if (!heads.length) return;
    const rows = await Promise.all((state.zoom === "rows" ? heads : heads.slice(0, 1)).map((h) => rowOf(result, e, result.names.indexOf(h), run(), at, edges)));
    if (mine !== latest || at !== query()) return;
    const signed = run() === "difference";
    const best = strongestKeys(rows[0], state.mute, 5);
    const top = Math.abs(best[0]?.[1] ?? 0) || 1;
    const tone = (/** @type {number} */ t) => {
      const w = rows[0].weights.get(t);
      if (w === undefined || (state.mute && t === 0)) return null;
      const x = toned(Math.min(Math.abs(w) / top, 1), signed ? "linear" : state.scale);
      return signed ? 0.5 + (Math.sign(w) * x) / 2 : x < 0.02 ? null : x;
    };
    strip?.show({ tone, signed, query: at, pinned: state.q });
    const keys = best.map(([k, w]) => [labels()[k], ` @${k} ${format(w, signed)}`]);
    line.replaceChildren(el("strong", {}, heads[0]), ` from `, el("bdi", { class: "key" }, labels()[at]), ` @${at} reads  `, ...(keys.length ? keys.flatMap(([label, weight], i) => [i ? ",  " : "", el("bdi", {}, label), weight]) : ["nothing"]), el("span", { class: "hint" }, ` (${rows[0].how})${prefix ? ` · ${prefix}` : ""}`));
    if (hovered === null && state.q !== null) say(`${heads[0]} from token ${at}, ${labels()[at]}, reads ${keys.map((k) => k.join("")).join(", ")}`);
    const made = rows.map((row, i) => rowFigure({ name: heads[i], row, query: at, labels: labels(), signed, scale: state.scale, mute: state.mute }));
    if (state.zoom !== "rows") rowBox.replaceChildren(el("p", { class: "caption" }, `${heads[0]} from `, el("bdi", { class: "key" }, labels()[at]), ` @${at}`), made[0].node);
    else figures.replaceChildren(...made.map((made, i) => {
      return el("figure", { class: "pattern-figure" }, el("figcaption", {}, el("strong", {}, heads[i]), " ", savers(() => made.drawing, `${heads[i]} query ${at}`)), made.node);
    }));
  };
  let stripKey = "";
  const drawTokens = (/** @type {PatternExample} */ e) => {
    const key = `${state.ex} ${run()}`;
    if (stripKey === key) return;
    stripKey = key;
    strip = tokenStrip({ label: "Tokens of the prompt: arrow keys move the query, Enter pins it", labels: labels(), segments: e.segments, visit: (token, how) => {
      hovered = how === "hover" ? token : null;
      if (how === "pin") set({ q: state.q === token ? null : token });
      follow();
    } });
    strips.replaceChildren(strip.node);
  };
  on("heads zoom run scale mute ex shown-theme", draw);
  on("q pins", () => follow());
  draw();
  box.append(el("h3", {}, "What the selected heads read"), controls, explanation, figures, line, strips,
    el("p", { class: "hint" }, "Point at a token to see what it reads; click to pin it. · is a space, ⏎ a line break; a dotted underline marks bytes of a character."));
  return box;
}

/**
 * The selectors of detail, run, scale and prompt.
 * @param {PatternResult} result
 * @param {PatternExample} example
 * @param {string} run
 */
function patternControls(result, example, run) {
  const prompts = result.examples.map((e, i) => ({ value: String(i),
    text: `prompt ${i}: ${e.runs.clean.labels.slice(0, 40).join("").replaceAll("\u00b7", " ").trim().slice(0, 56)}` }));
  const details = [{ value: "blocks", text: "segments" }, { value: "map", text: "map" }, { value: "rows", text: "one query" }];
  const runs = ["clean", "corrupt", "difference"].map((v) => ({ value: v, text: v }));
  const scales = Object.entries(SCALES).map(([value, text]) => ({ value, text }));
  return el("div", { class: "controls" },
    ...some(switcher("detail", details, state.zoom, (v) => set({ zoom: /** @type {any} */ (v) }))),
    ...(example.runs.corrupt ? some(switcher("run", runs, run, (v) => set({ run: /** @type {any} */ (v) }))) : []),
    ...(run === "difference" ? [] : some(switcher("colour by", scales, state.scale, (v) => set({ scale: /** @type {any} */ (v) })))),
    tick("mute the first token", state.mute, (mute) => set({ mute })),
    ...some(chooser("prompt", prompts, String(Math.min(state.ex, prompts.length - 1)), (v) => { set({ ex: Number(v), q: null }); })));
}

/**
 * What a map shows of the weights, and how exact it is.
 * @param {PatternResult} result
 * @param {PatternExample} example
 * @param {string} run
 * @param {number} bins
 */
function describeMap(result, example, run, bins) {
  const { tokens, coarse, levels } = example;
  const n = tokens.toLocaleString("en");
  const others = result.exact.length ? ` of heads other than ${result.exact.join(", ")}` : "";
  if (tokens <= bins && coarse === 1) {
    const reduced = levels < 256 ? `, and in ${levels} levels${others}, to keep the page small` : "";
    return `All ${n} × ${n} weights; √p is stored in 8 bits${reduced}.`;
  }
  if (tokens === bins) return `${n} × ${n} weights: each cell is the largest of ${coarse} × ${coarse} neighbours${others}, to keep the page small.`;
  const ratio = Math.ceil(tokens / bins);
  const reduced = coarse > 1 ? ` (of heads without exact rows ${ratio * coarse} × ${ratio * coarse}, to keep the page small)`
    : levels < 256 ? `, in ${levels} levels of √p for heads without exact rows (to keep the page small)` : "";
  const exact = result.exact.length && runOf(example, run).top.index.shape[2]
    ? `The view “one query” shows exact values: the largest weights of every query of ${result.exact.join(", ")}.`
    : "This page contains no exact rows of single queries.";
  return `${n} tokens in ${bins} bins: each cell is the largest of about ${ratio} × ${ratio} weights${reduced}. ${exact}`;
}
