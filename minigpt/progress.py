"""Lines on standard error while something takes longer than a second. No torch."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

FIRST_S, LONGEST_S = 1.0, 15.0  # seconds to the first line, and between the last ones


class Progress:
    """Prints what is going on, how much of it is done, and for how long, from a thread.

    Nothing is printed for work that ends within a second. `done` and `total` are bytes; without a
    total only the seconds are shown.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        wait = FIRST_S
        while not self._ended.wait(wait):
            wait = min(2 * wait, LONGEST_S)
            say(f"{self.what}: {self._share()}{time.monotonic() - self._start:.0f} s")

    def _share(self) -> str:
        if not self.done:
            return ""
        if not self.total:
            return f"{self.done / 1e6:,.1f} MB, "
        percent = min(100, 100 * self.done // self.total)
        return f"{percent} % of {self.total / 1e6:,.1f} MB, "


def say(line: str) -> None:
    """Print one line on standard error at once."""
    print(f"launch.sh: {line}", file=sys.stderr, flush=True)
