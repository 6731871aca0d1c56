"""Short training runs on real ranks, and what they cost: what predictions are held to."""

from __future__ import annotations

from typing import Any

import torch

from costs.trace import Trace
from experiments.assemble import make_batches, make_trainer
from experiments.config import TrainConfig
from experiments.figures.parity import mesh_of
from experiments.metering import Meters
from experiments.tracing import make_trace
from experiments.train import train_step
from minigpt.corpus import prepare
from simulator.trace import no_collector


def run_of(config: TrainConfig) -> Meters:
    """The meters of a run, by one thread. Every rank of the layout calls it."""
    torch.set_num_threads(1)
    trainer = make_trainer(config, mesh_of(config.layout))
    meters, batches = Meters(config, trainer), make_batches(config, prepare(config.data))
    for step in range(config.steps):
        train_step(step, config, trainer, batches, meters)
    return meters


def step_costs(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """This rank's `step` of the ledger after a run of each."""
    return [run_of(config).costs() for config in configs]


def steady_costs(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """The same without Python's garbage collector: now and then one of tp4's ranks would reach its
    peak of memory at another moment (5 of 24, where it ran often)."""
    found = []
    for config in configs:
        with no_collector():
            found.append(run_of(config).costs())
    return found


def recorded(configs: list[TrainConfig]) -> list[tuple[Trace | None, dict[str, Any]]]:
    """The trace of each run, on rank 0, and this rank's `step` of the ledger."""
    found = []
    for config in configs:
        meters = run_of(config)
        costs = meters.costs()
        found.append((make_trace(meters), costs))
    return found
