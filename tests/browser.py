"""A page in a headless Chromium that may reach nothing but the machine's own files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page, and what a user would find in its console and its network."""

    page: Any
    errors: list[str] = field(default_factory=list)  # of its console, and uncaught
    requests: list[str] = field(default_factory=list)  # addresses


@contextmanager
def opened(address: str, width: int, height: int = 900) -> Iterator[Opened]:
    """Open an address. Skips the test where there is no browser."""
    api = pytest.importorskip("playwright.sync_api")
    browser_path = next((path for path in map(shutil.which, NAMES) if path), None)
    if browser_path is None:
        pytest.skip("no Chromium on PATH")
    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        page = browser.new_page(viewport={"width": width, "height": height})
        found = Opened(page)
        page.on("console", lambda m: m.type == "error" and found.errors.append(m.text))
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(address)
        yield found
        browser.close()
