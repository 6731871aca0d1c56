"""What an operator of DTensors takes the host: simulator/trace_recorder.py's DISPATCH.

./launch.sh python -m experiments.figures.dispatch    half a minute

Two ranks train layers so small that a step is the host's time alone: under tp each operator is one
of DTensors, under ddp none.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from costs.program import Work
from experiments.calibrate.check import configurations
from experiments.config import TrainConfig
from experiments.figures.agreement import traced
from experiments.figures.short_runs import step_costs
from experiments.predict import clusters
from experiments.ranks import run_ranks
from simulator.trace_recorder import DISPATCH

WIDTH, SEQUENCE, TURNS = 32, 16, 3
PROFILE = "laptop"


def small(name: str) -> TrainConfig:
    config = configurations()[name]
    model = replace(config.model, d_model=WIDTH, n_head=2, context=SEQUENCE)
    return replace(config, model=model, seq_len=SEQUENCE)


def compute_seconds(config: TrainConfig) -> float:
    """Of a step of the first rank, without what waits for messages."""
    runs = [run_ranks(2, step_costs, [config])[0][0] for _ in range(TURNS)]
    return statistics.median(run["time_s"]["compute"] for run in runs)


def main() -> None:
    configs = {name: small(name) for name in ("tp", "ddp")}
    tp, ddp = (compute_seconds(config) for config in configs.values())
    (found,) = traced([(configs["tp"], 0)])
    works = [event for event in found.program if isinstance(event, Work)]
    operators = sum(work.operators - 1 for work in works) / DISPATCH
    each = clusters.load(PROFILE).operator_overhead
    print(
        f"compute of a step: {1e3 * tp:.1f} ms under tp, {1e3 * ddp:.1f} under ddp; "
        f"{operators:.0f} operators of DTensors, {1e6 * (tp - ddp) / operators:.0f} us each, which "
        f"is {(tp - ddp) / operators / each:.2f} of cluster={PROFILE}'s {1e6 * each:.0f} us an "
        f"operator (DISPATCH: {DISPATCH})"
    )


if __name__ == "__main__":
    main()
