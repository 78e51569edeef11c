"""Browser fixtures: skipped, with the reason, only where no Chromium is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from plots_browser import Browser, find_chromium


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: drives headless Chromium (apt-get install chromium)")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium found: install it (apt-get install chromium) or set INTERP_CHROMIUM to its path")
    running = Browser(chromium, tmp_path_factory.mktemp("profile"))
    yield running
    running.close()
