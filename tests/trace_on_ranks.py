"""What tests of traces run on real ranks."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from costs import clock
from costs.trace import Trace
from experiments.assemble import make_batches
from experiments.config import TrainConfig
from experiments.metering import Meters
from experiments.tracing import make_trace
from experiments.train import train_step
from minigpt.corpus import prepare
from tests.on_ranks import make


def traced(configs: list[TrainConfig]) -> list[tuple[Trace | None, dict[str, Any]]]:
    """The trace of each run, on rank 0, and this rank's `step` of the ledger."""
    found = []
    for config in configs:
        trainer, _ = make(config)
        meters, batches = Meters(config, trainer), make_batches(config, prepare(config.data))
        for step in range(config.steps):
            train_step(step, config, trainer, batches, meters)
        costs = meters.costs()
        found.append((make_trace(meters), costs))
    return found


def offset_of_a_clock_that_is_ahead(seconds: float) -> float:
    """What rank 1 finds of its distance to rank 0, were they on two machines."""
    right = time.perf_counter
    if dist.get_rank() == 0:
        clock.answer(1)
        return 0.0
    with patch.object(clock.time, "perf_counter", lambda: right() + seconds):
        return clock.ask_first()
