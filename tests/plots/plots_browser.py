"""Drive headless Chromium with Playwright, as a person would: one page at a time, all that it says recorded."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

CANDIDATES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """A browser on this machine, or None; INTERP_CHROMIUM names another."""
    named = os.environ.get("INTERP_CHROMIUM")
    return named or next((path for path in map(shutil.which, CANDIDATES) if path), None)


class Browser:
    """One page in a fresh profile. Records console messages, exceptions and every request it makes."""

    def __init__(self, chromium: str):
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
        )
        self.page: Any = self._browser.new_page()
        self._messages: list[str] = []
        self._requests: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self._messages.append(m.text))
        self.page.on("pageerror", lambda error: self._messages.append(str(error)))
        self.page.on("request", lambda request: self._requests.append(request.url))
        self.page.set_default_timeout(15_000)

    def open(self, path: Path, *, width: int = 1400, height: int = 2400, dark: bool = False, at: str = "") -> None:
        """Open a file and wait until it has drawn itself. ``at``: the part of the address after #."""
        self.page.goto("about:blank")
        self._messages.clear()
        self._requests.clear()
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.goto(path.resolve().as_uri() + (f"#{at}" if at else ""))
        self.page.wait_for_selector("#provenance")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page (promises are awaited)."""
        return self.page.evaluate(expression)

    def until(self, condition: str, seconds: float = 15) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds  # Playwright's own waiting evaluates strings, which the page forbids
        while not self.page.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {condition}; errors: {self.errors()}")
            self.page.wait_for_timeout(30)

    def texts(self, selector: str) -> list[str]:
        """The text of everything that a selector finds."""
        return self.page.eval_on_selector_all(selector, "nodes => nodes.map((n) => n.textContent)")

    def choose(self, label: str, value: str) -> None:
        """Pick an option of the first drop-down with this label."""
        boxes = self.page.locator("label.chooser:visible")
        named = [b for b in boxes.all() if b.evaluate("n => n.firstChild.textContent") == label]
        named[0].locator("select").select_option(value)

    def screenshot(self, path: Path) -> Path:
        """Save what the window shows as PNG."""
        self.page.screenshot(path=path)
        return path

    def pdf(self) -> bytes:
        """The page as it prints."""
        return self.page.pdf(print_background=True)

    def errors(self) -> list[str]:
        """Console errors and warnings, uncaught exceptions, refused resources."""
        self.page.evaluate("0")  # collects what is under way
        return list(self._messages)

    def requests(self) -> list[str]:
        """Addresses asked for, other than data: and blob: (which never leave the page)."""
        self.page.evaluate("0")
        return [url for url in self._requests if not url.startswith(("data:", "blob:", "about:"))]

    def close(self) -> None:
        """End this browser, and Playwright's event loop with it."""
        self._browser.close()
        self._playwright.stop()
