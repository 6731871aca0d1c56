"""A training run to its end, for simulate and search: time, money, goodput."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console

from experiments.predict.plan_config import ScaleConfig, count_of
from simulator.at_scale import HOUR, chinchilla_tokens, train


def run_to_the_end(
    scale: ScaleConfig, parameters: int, tokens_of_step: float, step_s: float, devices: int
) -> dict[str, Any] | None:
    """What training on `scale.tokens` takes; None where no tokens are given."""
    if scale.tokens is None:
        return None
    given = str(scale.tokens)
    tokens = (
        chinchilla_tokens(parameters) if given == "chinchilla" else count_of("scale.tokens", given)
    )
    run = train(tokens, tokens_of_step, step_s, devices, scale.failures, scale.price)
    if math.isinf(run.time_s):
        return {**asdict(run), "time_s": None, "failures": None, "device_hours": None, "cost": None}
    return asdict(run)


def say_scale(console: Console, run: dict[str, Any]) -> None:
    """One line."""
    if run["time_s"] is None:
        console.print("it would never end: devices fail faster than a checkpoint is written")
        return
    days, hours = run["time_s"] / HOUR / 24, run["device_hours"]
    cost = "" if run["cost"] is None else f", cost {run['cost']:,.0f}"
    console.print(
        f"{run['tokens']:.3g} tokens: {run['steps']:,.0f} steps, {days:,.1f} days, "
        f"{hours:,.0f} device-hours{cost}; {run['failures']:,.1f} failures to expect, a checkpoint "
        f"every {run['checkpoint_interval_s'] / 60:,.1f} min, goodput {100 * run['goodput']:.1f} %",
        highlight=False,
    )
