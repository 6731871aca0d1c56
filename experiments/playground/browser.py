"""A page in a headless Chromium that may reach nothing but this machine. It needs playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page, and what a user would find in its console and its network."""

    page: Any
    errors: list[str] = field(default_factory=list)  # of its console, and uncaught
    requests: list[str] = field(default_factory=list)  # addresses


def chromium() -> str | None:
    """The path of the browser, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened(address: str, width: int, height: int = 900) -> Iterator[Opened]:
    """Open an address. Raises ImportError without playwright."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        page = browser.new_page(viewport={"width": width, "height": height})
        found = Opened(page)

        def said(message: Any) -> None:
            if message.type == "error":
                found.errors.append(message.text)

        page.on("console", said)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(address)
        yield found
        browser.close()
