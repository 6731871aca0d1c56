"""A page in a headless Chromium, where there is one; else the test is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from experiments.playground import browser


@contextmanager
def opened(address: str, width: int, height: int = 900) -> Iterator[browser.Opened]:
    """Open an address, as experiments.playground.browser does."""
    pytest.importorskip("playwright.sync_api")
    if browser.chromium() is None:
        pytest.skip("no Chromium on PATH")
    with browser.opened(address, width, height) as found:
        yield found
