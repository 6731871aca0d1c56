"""metrics.jsonl read back: which steps of a run were timed, how far apart they lie. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MEMORY_STEP = 2  # the third: by then DDP has its final buckets and AdamW its moments
WARMUP_STEPS = 5  # left out of times: caches, compilation, first touches of memory
KEPT_STEPS = 500  # the last ones, of which the median is taken: a long run must not grow
FEWEST = 4  # values that have quartiles worth the name


def followed_steps(steps: int) -> tuple[int, int]:
    """Of a run of so many steps, the one that is looked at operator by operator for flops, and the
    one for memory. A run of one step does not count its flops."""
    memory = min(MEMORY_STEP, steps - 1)
    return memory - 1, memory


def is_timed(index: int, steps: int, compiled: bool) -> bool:
    """Whether step `index` of so many counts for times: warm, and not slowed by being followed."""
    warm = index >= min(WARMUP_STEPS, steps // 2)
    return warm and (compiled or index not in followed_steps(steps))


@dataclass(frozen=True)
class StepLog:
    """What rank 0 wrote after each step. A run that was killed has fewer than it wanted."""

    losses: list[float | None]  # null where it was not finite
    seconds: list[float]

    def timed(self, steps: int, compiled: bool) -> list[float]:
        """Seconds of the steps of which the ledger's is the median."""
        seconds = enumerate(self.seconds)
        return [s for i, s in seconds if is_timed(i, steps, compiled)][-KEPT_STEPS:]


def read_log(path: Path) -> StepLog:
    """Read metrics.jsonl; a last line that was cut off is left out. Raises ValueError, one line."""
    try:
        whole, _, _ = path.read_text().rpartition("\n")
        # one call for all lines: a thousand runs have some hundred thousand
        lines: list[dict[str, Any]] = json.loads(f"[{whole.strip().replace(chr(10), ',')}]")
        losses = [line["loss"] for line in lines]
        seconds = [float(line["step_s"]) for line in lines]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a log of steps: {str(error).splitlines()[0]}") from error
    return StepLog(losses, seconds)


def half_spread(values: list[float]) -> float | None:
    """Half the distance between the quartiles: what one value says about where the middle is.
    None of fewer than FEWEST values."""
    if len(values) < FEWEST:
        return None
    low, high = np.percentile(values, (25, 75))
    return float(high - low) / 2
