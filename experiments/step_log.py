"""metrics.jsonl read back: which steps of a run were timed, how far apart they lie. No torch."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from costs.outside import read_bytes

MEMORY_STEP = 2  # the third: by then DDP has its final buckets and AdamW its moments
WARMUP_STEPS = 5  # left out of times: caches, compilation, first touches of memory
KEPT_STEPS = 500  # the last ones, of which the median is taken: a long run must not grow
FEWEST = 4  # values that have quartiles worth the name
SECONDS = re.compile(rb'"step_s": (\d+(?:\.\d+)?(?:e[-+]?\d+)?)[,}]')


def followed_steps(steps: int, first: int = 0) -> tuple[int, int]:
    """Return the step that is looked at operator by operator for flops, and the one for memory.

    `first` is the step with which this process begins. If a single step is left it is the one for
    memory, and no step counts flops: the first number is then below `first`."""
    memory = first + min(MEMORY_STEP, steps - first - 1)
    return memory - 1, memory


def untimed_steps(steps: int, compiled: bool, first: int = 0) -> set[int]:
    """Return the steps that do not count for times: they warm up, or are followed, which slows
    them. The first step always warms up: a compiled run of a single step has no time."""
    cold = set(range(first, first + max(1, min(WARMUP_STEPS, (steps - first) // 2))))
    return cold if compiled else cold | set(followed_steps(steps, first))


def timed_seconds(seconds: list[float], steps: int, compiled: bool) -> list[float]:
    """Of a run's steps those of which the ledger's time is the median."""
    untimed = untimed_steps(steps, compiled)
    return [s for i, s in enumerate(seconds) if i not in untimed][-KEPT_STEPS:]


def kernels_step(steps: int, first: int = 0) -> int | None:
    """Of a run of so many steps, the one whose kernels are recorded where that is asked for: the
    last that warms up, by when all is compiled. None where no such step is free."""
    last = first + min(WARMUP_STEPS, (steps - first) // 2) - 1
    return None if last < first or last in followed_steps(steps, first) else last


def read_seconds(path: Path) -> list[float]:
    """What each step took, of metrics.jsonl; a last line that was cut off is left out. A run that
    was killed has fewer than it wanted. Raises ValueError, one line."""
    try:
        whole, _, _ = read_bytes(path).rpartition(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # of three hundred thousand lines only this is asked for, and a parser reads all that they say
    found = SECONDS.findall(whole)
    lines = whole.count(b"\n") + 1 if whole else 0
    if len(found) != lines:
        raise ValueError(f"{path}: not a log of steps: {lines} lines, {len(found)} with seconds")
    return [float(number) for number in found]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a line that a kill or a full disk cut short is left out.
    Raises ValueError, one line, where the file is larger than is read or no regular file."""
    if not path.exists():
        return []
    try:
        whole = read_bytes(path).decode(errors="replace")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = []
    for text in whole.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        known = isinstance(line, dict) and {"step", "loss", "skipped"} <= line.keys()
        if known and type(line["step"]) is int:
            found.append(line)
    return found


def half_spread(values: list[float]) -> float | None:
    """Half the distance between the quartiles: what one value says about where the middle is.
    None of fewer than FEWEST values."""
    if len(values) < FEWEST:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
