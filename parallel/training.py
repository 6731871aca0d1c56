"""From a replica to a trainer: the update rule over this rank's weights, and how a step counts."""

from __future__ import annotations

import torch

from minigpt.config import OptimizerConfig
from minigpt.optimizer import build_optimizer
from parallel.layout import Options, Precision
from parallel.precision import LossScaler
from parallel.replica import Replica
from parallel.step import Trainer
from parallel.strategies import strategies


def trainer_of(
    replica: Replica,
    optimizer: OptimizerConfig,
    options: Options,
    clip: float | None,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """A trainer of a replica that was made with the same `options`. Needs a resolved lr."""
    return kind(
        replica,
        optimizer_of(replica, optimizer, options),
        micro_batch_tokens=options.micro_batch_size * options.seq_len,
        accumulation=options.micro_batches,
        clip=clip,
        scaler=LossScaler() if options.precision == Precision.fp16 else None,
    )


def optimizer_of(
    replica: Replica, config: OptimizerConfig, options: Options
) -> torch.optim.Optimizer:
    """The update rule over this rank's weights; ZeRO's first stage shares the work out."""
    shards = replica.mesh.data("shard")
    if options.zero_stage == 1 and shards is not None:
        shard = strategies(options.impl).sharded_optimizer
        return shard(replica.named_parameters(), config, shards.get_group())
    return build_optimizer(replica.named_parameters(), config)
