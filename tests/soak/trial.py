"""A trial does to worldsize what a user once did, and checks what happens now.

Trials are too long for every test run: 50 kills, 20 pairs of first launches, 32 ranks. They are
registered by `@trial(GROUP, CASE)` in the other modules of this folder; `./launch.sh test -m soak`
runs them as tests and `./launch.sh python -m tests.soak` writes docs/results/trials.md from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """One case and the function that tries it."""

    group: str  # the heading that the case stands under
    case: str  # what is done, in one line
    run: Callable[[Path], str]  # takes an empty folder, returns what happened, raises if wrong

    @property
    def name(self) -> str:
        """The name that selects the trial on the command line: `module.function`."""
        return f"{self.run.__module__.rpartition('.')[2]}.{self.run.__name__}"


TRIALS: list[Trial] = []


def trial(group: str, case: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Register the decorated function as the trial of `case`.

    The function asserts what must hold and returns one line about what it saw, which becomes the
    case's row in docs/results/trials.md.
    """

    def register(run: Callable[[Path], str]) -> Callable[[Path], str]:
        TRIALS.append(Trial(group, case, run))
        return run

    return register
