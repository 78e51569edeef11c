// The page: header, sections in order, provenance.

/**
 * @param {any} result
 * @param {number} number
 */
function section(result, number) {
  const id = `result-${number}`;
  if (result.kind === "prose") return el("section", { class: "prose" }, ...heading(result), ...paragraphs(result.text));
  const cards = result.kind === "effects"
    ? result.panels.map((/** @type {Panel} */ panel, /** @type {number} */ i) => effectsCard(result, panel, `${id}-${i}`))
    : [attentionCard(result, `${id}-0`)];
  return el("section", { id }, ...heading(result), ...cards);
}

/** @param {{name: string|null}} result */
function heading(result) {
  return result.name ? [el("h2", {}, result.name)] : [];
}

/** @param {string|null} text */
function paragraphs(text) {
  return (text ?? "").split(/\n\s*\n/).filter((t) => t.trim()).map((t) => el("p", {}, t.trim()));
}

/** @param {any} result */
function resultName(result) {
  if (result.name) return result.name;
  return result.kind === "effects" ? `effects of ${result.panels.map((/** @type {Panel} */ p) => p.component).join(", ")}` : "attention";
}

/**
 * A provenance value as text; what is long is folded.
 * @param {any} value
 * @returns {Node}
 */
function provenanceValue(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 1);
  if (text.length < 240) return el("span", { class: "value" }, typeof value === "string" ? text : text.replace(/\s*\n\s*/g, " "));
  const size = Array.isArray(value) ? `${value.length} items` : `${text.length} characters`;
  return el("details", {}, el("summary", {}, size), el("pre", {}, text));
}

/**
 * Every key of every result: once if all agree, else one line for each result.
 * @param {any[]} results
 */
function provenance(results) {
  const keys = [...new Set(results.flatMap((r) => Object.keys(r.provenance)))];
  const rows = keys.flatMap((key) => {
    const having = results.filter((r) => key in r.provenance);
    const same = new Set(having.map((r) => JSON.stringify(r.provenance[key]))).size === 1;
    const about = (/** @type {any} */ r) => (same ? (having.length === results.length ? "" : having.map(resultName).join("; ")) : resultName(r));
    return (same ? having.slice(0, 1) : having).map((r, i) => el("tr", {},
      el("th", { scope: "row" }, i === 0 ? key : ""), el("td", {}, about(r)), el("td", {}, provenanceValue(r.provenance[key]))));
  });
  const backends = results.filter((r) => r.kind === "attention" && Object.keys(r.backends).length);
  for (const r of backends) {
    const used = [...new Set(Object.values(r.backends))].map((name) => {
      const layers = Object.keys(r.backends).filter((layer) => r.backends[layer] === name);
      return `${name}: ${layers.length === r.layers ? "every layer" : "layers " + layers.join(", ")}`;
    });
    rows.push(el("tr", {}, el("th", { scope: "row" }, "attention backend"), el("td", {}, resultName(r)), el("td", {}, used.join("; "))));
  }
  return el("footer", { id: "provenance" }, el("h2", {}, "Provenance"),
    el("p", { class: "how" }, "What made these numbers. The page carries them in full: interp.Report.read(path) gives the tables back."),
    rows.length ? el("div", { class: "scroll" }, el("table", { class: "provenance" },
      el("thead", {}, el("tr", {}, ...["key", "result", "value"].map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, ...rows)))
      : el("p", {}, "These results carry no provenance."));
}

/** @param {any[]} results */
function contents(results) {
  const entries = results.flatMap((r, i) => {
    if (r.kind === "attention") return [{ id: `result-${i}-0`, text: r.name ?? "Attention" }];
    if (r.kind !== "effects") return [];
    return r.panels.map((/** @type {Panel} */ p, /** @type {number} */ j) => ({ id: `result-${i}-${j}`,
      text: [r.name, p.component].filter(Boolean).join(": ") + (p.columns.kind === "all" ? "" : ` by ${AXIS_TITLES[p.columns.kind]}`)
      + (r.name ? "" : ` (${[...new Set(p.variants.map((v) => v.intervention))].join(", ")})`) }));
  });
  if (entries.length < 3) return null;
  return el("nav", { "aria-label": "On this page" }, ...entries.map((e) => el("a", { href: `#${e.id}` }, e.text)),
    el("a", { href: "#provenance" }, "Provenance"));
}

function start() {
  const main = /** @type {HTMLElement} */ (document.getElementById("page"));
  const data = JSON.parse(document.getElementById("interp-report")?.textContent ?? "");
  palettes = data.colors;
  const results = data.results.filter((/** @type {any} */ r) => r.kind !== "prose");
  const facts = ["model", "task", "created"].map((key) => results.map((/** @type {any} */ r) => r.provenance[key])
    .find((/** @type {any} */ v) => typeof v === "string")).filter((text) => text && !data.title.includes(text));
  main.replaceChildren(
    el("header", { class: "top" }, el("h1", {}, data.title), facts.length ? el("p", { class: "facts" }, facts.join(" · ")) : null,
      ...paragraphs(data.notes), contents(data.results)),
    ...data.results.map(section),
    provenance(results));
}

start();
