"""Browser fixtures: skipped, with the reason, only where no Chromium is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from plots_browser import Browser, find_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for one module: Playwright's event loop must not be there when other tests start theirs."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium found: install it (apt-get install chromium) or set INTERP_CHROMIUM to its path")
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'")
    running = Browser(chromium)
    yield running
    running.close()
