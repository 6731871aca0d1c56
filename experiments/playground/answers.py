"""Computes the playground's answers in processes of their own, so that the page stays responsive.

At most WORKERS positions are computed at once. Each visitor has at most one in work and one that
waits: a newer position takes the place of the waiting one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from html import escape
from multiprocessing import get_context, parent_process

from experiments.playground.plan import Controls, read_all, view
from experiments.playground.results import EMPTY, results_of

WORKERS = 2
Results = dict[str, str]  # HTML by part of the page


def answer(controls: Controls) -> Results:
    """Return the HTML of each part of the results for one position of the controls."""
    return results_of(view(controls))


class Answers:
    """Worker processes that compute answers. One that dies is replaced."""

    def __init__(self) -> None:
        self.pool = self._new_pool()

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        spawn = get_context("spawn")
        return ProcessPoolExecutor(WORKERS, mp_context=spawn, initializer=_start_worker)

    async def answer(self, controls: Controls) -> Results:
        """Return the results for a position. Where they cannot be computed the verdict says so."""
        pool = self.pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, answer, controls)
        except BrokenProcessPool as error:
            if self.pool is pool:
                self.pool = self._new_pool()
            return failed(controls, error)
        except Exception as error:  # whatever one position does, the visitor goes on
            return failed(controls, error)

    def close(self) -> None:
        """End the workers once each has finished its position; those not begun are dropped."""
        self.pool.shutdown(cancel_futures=True)


class Newest:
    """Shows one visitor the answer to the newest position, and skips those in between."""

    def __init__(self, answers: Answers, show: Callable[[Results], None]) -> None:
        self.answers, self.show = answers, show
        self.waiting: Controls | None = None
        self.in_work = False

    async def ask(self, controls: Controls) -> None:
        """Compute and show a position, now or after the one that is in work."""
        self.waiting = controls
        if self.in_work:
            return
        self.in_work = True
        try:
            while self.waiting is not None:
                controls, self.waiting = self.waiting, None
                self.show(await self.answers.answer(controls))
        finally:
            self.in_work = False


def failed(controls: Controls, error: Exception) -> Results:
    """Return results that say why a position has none, with its command if it has one."""
    line = f"this position could not be computed: {type(error).__name__}: {error}"
    results = {"verdict": f'<div class="verdict bad">{escape(line)}</div>', **EMPTY}
    with suppress(Exception):  # what failed may be what the command is made of
        results["command"] = f'<code class="command">{escape(controls.command)}</code>'
    return results


def _start_worker() -> None:
    """Prepare a worker. Ctrl-C is the server's to handle, and a worker ends with its server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    read_all()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
