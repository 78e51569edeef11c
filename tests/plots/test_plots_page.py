"""The page in a real browser, opened from disk as a colleague would."""

from __future__ import annotations

import base64
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plots_synthetic as synthetic
import pytest
from plots_browser import Browser
from test_plots_report import hostile

import interp
from interp.plots import Report, report, template
from interp.plots.kinds import KINDS, ResultKind
from interp.results.attention_patterns import AttentionPatterns, PatternExample
from interp.results.effects import Effects
from interp.sites import Site

pytestmark = pytest.mark.browser

COLOURS = """(async (data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes]));
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const { data: p } = context.getImageData(0, 0, image.width, image.height);
  let [red, blue] = [0, 0];
  const seen = new Set();
  for (let i = 0; i < p.length; i += 4) {
    if (p[i] > p[i + 2] + 60 && p[i] > p[i + 1] + 60) red++;
    if (p[i + 2] > p[i] + 60) blue++;
    seen.add((p[i] << 16) | (p[i + 1] << 8) | p[i + 2]);
  }
  return { red, blue, colours: seen.size };
})"""


GRID_DOTS = "dots => dots.filter((d) => d.closest('svg.map')).map((d) => d.getAttribute('r'))"


def choose(browser: Browser, label: str, value: str) -> None:
    browser.choose(label, value)


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.texts(selector)


def assert_quiet(browser: Browser, path: Path) -> None:
    assert browser.errors() == []
    assert [u.split("#")[0] for u in browser.requests()] == [path.resolve().as_uri()]


@pytest.fixture
def heads_page(browser: Browser, tmp_path: Path) -> Browser:
    effects = Effects.concat([synthetic.head_effects(8), synthetic.head_effects(8, mode="noise", seed=4)])
    path = report(effects, title="Heads").write(tmp_path / "heads.html")
    browser.open(path)
    browser.until("document.querySelectorAll('.cell').length === 270")
    return browser


def test_demo_page_is_complete_and_quiet(browser: Browser, tmp_path: Path):
    path = report(*synthetic.demo_sized(8), title="IOI").write(tmp_path / "demo.html")
    browser.open(path)
    browser.until("document.querySelectorAll('.cell').length === 30 * 5 + 270 && !!document.querySelector('.strip')")
    assert texts(browser, "#result-0-0 .tick.slanted") == ["IO", "S1", "S2", "end", "other tokens"]
    assert len(texts(browser, "details.card.folded")) == 3
    browser.evaluate("document.querySelectorAll('details.card').forEach((d) => { d.open = true; })")
    browser.until("document.querySelectorAll('.token').length === 15")
    assert "smollm2-135m-instruct" in texts(browser, ".provenance")[0]
    assert "sha256:9f2c01d4" in texts(browser, ".provenance")[0]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert_quiet(browser, path)


def test_inline_report_runs_inside_a_notebook_frame(browser: Browser, tmp_path: Path):
    host = tmp_path / "host.html"
    inner = report(synthetic.head_effects(2))._repr_html_()
    host.write_text(f"<!doctype html><div id='provenance'>host</div>{inner}")
    browser.open(host, height=900)
    browser.page.frame_locator("iframe").locator(".head-list").wait_for()
    shot = base64.b64encode(browser.screenshot(tmp_path / "host.png").read_bytes()).decode()
    counts = browser.evaluate(f"{COLOURS}({shot!r})")
    assert counts["red"] > 300 and counts["blue"] > 300
    assert browser.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_screenshot_shows_both_directions(browser: Browser, tmp_path: Path, dark: bool):
    path = report(synthetic.head_effects(8)).write(tmp_path / "r.html")
    browser.open(path, height=900, dark=dark)
    browser.until("document.querySelectorAll('.cell').length === 270")
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    shot = base64.b64encode(browser.screenshot(tmp_path / "r.png").read_bytes()).decode()
    browser.page.goto("about:blank")
    counts = browser.evaluate(f"{COLOURS}({shot!r})")
    assert counts["red"] > 500 and counts["blue"] > 500 and counts["colours"] > 50
    assert (background == "rgb(255, 255, 255)") != dark


def test_pointer_and_keyboard_read_heads_out(heads_page: Browser):
    page, summary = heads_page.page, synthetic.head_effects(8).summary().set_index(["layer", "head"])
    assert page.inner_text("#heads .readout strong") == "L18H6"
    page.hover('[data-cell="156"]')
    assert page.inner_text("#heads .readout strong") == "L17H3"
    assert f"{summary.loc[(17, 3), 'effect']:+.3f}" in page.inner_text("#heads .readout")
    assert page.inner_text("#spoken") == ""
    page.click('[data-cell="156"]')
    assert page.inner_text("#spoken").startswith("L17H3: recovery +0.")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#spoken").startswith("L18H4: recovery") and "heads=L18H4" in page.url
    page.click('[data-cell="175"]', modifiers=["Shift"])
    assert page.url.endswith("heads=L19H4,L18H4") or "L18H4" in page.url
    page.click('[data-cell="168"]', modifiers=["Control"])
    assert len(page.url.split("heads=")[1].split("&")[0].split(",")) == 3
    page.keyboard.press("Shift+ArrowDown")
    assert page.locator(".head-list tr.chosen").count() >= 1
    assert heads_page.errors() == []


def test_grid_sorts_filters_and_shows_a_statistic(browser: Browser, tmp_path: Path):
    browser.open(report(synthetic.head_effects(8), synthetic.attention(2)).write(tmp_path / "r.html"))
    page = browser.page
    choose(
        browser,
        "dots",
        browser.evaluate("[...document.querySelectorAll('option')].find((o) => o.textContent === 'previous').value"),
    )
    assert page.locator("circle.dot").count() >= 270 and "glyph=" in page.url
    dots = browser.page.eval_on_selector_all("circle.dot", GRID_DOTS)
    radii = [float(r) for r in dots]
    largest = radii.index(max(radii))
    assert largest == 11 * 9 + 1, "the previous-token head has the largest dot"
    page.click("[data-key='sort dots']")
    assert texts(browser, ".head-list tbody th")[0] == "L11H1"
    page.click("[data-key='sort head']")
    assert texts(browser, ".head-list tbody th")[0] == "L0H0"
    page.fill("[data-key=least]", "0.2")
    assert page.locator(".cell.dim").count() == 270 - 4
    assert "4 pass the filter" in page.inner_text("#heads .listing .hint")
    assert browser.errors() == []


def test_values_of_one_example_are_the_table(browser: Browser, tmp_path: Path):
    effects = synthetic.position_effects(4, reordered=True)
    path = report(effects).write(tmp_path / "r.html")
    browser.open(path)
    browser.until("document.querySelectorAll('.cell').length === 150")
    assert texts(browser, ".readout code") == [""], "a mean over a span's tokens is not the site of that span"
    assert "mean over its tokens" in texts(browser, ".how")[0]
    choose(browser, "show", "1")
    browser.until("document.querySelectorAll('.cell').length === 450")
    assert "mean over its tokens" not in texts(browser, ".how")[0]
    assert texts(browser, ".tick.slanted") == [t.replace(" ", "·") for t in synthetic.tokens(1, reordered=True)[0]]
    shown = table_of(browser, "#result-0-0 details.numbers")
    frame = effects.frame().query("example == 1")
    expected = {f"resid_pre.L{r.layer}@{r.position}": r.effect for r in frame.itertuples()}
    assert shown.keys() == expected.keys()
    np.testing.assert_allclose([shown[k] for k in expected], list(expected.values()), rtol=1e-5)
    choose(browser, "value", "raw")
    browser.until("document.querySelector('.legend .caption').textContent === 'change of logit_diff'")


def table_of(browser: Browser, selector: str) -> dict[str, float]:
    """Address → first number of a data table."""
    browser.evaluate(f"document.querySelector({selector!r}).open = true")
    browser.until(f"!!document.querySelector({selector!r} + ' tbody tr')")
    rows = browser.evaluate(
        f"[...document.querySelectorAll({selector!r} + ' tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    return {address: float(value) for _, address, value, *_ in rows}


def test_numbers_on_the_page_are_those_of_the_file(browser: Browser, tmp_path: Path):
    effects = synthetic.position_effects(6)
    back = Effects.read(effects.write(tmp_path / "e.parquet"))
    browser.open(report(back).write(tmp_path / "r.html"))
    browser.until("document.querySelectorAll('.cell').length === 450")
    shown = table_of(browser, "#result-0-0 details.numbers")
    summary = effects.summary()
    assert len(shown) == len(summary) == 450
    for row in summary.itertuples():
        assert shown[f"resid_pre.L{row.layer}@{row.position}"] == pytest.approx(row.effect, rel=1e-5)


def test_statistics_token_by_token(browser: Browser, tmp_path: Path):
    stats = synthetic.attention(3)
    browser.open(report(stats).write(tmp_path / "r.html"))
    browser.evaluate("document.querySelector('details.card').open = true")
    browser.until("!!document.querySelector('.strip .token')")
    choose(browser, "statistic", "previous")
    browser.page.click('#result-0-0 [data-cell="100"]')
    browser.until("document.querySelector('.strip h4').textContent === 'L11H1, previous per query token'")
    choose(browser, "prompt", "2")
    browser.until(
        f"document.querySelectorAll('.strip .token')[2].textContent === {stats.tokens[2][2].replace(' ', '·')!r}"
    )
    browser.evaluate("document.querySelectorAll('.strip .token')[4].focus()")
    assert f"{stats.values['previous'][2][11, 1, 4]:.3f}" in browser.page.inner_text(".strip .token-readout .shown dd")
    assert browser.errors() == []


def test_hostile_text_neither_runs_nor_breaks_the_page(browser: Browser, tmp_path: Path):
    path = report(*hostile(), title="Safe").write(tmp_path / "r.html")
    browser.open(path)
    browser.until(
        "document.querySelectorAll('.cell').length === 450 + 270 && !!document.querySelector('.strip-tokens .token')"
    )
    browser.evaluate("document.querySelectorAll('details.card').forEach((d) => { d.open = true; })")
    browser.until("!!document.querySelector('.strip .token')")
    assert browser.evaluate("document.title") == "Safe"
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    for where in (".strip .token", ".strip-tokens .token"):
        assert "</script><script>…" in " ".join(texts(browser, where))
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert_quiet(browser, path)


def test_undefined_recovery_and_missing_cells(browser: Browser, tmp_path: Path):
    frame = synthetic.head_effects(2).frame()
    frame = frame[~((frame["layer"] == 3) & (frame["head"] == 2))]
    frame = frame.assign(clean=1.0, corrupt=1.0, effect=np.nan)
    path = report(Effects(frame)).write(tmp_path / "r.html")
    browser.open(path)
    browser.until("document.querySelectorAll('.cell').length === 270")
    assert browser.evaluate("document.querySelectorAll('.cell.missing').length") == 1
    assert texts(browser, "#heads .caution")[0].startswith("In all 2 examples")
    assert texts(browser, ".legend .caption")[0] == "colour: patch, denoising, change of logit_diff"
    assert_quiet(browser, path)


def test_positions_that_are_read_are_named_and_chosen(browser: Browser, tmp_path: Path):
    known = interp.zoo.one_head()
    model, pairs = known.model, known.pairs(8, seed=0)
    heads = interp.ablate(model, pairs, model.sites("z"), metric=interp.token_kl, using="zero", at=["marked", "last"])
    stream = interp.patch(model, pairs, model.sites("resid_pre", positions="each"), at=["marked", "last"])
    path = report(heads, stream).write(tmp_path / "r.html")
    browser.open(path)
    browser.until("document.querySelectorAll('#heads .cell').length === 12")
    of_mover = browser.page.inner_text("#heads .readout")
    assert "read at the last position" in of_mover and "read at marked" in of_mover
    card = "#result-1-0 .kind"
    assert texts(browser, card)[0].endswith("patch, denoising"), "it opens where something is to be seen"
    choose(browser, "read at", "marked")
    browser.until(f"document.querySelector({card!r}).textContent.endsWith('read at marked')")
    mover = heads.summary().query("layer == 1 and head == 2")
    raw = dict(zip(mover["read_at"].fillna("last"), mover["raw"], strict=True))
    assert raw["last"] > 1 and raw["marked"] == 0
    assert_quiet(browser, path)


def test_neurons_mediators_and_statistics_are_shown_as_what_they_are(browser: Browser, tmp_path: Path):
    one = synthetic.pattern_run(np.ones((1, 1, 1)), ["a"], [("", 0, 1)])
    example = PatternExample([("", 0, 1)], np.arange(2), {"clean": one})
    token = AttentionPatterns([(0, 0)], [], 1, 1, [example], synthetic.PROVENANCE)
    by_hand = synthetic.circuit()
    by_hand = type(by_hand)(by_hand.graph, dict.fromkeys(by_hand.edges, float("nan")), {}, synthetic.PROVENANCE)
    results = synthetic.neuron_effects(), synthetic.mediation(), token, by_hand, synthetic.curve()
    path = report(*results).write(tmp_path / "r.html")
    browser.open(path)
    browser.until("!!document.querySelector('.strip-tokens .token')")
    readout = browser.page.inner_text("#result-0-0 .readout")
    assert str(Site.parse("mlp_post.L3N0")) in readout and "layer × neuron" in browser.page.inner_text("#result-0-0")
    assert texts(browser, "#heads .legend .caption")[0].startswith("colour: natural indirect effect")
    assert browser.page.locator("svg.curve").count() == 1, (
        "a curve over a ranking is on the page, and says nothing of a circuit"
    )
    assert "aithfulness" not in browser.page.inner_text("#result-3") and "not ranked" in browser.page.inner_text(
        "#result-3"
    )
    hidden = "all => all.every((x) => x.getBBox().y + x.getBBox().height < 0 || x.getBBox().x + x.getBBox().width < 0)"
    assert browser.page.locator("svg.pattern .cross").evaluate_all(hidden), "no cross hair before a query is pointed at"
    assert_quiet(browser, path)


@dataclass
class Tally:
    """A result of a kind that the page does not know."""

    count: int
    provenance: dict


TALLY_SCRIPT = """// The card of a tally.

import { el } from "./dom.js";

/** @param {{count: number}} result */
export function tallyCard(result) {
  return el("article", { class: "card tally" }, el("p", {}, `counted ${result.count}`));
}
"""
TALLY_ROW = """  tally: {
    describe: () => "tally",
    cards: (result) => [tallyCard(result)],
    entries: (result, id) => [{ id, text: result.name ?? "Tally" }],
  },
"""


def test_a_panel_costs_a_script_and_a_row(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A new kind of result: how it is encoded and decoded, a row in kinds.py, a script, a row in page/kinds.js."""
    encode = lambda tally, provenance: {"kind": "tally", "count": tally.count, "provenance": provenance}  # noqa: E731
    decode = lambda data, budget: Tally(data["count"], data["provenance"])  # noqa: E731
    monkeypatch.setitem(KINDS, "tally", ResultKind(Tally, encode, decode))
    page = tmp_path / "page"
    shutil.copytree(str(template.PAGE), page)
    (page / "tally.js").write_text(TALLY_SCRIPT)
    rows = (page / "kinds.js").read_text()
    rows = rows.replace("import { axisTitle", 'import { tallyCard } from "./tally.js";\nimport { axisTitle')
    (page / "kinds.js").write_text(rows.replace("  curve: {\n", f"{TALLY_ROW}  curve: {{\n"))
    monkeypatch.setattr(template, "PAGE", page)
    template._fixed_parts.cache_clear()
    try:
        path = report({"Votes": Tally(7, synthetic.PROVENANCE)}, synthetic.neuron_effects()).write(tmp_path / "r.html")
    finally:
        template._fixed_parts.cache_clear()
    browser.open(path)
    assert texts(browser, ".tally") == ["counted 7"]
    assert_quiet(browser, path)
    assert Report.read(path).results[0] == Tally(7, synthetic.PROVENANCE)


def test_page_prints_and_fits_a_phone(browser: Browser, tmp_path: Path):
    path = report(*synthetic.study()).write(tmp_path / "r.html")
    browser.open(path, width=390, height=800, dark=True)
    browser.until("!!document.querySelector('.strip-tokens .token')")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    whole = "n => n.filter((s) => s.getBoundingClientRect().right > innerWidth + 1).length"
    for drawing in ("svg.map", "svg.pattern", "svg.row-figure", "svg.graph", "svg.curve"):
        drawn = browser.page.locator(drawing)
        assert drawn.count() and drawn.evaluate_all(whole) == 0, f"{drawing} is cut off at the right"
    browser.page.emulate_media(media="print")
    assert browser.page.locator(".head-list .interval-bar").first.evaluate("s => s.getBoundingClientRect().height") < 20
    assert not browser.page.locator(".readout textarea").first.is_visible(), "an empty note takes no paper"
    for control in (".chooser input", ".switcher button:not([aria-pressed=true])"):
        unseen = browser.page.locator(control).evaluate_all("all => all.filter((x) => x.checkVisibility()).length")
        assert unseen == 0, f"{control}: nothing to be pressed on paper"
    assert browser.page.locator(".strip-line").first.evaluate("s => getComputedStyle(s).whiteSpace") == "normal"
    browser.page.emulate_media(media="screen")
    assert browser.pdf().startswith(b"%PDF")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark", "paper is white, the screen stays dark"
    assert_quiet(browser, path)
