"""What a step costs, of three sources: real ranks, the program traced, the closed forms.

experiments/figures/simulator.py makes a table of it, and tests hold it to its bounds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from costs.messages import Key, payloads
from experiments.config import TrainConfig
from experiments.figures.matrix import PLANS
from experiments.figures.parity import Plan
from experiments.figures.short_runs import steady_costs
from experiments.ranks import run_ranks
from parallel.layout import Precision
from simulator.communication import exact, payload_bytes
from simulator.memory import memory
from simulator.plans import Plans
from simulator.trace import Traced, trace

PATIENCE_S = 1800.0  # of all plans of a world size
JOBS_OF_A_PROCESS = 4  # at the least: it imports torch, which takes as long as a few traces
# Long enough for activations to be a part of the memory
CHANGES: dict[str, Any] = {"steps": 3, "clip": 0.5, "seq_len": 128, "model.context": 128}
CHANGES["data.tokens"] = 30_000
Calls = dict[tuple[str, str, int, str, str], tuple[int, int]]


@dataclass(frozen=True)
class Agreement:
    """One rank of one plan: its step as measured and traced, and by formula."""

    plan: Plan
    config: TrainConfig
    rank: int
    measured: dict[str, Any]
    traced: Traced

    @property
    def place(self) -> int:
        """In the pipeline."""
        return self.rank // (self.config.layout.world_size // self.config.layout.pp)

    @property
    def plans(self) -> Plans:
        """For the closed forms. On a CPU, bf16 runs attention without a fused kernel
        (minigpt/attention.py)."""
        config = self.config
        flash, clipped = config.precision == Precision.fp32, config.clip is not None
        return Plans.of(config.model, config.layout, config.options, clipped=clipped, flash=flash)

    @property
    def calls(self) -> tuple[Calls, Calls]:
        """Messages, measured and traced."""
        return calls_of(self.measured["communication"]), calls_of(self.traced.rows)

    @property
    def payloads(self) -> tuple[dict[Key, int], dict[Key, int], dict[Key, int] | None]:
        """Bytes by collective, axis and dtype: measured, traced, by formula. The last is None where
        what is sent is not known beforehand."""
        config = self.config
        formula = None
        if exact(self.plans).all():
            clipped = config.clip is not None
            formula = payload_bytes(
                config.model, config.layout, config.options, clipped, self.place
            )
        return payloads(self.measured["communication"]), payloads(self.traced.rows), formula

    @property
    def peaks(self) -> tuple[int, int, int]:
        """Bytes: measured, traced, by formula."""
        measured, traced = self.measured["memory_bytes"], self.traced.memory_bytes
        return measured["peak"], traced["peak"], int(memory(self.plans, self.place).peak[0])


def calls_of(rows: list[dict[str, Any]]) -> Calls:
    """Calls and payload bytes by collective, axis, group size, dtype and phase."""
    return {
        (row["collective"], row["axis"], row["group_size"], row["dtype"], row["phase"]): (
            row["calls"],
            row["payload_bytes"],
        )
        for row in rows
    }


def plans_of(world_size: int) -> list[Plan]:
    """Those of docs/results/parity.md that are traced: not written by hand, nor through a library;
    nor with
    experts that tokens choose without a limit, for what is sent depends on them."""
    return [
        plan
        for plan in PLANS
        if plan.layout.world_size == world_size
        and "impl" not in plan.changes
        and not (plan.layout.ep > 1 and plan.config({}).model.capacity_factor is None)
    ]


def agreements(
    world_size: int, plans: list[Plan], changes: dict[str, Any] | None = None
) -> list[Agreement]:
    """Run and trace all plans: the last rank of each, and where stages differ the first, and one in
    the middle."""
    configs = [plan.config({**CHANGES, **(changes or {})}) for plan in plans]
    ranks = run_ranks(world_size, steady_costs, configs, timeout_s=PATIENCE_S)
    jobs = [(number, rank) for number, config in enumerate(configs) for rank in ranks_of(config)]
    traces = traced([(configs[number], rank) for number, rank in jobs])
    return [
        Agreement(plans[number], configs[number], rank, ranks[rank][number], one)
        for (number, rank), one in zip(jobs, traces, strict=True)
    ]


def ranks_of(config: TrainConfig) -> list[int]:
    """Ranks that differ: of the first stage, of one in the middle, and the last of all."""
    size, pp = config.layout.world_size, config.layout.pp
    first = [0, size // pp * (pp // 2)] if pp > 2 else [0] if pp > 1 else []
    return [*first, size - 1]


def traced(jobs: Sequence[tuple[TrainConfig, int]], gpu: bool = False) -> list[Traced]:
    """A trace of each (config, rank), in processes of their own: the world it makes is global."""
    count = max(1, min(len(jobs) // JOBS_OF_A_PROCESS, os.cpu_count() or 1))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as processes:
        return list(processes.map(_trace_one, jobs, [gpu] * len(jobs)))


def _trace_one(job: tuple[TrainConfig, int], gpu: bool) -> Traced:
    c, rank = job
    return trace(c.model, c.layout, c.options, rank, c.optimizer, c.clip, gpu)
