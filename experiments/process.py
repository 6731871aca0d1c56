"""Processes that end when they should: with their parent, and on a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

import psutil

from experiments import start

GRACE_S = 10  # between asking the ranks to end and making them
RANK, TORCHRUN = "experiments.worker", "experiments.agent"  # modules
ON_LOOPBACK = "loopback"  # how the latter lets the ranks of one machine meet
ASK_AGAIN_S = 5  # between two requests to save: ranks that torchrun starts again heard none
PARENT = "WORLDSIZE_PARENT"  # variable: the process id of the starter, for die_with_parent


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end while a run of it was at work, which has ended by now."""

    def __init__(self, number: int, reason: str | None) -> None:
        super().__init__(reason or "the run that was at work is done and kept")
        self.number = number


def module_command(module: str) -> list[str]:
    """Return the command that runs a module of this checkout in any current folder."""
    return [sys.executable, start.__file__, module]


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends, however that ends.

    `parent` is the parent's process id as the parent itself knew it; None takes it from the
    variable PARENT, if that is set. A process whose parent ended before it came here exits at once.
    """
    if sys.platform == "linux":
        parent = parent or int(os.environ.get(PARENT, os.getppid()))
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # Linux signals no death that has happened already
            os._exit(1)


def child_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment and `variables`, for a child that ends with it."""
    return {**os.environ, **(variables or {}), PARENT: str(os.getpid())}


REQUESTS: list[int] = []  # signals that asked this rank to save and stop, oldest first


def hear_requests(*numbers: signal.Signals) -> None:
    """Note these signals in REQUESTS from now on, instead of ending by them.

    The agent blocks SIGUSR1 for its ranks, so that one which comes while a rank's Python starts
    waits until here.
    """
    for number in numbers:
        signal.signal(number, lambda number, _frame: REQUESTS.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def end(status: int) -> None:
    """End this process at once: right runs may hang or abort in gloo's destructors (torch 2.13)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk, a terminal that was closed
            stream.flush()
    os._exit(status)


def not_ignored(*numbers: signal.Signals) -> list[signal.Signals]:
    """Return the signals that this process's caller has not told it to ignore."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


class Forwarding:
    """While open, the first signal to this process ends `process`, and a second one kills it.

    A scheduler's SIGTERM or SIGUSR1 (SLURM: --signal=USR1@60) asks the ranks, which are below
    `process`, to save after the step that they are in. They get as long as that takes: only the
    scheduler knows when it will kill all of them (SLURM's KillWait). A terminal's Ctrl-C and
    hang-up give them GRACE_S to end. Signals that the caller ignores stay ignored: nohup does so
    for the hang-up, a shell's `&` for Ctrl-C.
    """

    SAVE = (signal.SIGTERM, signal.SIGUSR1)
    END = (signal.SIGINT, signal.SIGHUP)

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.received = 0
        self.second = 0  # the signal that came after it
        self.saving = False

    def __enter__(self) -> Forwarding:
        numbers = not_ignored(*self.SAVE, *self.END)
        self.saved = {number: signal.signal(number, self._forward) for number in numbers}
        self.saved[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.alarm(0)
        for number, handler in self.saved.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            self.second = number
            self.process.kill()  # the ranks die with it: die_with_parent
            return
        self.received = number
        self.saving = number in self.SAVE and self._ask_ranks()
        if self.saving:
            name = signal.Signals(number).name
            said = f"launch.sh: {name}: the run saves and stops after the step that it is in"
            tell(f"{said}; a second signal ends it at once")
        else:
            self.process.send_signal(signal.SIGTERM)
            signal.alarm(GRACE_S)

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        if self.saving:
            self._ask_ranks()
        else:
            self.process.kill()

    def _ask_ranks(self) -> bool:
        """Ask the ranks that there are to save and stop; return False if there are none."""
        ranks = ranks_below(self.process.pid)
        for rank in ranks:  # and not torchrun, which would end them before the step is over
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)
        signal.alarm(ASK_AGAIN_S)
        return bool(ranks)


def tell(line: str) -> None:
    """Write a line to standard error from a signal handler, where print may not be entered."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode())


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
