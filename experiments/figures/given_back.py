"""Recorded runs, replayed on their own messages: how near that is to the step that was measured."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from costs.trace import Trace
from experiments.calibrate.models import PATIENCE_S
from experiments.figures.parity import make_config
from experiments.figures.short_runs import recorded
from experiments.predict.replay import with_delays
from experiments.ranks import run_ranks
from parallel.layout import Layout
from simulator.event_times import measured_message, measured_work
from simulator.replay import replay

CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(dp_replicate=2), {}),
    (Layout(dp_shard=2), {}),
    (Layout(tp=2), {}),
    (Layout(pp=2), {"gradient_accumulation_steps": 4}),
]
SMALL: dict[str, Any] = {"steps": 8, "trace": True, "model.d_model": 64}


def given_back(times: int) -> dict[str, list[float]]:
    """By layout, of so many runs: the step of the slowest rank, replayed over measured."""
    configs = [make_config(layout, {**SMALL, **changes}) for layout, changes in CASES]
    runs = [config for config in configs for _ in range(times)]
    first, _ = run_ranks(2, recorded, runs, timeout_s=PATIENCE_S)
    ratios: dict[str, list[float]] = defaultdict(list)
    for config, (trace, _) in zip(runs, first, strict=True):
        ratios[config.layout.label].append(_ratio(trace))
    return ratios


def _ratio(trace: Trace) -> float:
    programs = {rank: with_delays(rank, own, trace) for rank, own in trace.programs.items()}
    measured = max(spent["total"] for spent in trace.about["seconds"].values())
    return replay(programs, measured_work, measured_message, queued=False).total / measured
