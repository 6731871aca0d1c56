"""Processes that end when they should: with their parent, and on a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

GRACE_S = 10  # between asking the ranks to end and making them
RANK, TORCHRUN = "experiments.worker", "experiments.agent"  # modules
ON_LOOPBACK = "loopback"  # how the latter lets the ranks of one machine meet
SAVE_S = 25  # between asking the ranks to save and ending them: SLURM's KillWait is 30


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


class Forwarding:
    """While open, the first signal to this process ends `process`, and a second one kills it.

    A scheduler's SIGTERM or SIGUSR1 (SLURM: --signal=USR1@60) lets the ranks, which are below
    `process`, save first; a terminal's Ctrl-C and hang-up do not wait for that.
    """

    SAVE = (signal.SIGTERM, signal.SIGUSR1)
    END = (signal.SIGINT, signal.SIGHUP)

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.received = 0

    def __enter__(self) -> Forwarding:
        numbers = (*self.SAVE, *self.END)
        self.saved = {number: signal.signal(number, self._forward) for number in numbers}
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
        ranks = ranks_below(self.process.pid) if number in self.SAVE else []
        if ranks:
            # to each rank, and not to torchrun, which would end them before the step is over
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1)
            signal.alarm(SAVE_S)
        else:
            self.process.send_signal(signal.SIGTERM)
            signal.alarm(GRACE_S)


def ranks_below(parent: int) -> list[psutil.Process]:
    """The ranks that were started by `parent`, or by what it started: a torchrun or several."""
    found = []
    for process in children(parent, recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if RANK in line and TORCHRUN not in line:  # torchrun's own line names both
            found.append(process)
    return found


def children(parent: int, recursive: bool = False) -> list[psutil.Process]:
    """The processes that `parent` started itself (`recursive`: or they did), if still there."""
    try:
        return psutil.Process(parent).children(recursive)
    except psutil.NoSuchProcess:
        return []


def end_stopped_siblings() -> None:
    """End ranks of this machine that are stopped (SIGSTOP): they would take no SIGTERM, and
    torchrun would wait for them."""
    for rank in children(os.getppid()):
        try:
            if rank.status() == psutil.STATUS_STOPPED:
                rank.send_signal(signal.SIGTERM)  # pending: the first that it sees
                rank.send_signal(signal.SIGCONT)
        except psutil.Error:
            continue
