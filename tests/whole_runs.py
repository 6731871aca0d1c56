"""Whole runs on forked ranks: a launch's training and ledger, without a launch's start-up.

Every run gets fresh ranks, so that its first step meets torch's caches cold, as a user's does.
"""

from __future__ import annotations

import os
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from costs import ledger as ledgers
from experiments.config import TrainConfig
from experiments.environment import Rank, settle
from experiments.explain import explain
from experiments.ranks import run_ranks
from experiments.run_folder import Launched, make_folder, write_config
from minigpt.corpus import prepare_for
from parallel.mesh import leave
from tests.configs import compose
from tests.launching import free_ports

TINY = (
    "data=generated",
    "data.tokens=20000",
    "model.n_layer=4",
    "model.d_model=32",
    "model.context=16",
    "validation.batches=1",
    "sample.tokens=4",
)


def settled(*overrides: str) -> TrainConfig:
    """Return the configuration of a tiny run, as a machine without GPUs settles it."""
    return settle(compose(*TINY, *overrides), None, gpus=0)


def whole_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train as `./launch.sh OVERRIDES run.dir=FOLDER` does and return the ledger that it wrote."""
    config = settled(*overrides)
    config = replace(config, run=replace(config.run, dir=str(folder)))
    corpus = prepare_for(config.data, config.model.vocab_size, config.seq_len)
    launched = Launched([], str(corpus.folder), time.time())
    write_config(make_folder(folder, config.layout), config, launched)
    (port,) = free_ports(1)
    run_ranks(config.layout.world_size, train_as_rank, config, launched, folder, port)
    return ledgers.read(folder / "ledger.json")


def train_as_rank(config: TrainConfig, launched: Launched, folder: Path, port: int) -> int:
    """Be one rank of a run: leave the group that forked ranks are born in, and train."""
    from experiments.train import train

    leave()
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank, size = int(os.environ["RANK"]), config.layout.world_size
    with open(folder / "logs" / f"out-{rank}.txt", "w") as out, redirect_stdout(out):
        return train(config, launched, folder, Rank(rank, rank, size))


def check_short(config: TrainConfig, ledger: dict[str, Any], left: int) -> None:
    """Assert that the ledger of a run of `left` steps has what was measured, and null elsewhere.

    The last step is the one for memory, the one before counts flops, and both are slowed, as the
    first one warms up: only a fourth step has a time.
    """
    for step in (ledger["step"], *ledger["ranks"]):
        timed = left > 3
        assert all((value is not None) == timed for value in step["time_s"].values()), step
        assert (step["tokens_per_s"] is not None) == (step["mfu"] is not None) == timed
        assert (step["hfu"] is not None) == timed
        assert (step["flops"]["hardware"] is not None) == (left > 1)
        assert step["memory_bytes"]["parameters"] > 0 and step["flops"]["model"] > 0
    for stage in ledger.get("pipeline", {}).get("stages", ()):
        assert (stage["bubble_s"] is not None) == (stage["bubble"] is not None) == timed
    for row in explain(config, ledger).rows:
        assert row.off in (0, None) or row.why, row  # experts are chosen freely
