// Export: drawings as PNG and SVG, files, the clipboard.

import { el } from "./dom.js";
import { say } from "./state.js";

const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "fill-opacity", "opacity",
  "font-family", "font-size", "font-weight", "text-anchor", "dominant-baseline", "image-rendering"];

/**
 * A drawing as a standalone file: the styles of the style sheet are written into it.
 * @param {SVGElement} drawing
 * @returns {string}
 */
function standalone(drawing) {
  const copy = /** @type {SVGElement} */ (drawing.cloneNode(true));
  const [nodes, copies] = [drawing, copy].map((node) => [node, ...node.querySelectorAll("*")]);
  nodes.forEach((node, i) => {
    const style = getComputedStyle(node);
    const target = copies[i];
    target.removeAttribute("style");
    for (const name of STYLES) target.setAttribute(name, style.getPropertyValue(name));
  });
  const { width, height } = drawing.getBoundingClientRect();
  copy.setAttribute("width", String(drawing.getAttribute("width") ?? width));
  copy.setAttribute("height", String(drawing.getAttribute("height") ?? height));
  const [x, y, w, h] = (drawing.getAttribute("viewBox") ?? `0 0 ${width} ${height}`).split(/\s+/);
  const paper = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [k, v] of Object.entries({ x, y, width: w, height: h, fill: getComputedStyle(document.body).backgroundColor })) paper.setAttribute(k, v);
  copy.prepend(paper);
  return new XMLSerializer().serializeToString(copy);
}

/**
 * Save a file.
 * @param {string} name
 * @param {Blob} content
 */
export function download(name, content) {
  const link = /** @type {HTMLAnchorElement} */ (el("a", { href: URL.createObjectURL(content), download: name }));
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`${name} saved`);
}

/**
 * Save a value as a JSON file.
 * @param {string} name
 * @param {any} value
 */
export function saveJson(name, value) {
  download(name, new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
}

/**
 * Save a drawing as PNG at twice its size.
 * @param {SVGElement} drawing
 * @param {string} name
 */
async function savePng(drawing, name) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(drawing))}`;
  await image.decode();
  const scale = 2;
  const canvas = new OffscreenCanvas(image.width * scale, image.height * scale);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(scale, scale);
  context.drawImage(image, 0, 0);
  download(`${name}.png`, await canvas.convertToBlob({ type: "image/png" }));
}

/**
 * Buttons that save a drawing as PNG and SVG.
 * @param {() => SVGElement|null} drawing
 * @param {string} name
 */
export function savers(drawing, name) {
  const file = name.replace(/[^\w.-]+/g, "-").replace(/^-|-$/g, "") || "figure";
  const act = (/** @type {(d: SVGElement) => void} */ save) => () => {
    const current = drawing();
    if (current) save(current);
  };
  return el("span", { class: "savers" },
    el("button", { type: "button", class: "plain-button", "aria-label": `Save ${name} as PNG`, onclick: act((d) => savePng(d, file)) }, "PNG"),
    el("button", { type: "button", class: "plain-button", "aria-label": `Save ${name} as SVG`,
      onclick: act((d) => download(`${file}.svg`, new Blob([standalone(d)], { type: "image/svg+xml" }))) }, "SVG"));
}

/**
 * Copy a text to the clipboard.
 * @param {string} text
 * @param {string} what  name of the text, for the announcement
 */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = /** @type {HTMLTextAreaElement} */ (el("textarea", { class: "spoken", "aria-label": what }));
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`${what} copied: ${text}`);
}
