"""How quickly a report page opens and follows its reader, in headless Chromium: medians, and the memory it takes.

    python experiments/page_speed.py report.html [--runs 5]

First paint is the browser's own first contentful paint; a head switch lasts from the click on a head in the list to
the frame in which its map stands. Raw numbers go to standard output as JSON. Needs a report with attention patterns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import sync_playwright

PAINT = """() => new Promise((done) => {
  const read = () => {
    const found = performance.getEntriesByName("first-contentful-paint")[0];
    if (found) done(found.startTime); else setTimeout(read, 10);
  };
  read();
})"""
SWITCH = """(head) => new Promise((done) => {
  const row = [...document.querySelectorAll(".head-list tr[data-head]")].find((r) => r.dataset.head === head);
  const began = performance.now();
  new MutationObserver((_, watcher) => {
    if (document.querySelector(".pattern-figure strong")?.textContent !== head) return;
    watcher.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
  }).observe(document.querySelector(".figures"), { childList: true, subtree: true });
  row.querySelector("button").click();
})"""


def main() -> None:
    """Measure one page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args()
    paints, switches, memory = [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(chosen.runs):
            page = browser.new_page(viewport={"width": 1280, "height": 1600})
            page.goto(chosen.page.resolve().as_uri())
            page.wait_for_selector(".pattern")
            paints.append(page.evaluate(PAINT))
            heads = page.eval_on_selector_all(".head-list tr[data-head]", "rows => rows.map((r) => r.dataset.head)")
            switches += [page.evaluate(SWITCH, head) for head in heads[1:7]]
            session = page.context.new_cdp_session(page)
            session.send("HeapProfiler.collectGarbage")
            session.send("Performance.enable")
            metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
            memory.append(metrics["JSHeapUsedSize"] / 2**20)
            page.close()
        browser.close()
    result = {
        "page_bytes": chosen.page.stat().st_size,
        "first_paint_ms": statistics.median(paints), "first_paint_ms_all": paints,
        "head_switch_ms": statistics.median(switches), "head_switch_ms_all": switches,
        "js_heap_mib": max(memory),
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
