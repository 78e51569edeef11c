"""The page in a real browser, opened from disk as a colleague would."""

from __future__ import annotations

import base64
import subprocess
import time
from pathlib import Path

import numpy as np
import plots_synthetic as synthetic
import pytest
from plots_browser import Browser, find_chromium
from test_plots_report import hostile

from interp.effects import Effects
from interp.plots import report

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


def choose(browser: Browser, label: str, value: str) -> None:
    """Pick an option of the first drop-down with this label."""
    browser.evaluate(f"""(() => {{
      const box = [...document.querySelectorAll("label.chooser")].find((l) => l.firstChild.textContent === {label!r});
      const select = box.querySelector("select");
      select.value = {value!r};
      select.dispatchEvent(new Event("change"));
    }})()""")


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.evaluate(f"[...document.querySelectorAll({selector!r})].map((n) => n.textContent)")


def assert_quiet(browser: Browser, path: Path) -> None:
    assert browser.errors() == []
    assert browser.requests() == [path.resolve().as_uri()]


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
    browser.until(
        "document.querySelectorAll('.cell').length === 30 * 5 + 3 * 270 && !!document.querySelector('.token')"
    )
    assert texts(browser, ".card:first-of-type .tick.slanted")[:5] == ["IO", "S1", "S2", "end", "other tokens"]
    assert len(texts(browser, ".token")) == 15
    assert len(texts(browser, ".card .tick.row")) == 4 * 30
    assert "smollm2-135m-instruct" in texts(browser, ".provenance")[0]
    assert "sha256:9f2c01d4" in texts(browser, ".provenance")[0]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unnamed = (
        "[...document.querySelectorAll('svg[role=img], select, button')].filter((n) => !n.ariaLabel && !n.textContent)"
    )
    assert browser.evaluate(f"{unnamed}.length") == 0
    assert_quiet(browser, path)


def test_choosing_keeps_the_keyboard(heads_page: Browser):
    heads_page.evaluate("document.querySelector('.chooser select').focus()")
    choose(heads_page, "mode", "noise")
    heads_page.until("document.querySelector('.how').textContent.includes('noising')")
    assert heads_page.evaluate("document.activeElement.value") == "noise"


def test_inline_report_runs_inside_a_notebook_frame(browser: Browser, tmp_path: Path):
    host = tmp_path / "host.html"
    inner = report(synthetic.head_effects(2))._repr_html_()
    # A sandboxed frame cannot be looked into, so ask its picture.
    host.write_text(f"<!doctype html><div id='provenance'></div>{inner}")
    browser.open(host, height=900)
    time.sleep(1.5)
    shot = base64.b64encode(browser.screenshot(tmp_path / "host.png").read_bytes()).decode()
    counts = browser.evaluate(f"{COLOURS}({shot!r})")
    assert counts["red"] > 500 and counts["blue"] > 500
    assert browser.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_screenshot_shows_both_directions(browser: Browser, tmp_path: Path, dark: bool):
    path = report(synthetic.head_effects(8)).write(tmp_path / "r.html")
    browser.open(path, height=900, dark=dark)
    browser.until("document.querySelectorAll('.cell').length === 270")
    shot = base64.b64encode(browser.screenshot(tmp_path / "r.png").read_bytes()).decode()
    counts = browser.evaluate(f"{COLOURS}({shot!r})")
    assert counts["red"] > 1000 and counts["blue"] > 1000 and counts["colours"] > 50
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


def test_pointer_and_keyboard_read_cells_out(heads_page: Browser):
    shown = "document.querySelector('.readout strong').textContent"
    spoken = "document.querySelector('.spoken').textContent"
    assert heads_page.evaluate(shown) == "L18H6"
    summary = synthetic.head_effects(8).summary().set_index(["layer", "head"])
    centre = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
    box = heads_page.evaluate(f"{centre}(document.querySelector('[data-cell=\"156\"]').getBoundingClientRect())")
    heads_page.move(*box)
    assert heads_page.evaluate(shown) == "L17H3"
    assert f"{summary.loc[(17, 3), 'effect']:+.3f}" in heads_page.evaluate(
        "document.querySelector('.readout').textContent"
    )
    assert heads_page.evaluate(spoken) == ""
    heads_page.click(*box)
    assert heads_page.evaluate(spoken).startswith("L17H3: recovery +0.")
    heads_page.evaluate("document.querySelector('svg.map').focus()")
    heads_page.press("ArrowDown")
    heads_page.press("ArrowRight")
    assert heads_page.evaluate(spoken).startswith("L18H4: recovery")
    assert heads_page.errors() == []


def test_choosers_switch_mode_value_and_example(heads_page: Browser):
    noise = synthetic.head_effects(8, mode="noise", seed=4)
    choose(heads_page, "mode", "noise")
    choose(heads_page, "value", "raw")
    heads_page.until("document.querySelector('.legend .caption').textContent === 'change of logit_diff'")
    strongest = noise.summary().assign(size=lambda f: f["raw"].abs()).nlargest(1, "size").iloc[0]
    first = texts(heads_page, ".strongest li")[0]
    assert (
        first.startswith(f"L{strongest['layer']}H{strongest['head']}")
        and f"{strongest['raw']:.3f}".replace("-", "−") in first
    )
    choose(heads_page, "show", "3")
    heads_page.until("document.querySelector('.how').textContent.includes('Example 3 alone')")
    row = noise.frame().query("example == 3").sort_values("raw", key=abs).iloc[-1]
    assert f"{row['raw']:.3f}".replace("-", "−") in texts(heads_page, ".strongest li")[0]
    assert heads_page.errors() == []


def test_example_view_has_its_own_tokens_and_exact_values(browser: Browser, tmp_path: Path):
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
    browser.evaluate("document.querySelector('details.numbers').open = true")
    browser.until("document.querySelectorAll('.numbers tbody tr').length === 450")
    rows = browser.evaluate(
        "[...document.querySelectorAll('.numbers tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    shown = {address: float(effect) for _, address, effect, *_ in rows}
    frame = effects.frame().query("example == 1")
    expected = {f"resid_pre.L{r.layer}@{r.position}": r.effect for r in frame.itertuples()}
    assert shown.keys() == expected.keys()
    np.testing.assert_allclose([shown[k] for k in expected], list(expected.values()), rtol=1e-5)


def test_head_click_draws_its_tokens(browser: Browser, tmp_path: Path):
    stats = synthetic.attention(3)
    browser.open(report(stats).write(tmp_path / "r.html"))
    browser.until("!!document.querySelector('.token')")
    choose(browser, "statistic", "previous")
    browser.evaluate(
        "document.querySelector('[data-cell=\"100\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    browser.until("document.querySelector('.strip h4').textContent === 'L11H1, previous per query token'")
    choose(browser, "prompt", "2")
    browser.until(f"document.querySelectorAll('.token')[2].textContent === {stats.tokens[2][2].replace(' ', '·')!r}")
    browser.evaluate("document.querySelectorAll('.token')[4].focus()")
    assert f"{stats.values['previous'][2][11, 1, 4]:.3f}" in browser.evaluate(
        "document.querySelector('.token-readout .shown dd').textContent"
    )
    assert browser.errors() == []


def test_hostile_text_neither_runs_nor_breaks_the_page(browser: Browser, tmp_path: Path):
    path = report(*hostile(), title="Safe").write(tmp_path / "r.html")
    browser.open(path)
    browser.until("document.querySelectorAll('.cell').length === 450 + 270 && !!document.querySelector('.token')")
    assert browser.evaluate("document.title") == "Safe"
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert "</script><script>…" in " ".join(texts(browser, ".token"))
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
    assert texts(browser, ".card .caution")[0].startswith("In all 2 examples")
    assert texts(browser, ".legend .caption") == ["change of logit_diff"]
    assert_quiet(browser, path)


def test_page_prints_and_fits_a_phone(browser: Browser, tmp_path: Path):
    path = report(*synthetic.demo_sized(2)).write(tmp_path / "r.html")
    browser.open(path, width=390, height=800)
    browser.until("!!document.querySelector('.token')")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.pdf().startswith(b"%PDF")
    assert_quiet(browser, path)


def test_plain_command_line_browser_draws_the_page(browser: Browser, tmp_path: Path):
    """The same through --dump-dom: no DevTools session that might change what the page does."""
    chromium = find_chromium()
    assert chromium is not None
    path = report(synthetic.head_effects(2)).write(tmp_path / "r.html")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.count('class="cell"') == 270
    assert "CONSOLE" not in done.stderr
