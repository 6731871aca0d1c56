"""What the kernel counts on the loopback device while strategies train, beside their ledgers.

    measure(2)      every strategy on two ranks

The ranks run in a network namespace (loopback.py), all strategies of a world size one
after the other on the same ranks, for starting ranks is what takes time.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from costs.messages import Row, rows_of
from experiments.assemble import make_batches, make_trainer
from experiments.config import TrainConfig
from experiments.figures.loopback import bring_up, python_in_namespace, sent_bytes
from experiments.figures.matrix import CAPPED, FILLED, KEPT, SEQUENCE, plan, schedule
from experiments.figures.parity import Plan, mesh_of
from experiments.metering import Meters
from experiments.ranks import run_ranks
from experiments.step_log import MEMORY_STEP
from experiments.train import train_step
from minigpt.corpus import prepare

FIRST = MEMORY_STEP + 1  # the number of the first step: no meter looks at its operators
WARMUP = 2  # steps; by then DDP has its final buckets
STEPS = 2  # between two readings of the counters
# wide enough that headers are no more than a few thousandths
WIDE: dict[str, Any] = {"model.d_model": 128, "seq_len": 64, "model.context": 64, "clip": 1.0}


def strategies(world_size: int) -> list[Plan]:
    """Each strategy alone, and where there are ranks enough some of them together."""
    n = world_size
    alone = [
        plan("ddp", dp_replicate=n),
        plan("zero1", {"zero_stage": 1}, dp_shard=n),
        plan("zero2", KEPT, dp_shard=n),
        plan("fsdp", dp_shard=n),
        plan("tp", tp=n),
        plan("tp_sp", SEQUENCE, tp=n),
        plan("pp", FILLED, pp=n),
        plan("cp", cp=n),
        plan("ep of fsdp", CAPPED, dp_shard=n, ep=n),
    ]
    if n == 2:
        return [*alone, plan("pp, zero bubble", schedule("interleaved_zero_bubble"), pp=2)]
    return [
        *alone,
        plan("hsdp", dp_replicate=2, dp_shard=n // 2),
        plan("fsdp x tp_sp", SEQUENCE, dp_shard=2, tp=n // 2),
        plan("pp x ddp", FILLED, pp=2, dp_replicate=n // 2),
        plan("pp x tp", FILLED, pp=2, tp=n // 2),
        plan("cp x fsdp", cp=2, dp_shard=n // 2),
        plan("ep of hsdp", CAPPED, dp_replicate=2, dp_shard=n // 2, ep=2),
    ]


@dataclass(frozen=True)
class Counted:
    """One strategy's step."""

    name: str
    config: TrainConfig
    rows: list[list[Row]]  # of each rank's ledger
    kernel_bytes: float  # of a step, sent by all ranks together, headers and all

    def total(self, key: str) -> int:
        """Of all ranks' rows; a message between two is counted where it is sent."""
        rows = [row for rank in self.rows for row in rank if row["collective"] != "recv"]
        return sum(row[key] for row in rows)

    @property
    def framing(self) -> float:
        """What the kernel counted beyond what gloo's algorithms send, as a share of that."""
        return self.kernel_bytes / self.total("backend_bytes") - 1


def measure(world_size: int) -> list[Counted]:
    """Every strategy. Raises OSError where no network namespace can be had."""
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "result"
        python_in_namespace(__spec__.name, str(world_size), str(result))
        return pickle.loads(result.read_bytes())


def steps_between_readings(configs: list[TrainConfig]) -> list[tuple[list[Row], float]]:
    """On one rank: its rows of a step, and the bytes that all ranks sent in it."""
    torch.set_num_threads(1)
    return [_one(config) for config in configs]


def _one(config: TrainConfig) -> tuple[list[Row], float]:
    mesh = mesh_of(config.layout)
    trainer = make_trainer(config, mesh)
    meters, batches = Meters(config, trainer), make_batches(config, prepare(config.data))
    for step in range(FIRST, FIRST + WARMUP):
        train_step(step, config, trainer, batches, meters)
    dist.barrier()
    before = sent_bytes()
    for step in range(FIRST + WARMUP, FIRST + WARMUP + STEPS):
        train_step(step, config, trainer, batches, meters)
    dist.barrier()
    counted = (sent_bytes() - before) / STEPS
    dist.barrier()  # nobody goes on to send before all have read
    assert meters.last is not None
    return rows_of(meters.last.calls, mesh.axis_of_ranks()), counted


def main(world_size: int, result: Path) -> None:
    """In the namespace."""
    bring_up()
    plans = strategies(world_size)
    configs = [one.config(WIDE) for one in plans]
    ranks = run_ranks(world_size, steps_between_readings, configs)
    counted = [
        Counted(one.name, config, [rank[i][0] for rank in ranks], ranks[0][i][1])
        for i, (one, config) in enumerate(zip(plans, configs, strict=True))
    ]
    result.write_bytes(pickle.dumps(counted))


if __name__ == "__main__":
    # by its own name: what is pickled here is read elsewhere
    from experiments.figures import kernel_bytes

    kernel_bytes.main(int(sys.argv[1]), Path(sys.argv[2]))
