"""Measure speed and memory of the report page in headless Chromium.

    python experiments/page_speed.py [report.html] [--rounds 5] [--json results/page_speed.json]

The report must contain attention patterns. Without a report, the script makes one first: every head of the embedded
model on 8,192 tokens of the documentation of this repository, four of them exact. This takes minutes; the page is saved
as runs/page-speed-8192.html and can be passed next time.

Each round starts a fresh browser, first with an empty page, then with the report. The report is opened, heads are
chosen one by one from the list, the token strip is scrolled to its end, and every detail is shown. First paint is the
browser's first contentful paint. A head switch lasts from the click to the frame that shows the map.

Memory is that of the tab's renderer process as Linux counts it (/proc/PID). Pss is its share of every memory page it
maps, Uss the memory pages that only it maps; of both, the largest of the readings is reported. Rss is reported at its
peak and includes all memory that is shared with the rest of the browser. No garbage collection is forced before a
reading.

Result (results/page_speed.json, a page of 4.9 MB, two CPU cores, medians of 5 rounds): first paint 0.27 s, head switch
46 ms, Pss 230 MiB; an empty tab takes 74 MiB.
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
VISITED = 40  # heads that are chosen in turn: more than a reader looks at in one session
PAINT = """() => new Promise((done) => {
  const read = () => {
    const entry = performance.getEntriesByName("first-contentful-paint")[0];
    if (entry) done(entry.startTime); else setTimeout(read, 10);
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
    """Return the process id of the page's renderer.

    It is the process that uses CPU time while the page's script runs.
    """
    session = browser.new_browser_cdp_session()

    def seconds() -> dict[int, float]:
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        return {p["id"]: p["cpuTime"] for p in processes if p["type"] == "renderer"}

    before = seconds()
    page.evaluate(BUSY)
    worked = {pid: time - before.get(pid, time) for pid, time in seconds().items()}
    session.detach()
    return max(worked, key=lambda pid: worked[pid])


def memory(pid: int) -> dict[str, float]:
    """Return Pss, Uss and peak Rss of a process in MiB."""
    kib: dict[str, int] = {}
    for file in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.endswith(" kB"):
                name, value, _ = line.split()
                kib[name.rstrip(":")] = int(value)
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"pss": kib["Pss"] / 1024, "uss": private / 1024, "peak_rss": kib["VmHWM"] / 1024}


def largest(readings: dict[str, dict[str, float]], kind: str) -> float:
    """Return the largest reading of one kind."""
    return max(r[kind] for r in readings.values())


def one_round(playwright: Any, report: Path) -> dict[str, Any]:
    """Measure one fresh browser: an empty tab, then the report as a reader uses it."""
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    try:
        empty = browser.new_page(viewport={"width": 1280, "height": 1600})
        empty.goto("data:text/html,<title>empty</title>")
        baseline = memory(renderer(browser, empty))
        empty.close()
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.goto(report.resolve().as_uri())
        page.wait_for_selector(".pattern")
        measured: dict[str, Any] = {"first_paint_ms": page.evaluate(PAINT), "empty_tab_mib": baseline}
        pid = renderer(browser, page)
        readings = {"opened": memory(pid)}
        heads = page.eval_on_selector_all(".head-list tr[data-head]", "rows => rows.map((r) => r.dataset.head)")
        visited = heads[1 :: max(1, len(heads) // VISITED)][:VISITED]
        measured["head_switch_ms"] = [page.evaluate(SWITCH, head) for head in visited[:10]]
        readings["ten heads"] = memory(pid)
        for head in visited[10:]:
            page.evaluate(SWITCH, head)
        readings[f"{len(visited)} heads"] = memory(pid)
        page.evaluate("document.querySelector('.strip-tokens').scrollTop = 1e6")
        for detail in ("segments", "one query", "map"):
            page.get_by_role("button", name=detail, exact=True).first.click()
            page.wait_for_timeout(200)
        readings["every detail"] = memory(pid)
        return {**measured, "tab_mib": readings, "chromium": browser.version}
    finally:
        browser.close()


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over rounds."""
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
    """Make the report of the embedded model on a long prompt.

    The patterns are computed once and saved.
    """
    import interp
    from interp.results.attention_patterns import AttentionPatterns

    runs = HERE.parent / "runs"
    runs.mkdir(exist_ok=True)
    patterns = runs / f"page-speed-{tokens}.parquet"
    model = interp.load("smollm2")
    if not patterns.exists():
        text = "\n".join(p.read_text(encoding="utf-8") for p in sorted((HERE.parent / "docs").rglob("*.md")))
        short, long = 0, len(text)  # bisect for the longest prefix of at most `tokens` tokens
        while long - short > 1:
            middle = (short + long) // 2
            fits = len(model.tokenizer(text[:middle])["input_ids"]) <= tokens
            short, long = (middle, long) if fits else (short, middle)
        model.attention_patterns(text[:short], exact=EXACT, topk=8, rows=8).write(patterns)
    heads = interp.patch(model, interp.tasks.ioi(model, n=4, seed=0), model.sites("z"))
    title = f"IOI, and {tokens:,} tokens of documentation"
    return interp.report(heads, AttentionPatterns.read(patterns), title=title).write(runs / f"page-speed-{tokens}.html")


def main() -> None:
    """Measure one page, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = options.report or long_report(options.tokens)
    with sync_playwright() as playwright:
        rounds = [one_round(playwright, report) for _ in range(options.rounds)]
    result = {
        "command": " ".join(["python", "experiments/page_speed.py", *sys.argv[1:]]),
        "page": report.name, "page_bytes": report.stat().st_size, "chromium": rounds[0].pop("chromium"),
        "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "medians": summary(rounds), "rounds": rounds,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
