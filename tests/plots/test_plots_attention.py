"""Attention, circuits and what leaves the page, in a real browser: driven as a person would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import plots_synthetic as synthetic
import pytest
from plots_browser import Browser

from interp.circuits import Circuit
from interp.plots import report

pytestmark = pytest.mark.browser

WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one of everything."""
    return report(*synthetic.study(), title="Study").write(tmp_path_factory.mktemp("study") / "study.html")


def ready(browser: Browser, path: Path, **how) -> None:
    browser.open(path, **how)
    browser.until("!!document.querySelector('.strip-tokens .token') && !document.querySelector('#reads:empty')")


def quiet(browser: Browser, path: Path) -> None:
    assert browser.errors() == []
    assert {u.split("#")[0] for u in browser.requests()} == {path.resolve().as_uri()}


def test_click_a_head_hover_a_token_pin_it(browser: Browser, study: Path):
    ready(browser, study, height=1600)
    page, patterns = browser.page, synthetic.patterns(1)
    page.click('#heads [data-cell="100"]')
    browser.until("document.querySelector('.pattern-figure strong').textContent === 'L11H1'")
    page.hover("#token-7")
    browser.until("document.querySelector('#reads').textContent.includes('@7 reads')")
    weights = patterns.map((11, 1))[7]
    best = int(weights.argmax())
    assert f"@{best} {weights[best]:.3f}" in page.inner_text("#reads")
    tinted = browser.page.eval_on_selector_all(
        ".strip-tokens .token:not(.quiet)", "a => a.map((n) => Number(n.dataset.token))"
    )
    assert best in tinted and max(tinted) <= 7, "nothing after the query is tinted"
    page.click("#token-7")
    assert "q=7" in page.url and page.locator("#token-7.pinned").count() == 1
    page.mouse.move(5, 5)
    browser.until("document.querySelector('#reads').textContent.includes('@7 reads')")
    page.focus(".strip-tokens")
    page.keyboard.press("ArrowRight")
    browser.until("document.querySelector('#reads').textContent.includes('@8 reads')")
    page.click(".pattern-figure .pin")
    assert "L11H1@8" in page.inner_text(".bar")
    quiet(browser, study)


def test_runs_zooms_scales_and_muting(browser: Browser, study: Path):
    ready(browser, study, at="heads=L5H2,L6H0")
    page = browser.page
    assert browser.texts(".pattern-figure strong") == ["L5H2", "L6H0"]
    seen = {page.get_attribute(".raster", "href")}
    for value in ("linear", "log"):
        page.click(f".switcher button[data-value={value}]")
        browser.until(f"document.querySelector('.switcher button[data-value={value}]').ariaPressed === 'true'")
        seen.add(page.get_attribute(".raster", "href"))
    page.click(".switcher button[data-value=difference]")
    browser.until("document.querySelector('.attention .legend .caption').textContent.includes('clean − corrupt')")
    seen.add(page.get_attribute(".raster", "href"))
    p = synthetic.patterns(1)
    difference = np.abs(p.map((5, 2)) - p.map((5, 2), run="corrupt")).max()
    both = max(difference, np.abs(p.map((6, 0)) - p.map((6, 0), run="corrupt")).max())
    assert f"+{both:.3f}" in browser.texts(".attention .legend text")
    page.locator(".tick-box", has_text="mute").locator("input").check()
    browser.until("document.querySelector('.attention .how').textContent.includes('first token’s column is grey')")
    seen.add(page.get_attribute(".raster", "href"))
    assert len(seen) == 5, "each changes the picture"
    page.click(".switcher button[data-value=blocks]")
    browser.until("document.querySelector('.attention .how').textContent.includes('rows sum to 1')")
    assert "IO" in browser.texts(".pattern .tick.row")
    page.click(".switcher button[data-value=rows]")
    browser.until("document.querySelectorAll('.row-figure').length === 2")
    quiet(browser, study)


def test_a_permalink_shows_the_same(browser: Browser, study: Path):
    ready(browser, study)
    page = browser.page
    page.click('#heads [data-cell="50"]')
    page.click(".switcher button[data-value=corrupt]")
    page.click("#token-9")
    page.click("[data-key=theme]")
    page.click(".readout .pin")
    link, read = page.url, page.inner_text("#reads")
    for part in ("heads=L5H5", "run=corrupt", "q=9", "theme=light", "pins=L5H5"):
        assert part in link
    ready(browser, study, at=link.split("#")[1])
    page.mouse.move(2, 2)
    browser.until("document.querySelector('#reads').textContent.includes('@9 reads')")
    assert page.inner_text("#reads") == read and page.inner_text("#heads .readout strong") == "L5H5"
    ready(browser, study, at="heads=<img>,L1H1&q=x&zoom=%E0%A4%A&theme=purple&pins=alert(1)")
    assert page.inner_text("#heads .readout strong") == "L1H1", "what makes no sense is left out"
    quiet(browser, study)


def test_threshold_roles_and_the_saved_circuit(browser: Browser, study: Path, tmp_path: Path):
    ready(browser, study)
    page, circuit = browser.page, synthetic.circuit()
    assert "60 of 80 edges" in page.inner_text("#result-6 .readout.line")
    page.fill("#result-6 input[type=range]", "6")
    page.dispatch_event("#result-6 input[type=range]", "change")
    assert "cut=result-6:6" in page.url
    strongest = sorted(circuit.edges, key=lambda e: -abs(circuit.edges[e]))[:6]
    connected = Circuit(circuit.graph, strongest).connected()
    assert f"{len(connected)} on a path" in page.inner_text("#result-6 .readout.line")
    assert "CPR 0.899" in page.inner_text("#result-6 figcaption")
    page.click('[data-key="node z.L11H1"]')
    page.fill("#result-6 input[type=text]", "früh")
    page.fill("#result-6 .node-panel textarea", "look again </script>")
    with page.expect_download() as saved:
        page.click("[data-key='save circuit']")
    saved.value.save_as(tmp_path / "c.json")
    back = Circuit.read(tmp_path / "c.json")
    assert back == circuit and {str(s): r for s, r in back.roles.items()} == {
        "z.L11H1": "früh",
        "z.L23H3": "name mover",
    }
    assert back.provenance["notes"] == {"z.L11H1": "look again </script>"}
    page.click("#result-6 .node-panel button:has-text('open its attention')")
    browser.until("document.querySelector('.pattern-figure strong').textContent === 'L11H1'")
    quiet(browser, study)


def test_pictures_notes_and_sites_leave_the_page(browser: Browser, study: Path, tmp_path: Path):
    ready(browser, study, at="heads=L3H3")
    page = browser.page
    page.fill("#heads textarea", "odd <b>")
    page.click(".readout .pin")
    for selector, name in (
        (".bar button:has-text('notes')", "notes.json"),
        (".pattern-figure button:has-text('SVG')", "a.svg"),
        (".pattern-figure button:has-text('PNG')", "a.png"),
    ):
        with page.expect_download() as saved:
            page.click(selector)
        saved.value.save_as(tmp_path / name)
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes["pins"] == ["L3H3"] and notes["notes"] == {"L3H3": "odd <b>"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<image" in (tmp_path / "a.svg").read_text() and "fill=" in (tmp_path / "a.svg").read_text()
    page.click("#heads .readout button:has-text('copy as Site')")
    browser.until("document.querySelector('#spoken').textContent === 'site copied: z.L3H3'")
    assert browser.errors() == []


def test_paths_and_mediation_have_their_place(browser: Browser, study: Path):
    ready(browser, study)
    effects, summary = synthetic.edge_effects(), synthetic.mediation().summary()
    assert browser.texts("#result-4-0 .tick.row") == ["mlp_out.L2", "z.L3H1", "z.L5H0", "z.L5H8"]
    assert browser.texts("#result-4-0 .tick.slanted") == ["q.L9H6", "v.L9H2"]
    best = effects.summary().iloc[0]
    readout = browser.page.inner_text("#result-4-0 .readout")
    assert f"{best['effect']:.3f}" in readout and str(best["sender"]) in readout
    assert browser.texts(".effects-table thead th") == ["mediator", "TE", "NDE", "NIE", "interaction"]
    top = (
        summary[summary["intervention"] == "natural indirect effect"]
        .assign(size=lambda f: f["raw"].abs())
        .nlargest(1, "size")
        .iloc[0]
    )
    row = browser.texts(".effects-table tbody tr")[0]
    assert row.startswith(f"L{top['layer']}H{top['head']}") and f"{abs(top['raw']):.3f}" in row
    assert browser.errors() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(browser: Browser, study: Path, theme: str):
    from axe_playwright_python.sync_playwright import Axe

    ready(browser, study, at=f"theme={theme}", width=1280)
    page = browser.page
    context = page.context.browser.new_context(bypass_csp=True, color_scheme=theme)
    try:  # axe is a script, and the page admits none but its own
        other = context.new_page()
        other.goto(page.url)
        other.wait_for_selector(".strip-tokens .token")
        other.evaluate("document.querySelectorAll('details.card, .contents').forEach((d) => { d.open = true; })")
        other.wait_for_selector(".strip .token")
        other.click('[data-key="node z.L11H1"]')
        found = Axe().run(other, options={"runOnly": {"type": "tag", "values": WCAG}, "resultTypes": ["violations"]})
        told = [(v["id"], v["nodes"][0]["html"][:160], v["nodes"][0]["any"][:1]) for v in found.response["violations"]]
        assert told == []
    finally:
        context.close()


def test_eight_thousand_tokens(browser: Browser, tmp_path: Path):
    patterns = synthetic.long_patterns()
    path = report(synthetic.head_effects(2), patterns).write(tmp_path / "long.html")
    assert path.stat().st_size <= 5_000_000
    ready(browser, path, height=1400)
    page = browser.page
    assert page.locator(".strip-tokens .token").count() < 800, "only what is in view"
    assert "8,192 tokens in 256 bins: each cell is the largest of about 32 × 32 weights" in page.inner_text(
        ".attention .how"
    )
    page.click('#heads [data-cell="157"]')
    browser.until("document.querySelector('.pattern-figure strong').textContent === 'L17H4'")
    page.evaluate("document.querySelector('.strip-tokens').scrollTop = 1e6")
    page.locator("#token-8190").click()
    browser.until("document.querySelector('#reads').textContent.includes('@8190 reads')")
    run = patterns.examples[0].runs["clean"]
    assert f"@{run.top_index[0, 8190, 0]} {run.top_value[0, 8190, 0]:.2f}" in page.inner_text("#reads")
    assert "the 8 largest weights" in page.inner_text("#reads")
    page.locator("#token-8191").click()
    browser.until("document.querySelector('#reads').textContent.includes('the whole row')")
    page.click('#heads tr[data-head="L18H6"] button')
    browser.until("document.querySelector('#reads').textContent.includes('pooled: the largest weight among 32 × 32')")
    assert "sentence_8" in page.inner_text("#sentences") and "L0H5" in page.inner_text("#sentences .chips")
    quiet(browser, path)
