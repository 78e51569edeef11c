"""How quickly a report page opens and follows its reader in headless Chromium, and the memory that its tab takes.

    python experiments/page_speed.py [report.html] [--rounds 5] [--json results/page_speed.json]

Without a report one is made first: every head of the embedded model on 8,192 tokens of this repository's
documentation, four of them exact (minutes; kept as runs/page-speed-8192.html, to be given next time). Each round is a
fresh browser, first with an empty page, then with the report: it is opened, heads are chosen one by one from the list,
the token strip is scrolled to its end, and every detail is shown. First paint is the browser's first contentful paint;
a head switch lasts from the click to the frame in which the map stands. Memory is that of the tab's renderer process,
as Linux counts it (/proc/PID): Pss, its share of every page it maps, and Uss, the pages that are its alone, the largest
of the readings taken along the way; and Rss at its peak, with all that it shares with the rest of the browser. Nothing
is collected by hand before a reading. A report needs attention patterns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
EXACT = ["L17H4", "L20H0", "L23H3", "L29H1"]
VISITED = 40  # heads chosen in turn: more than a reader looks at in one sitting
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
BUSY = "() => { const end = performance.now() + 400; while (performance.now() < end); }"


def renderer(browser: Browser, page: Page) -> int:
    """Process id of the page's renderer: the one that works while the page's script does."""
    session = browser.new_browser_cdp_session()

    def seconds() -> dict[int, float]:
        listed = session.send("SystemInfo.getProcessInfo")["processInfo"]
        return {p["id"]: p["cpuTime"] for p in listed if p["type"] == "renderer"}

    before = seconds()
    page.evaluate(BUSY)
    worked = {pid: time - before.get(pid, time) for pid, time in seconds().items()}
    session.detach()
    return max(worked, key=lambda pid: worked[pid])


def memory(pid: int) -> dict[str, float]:
    """Pss and Uss of a process, and its Rss at its peak, MiB."""
    kib: dict[str, int] = {}
    for file in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.endswith(" kB"):
                name, value, _ = line.split()
                kib[name.rstrip(":")] = int(value)
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"pss": kib["Pss"] / 1024, "uss": private / 1024, "peak_rss": kib["VmHWM"] / 1024}


def largest(readings: dict[str, dict[str, float]], kind: str) -> float:
    """The largest reading of one kind."""
    return max(r[kind] for r in readings.values())


def one_round(playwright: Any, report: Path) -> dict[str, Any]:
    """One fresh browser: an empty tab, then the report as a reader goes through it."""
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    try:
        empty = browser.new_page(viewport={"width": 1280, "height": 1600})
        empty.goto("data:text/html,<title>empty</title>")
        baseline = memory(renderer(browser, empty))
        empty.close()
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.goto(report.resolve().as_uri())
        page.wait_for_selector(".pattern")
        found: dict[str, Any] = {"first_paint_ms": page.evaluate(PAINT), "empty_tab_mib": baseline}
        pid = renderer(browser, page)
        readings = {"opened": memory(pid)}
        heads = page.eval_on_selector_all(".head-list tr[data-head]", "rows => rows.map((r) => r.dataset.head)")
        chosen = heads[1 :: max(1, len(heads) // VISITED)][:VISITED]
        found["head_switch_ms"] = [page.evaluate(SWITCH, head) for head in chosen[:10]]
        readings["ten heads"] = memory(pid)
        for head in chosen[10:]:
            page.evaluate(SWITCH, head)
        readings[f"{len(chosen)} heads"] = memory(pid)
        page.evaluate("document.querySelector('.strip-tokens').scrollTop = 1e6")
        for detail in ("segments", "one query", "map"):
            page.get_by_role("button", name=detail, exact=True).first.click()
            page.wait_for_timeout(200)
        readings["every detail"] = memory(pid)
        return {**found, "tab_mib": readings, "chromium": browser.version}
    finally:
        browser.close()


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds."""
    switches = [ms for r in rounds for ms in r["head_switch_ms"]]
    return {
        "first_paint_ms": statistics.median(r["first_paint_ms"] for r in rounds),
        "head_switch_ms": statistics.median(switches),
        **{f"tab_{kind}_mib": statistics.median(largest(r["tab_mib"], kind) for r in rounds)
           for kind in ("pss", "uss", "peak_rss")},
        **{f"empty_tab_{kind}_mib": statistics.median(r["empty_tab_mib"][kind] for r in rounds)
           for kind in ("pss", "uss", "peak_rss")},
    }  # fmt: skip


def long_report(tokens: int) -> Path:
    """The report of the embedded model on a long prompt, made once."""
    import interp
    from interp.results.attention_patterns import AttentionPatterns

    runs = HERE.parent / "runs"
    runs.mkdir(exist_ok=True)
    kept = runs / f"page-speed-{tokens}.parquet"
    model = interp.load("smollm2")
    if not kept.exists():
        text = "\n".join(p.read_text(encoding="utf-8") for p in sorted((HERE.parent / "docs").rglob("*.md")))
        short, long = 0, len(text)  # the longest beginning of so many tokens
        while long - short > 1:
            middle = (short + long) // 2
            fits = len(model.tokenizer(text[:middle])["input_ids"]) <= tokens
            short, long = (middle, long) if fits else (short, middle)
        model.attention_patterns(text[:short], exact=EXACT, topk=8, rows=8).write(kept)
    heads = interp.patch(model, interp.tasks.ioi(model, n=4, seed=0), model.sites("z"))
    title = f"IOI, and {tokens:,} tokens of documentation"
    return interp.report(heads, AttentionPatterns.read(kept), title=title).write(runs / f"page-speed-{tokens}.html")


def main() -> None:
    """Measure one page."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("report", type=Path, nargs="?")
    ask.add_argument("--tokens", type=int, default=8192)
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--json", type=Path)
    chosen = ask.parse_args()
    report = chosen.report or long_report(chosen.tokens)
    with sync_playwright() as playwright:
        rounds = [one_round(playwright, report) for _ in range(chosen.rounds)]
    result = {
        "command": " ".join(["python", "experiments/page_speed.py", *sys.argv[1:]]),
        "page": report.name, "page_bytes": report.stat().st_size, "chromium": rounds[0].pop("chromium"),
        "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "medians": summary(rounds), "rounds": rounds,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
