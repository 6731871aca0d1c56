"""A headless Chromium for tests of pages. Without one (CHROMIUM names it) they are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The browser's path."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened(url: str, width: int, height: int = 900) -> Iterator[tuple[Any, dict[str, list[str]]]]:
    """A page, and what it complained of: `errors` of its console, `requests` to other hosts."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on this machine")
    seen: dict[str, list[str]] = {"errors": [], "requests": []}
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda m: seen["errors"].append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: seen["errors"].append(str(error)))
        own = ("http://127.0.0.1", "ws://127.0.0.1", "file:", "data:", "blob:")
        page.on(
            "request",
            lambda r: None if r.url.startswith(own) else seen["requests"].append(r.url),
        )
        page.goto(url)
        try:
            yield page, seen
        finally:
            browser.close()
