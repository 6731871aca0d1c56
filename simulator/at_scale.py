"""A whole training run on many devices: how long, how dear, and what failures take of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

CHINCHILLA = 20.0  # tokens a parameter (Hoffmann et al. 2022, table 3: 20.2 to 22.4 for 1 to 67 B)
HOUR = 3600.0
# 16,384 devices, 54 days, 419 unexpected interruptions (Grattafiori et al. 2024, The Llama 3 Herd
# of Models, section 3.3.4): device-hours between two
LLAMA3_DEVICE_MTBF_S = 16_384 * 54 * 24 * HOUR / 419


@dataclass
class Failures:
    """What a failure costs. Seconds."""

    device_mtbf_s: float = LLAMA3_DEVICE_MTBF_S  # mean time between the failures of one device
    checkpoint_s: float = 30.0  # for which training stands still
    restart_s: float = 600.0  # from a failure until the last checkpoint's step is trained again

    def __post_init__(self) -> None:
        for key in ("device_mtbf_s", "checkpoint_s", "restart_s"):
            value = getattr(self, key)
            zero = key == "restart_s" and value == 0
            if not (math.isfinite(value) and value > 0) and not zero:
                raise ValueError(f"failures.{key}={value}: must be greater than 0")


@dataclass(frozen=True)
class Training:
    """A run to its end. Seconds; dollars, or what else the price is in."""

    tokens: float
    steps: float
    time_s: float  # with failures
    goodput: float  # share of the time that trains
    checkpoint_interval_s: float  # the best, of useful work between two checkpoints
    failures: float  # that are to be expected
    device_hours: float
    cost: float | None  # None: no price was given


def optimal_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Useful seconds between checkpoints that waste least (Daly 2006, A higher order estimate of
    the optimum checkpoint interval, eq. 37; its first term is Young 1974's).

    `mtbf_s`: of all devices together.
    """
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    x = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - checkpoint_s


def goodput(interval_s: float, failures: Failures, mtbf_s: float) -> float:
    """The share of time that trains: useful seconds over the expected seconds of an interval with
    its checkpoint, restarts and lost work; failures come as a Poisson process (Daly 2006, eq. 20).
    """
    attempt = (interval_s + failures.checkpoint_s) / mtbf_s
    if attempt + failures.restart_s / mtbf_s > 700:  # e^700 is near the largest double
        return 0.0
    expected = mtbf_s * math.exp(failures.restart_s / mtbf_s) * math.expm1(attempt)
    return interval_s / expected


def train(
    tokens: float,
    tokens_of_step: float,
    step_s: float,
    devices: int,
    failures: Failures,
    price: float | None = None,
) -> Training:
    """A run over `tokens` at `step_s` a step. `price`: of a device-hour."""
    mtbf_s = failures.device_mtbf_s / devices
    interval = optimal_interval(failures.checkpoint_s, mtbf_s)
    share = goodput(interval, failures, mtbf_s)
    steps = tokens / tokens_of_step
    time_s = steps * step_s / share if share else math.inf
    hours = devices * time_s / HOUR
    return Training(
        tokens,
        steps,
        time_s,
        share,
        interval,
        time_s / mtbf_s,
        hours,
        None if price is None else price * hours,
    )


def chinchilla_tokens(parameters: int) -> float:
    """Tokens that train a model of that size at the least loss for the flops."""
    return CHINCHILLA * parameters
