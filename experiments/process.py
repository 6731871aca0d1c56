"""Processes that end when they should: with their parent, and on a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Protocol

GRACE_S = 10  # between asking the ranks to end and making them


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between
            os._exit(1)


def end(status: int) -> None:
    """End this process at once: right runs may hang or abort in gloo's destructors (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Endable(Protocol):
    """A process, or several that end together."""

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


class Forwarding:
    """While open, the first signal to this process ends `process`, and a second one kills it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, process: Endable) -> None:
        self.process = process
        self.received = 0

    def __enter__(self) -> Forwarding:
        self.saved = {number: signal.signal(number, self._forward) for number in self.SIGNALS}
        self.saved[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: self.process.kill())
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.alarm(0)
        for number, handler in self.saved.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            self.process.kill()  # the ranks die with it: die_with_parent
        self.received = self.received or number
        self.process.send_signal(signal.SIGTERM)
        signal.alarm(GRACE_S)
