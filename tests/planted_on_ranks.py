"""What a planted bug changes, seen from the ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from experiments.config import TrainConfig
from experiments.figures.parity import Trajectory, trajectory
from tests.on_ranks import make
from tests.planted import PLANTS


@dataclass(frozen=True)
class Seen:
    run: Trajectory
    masks: bool = True  # whether each tp rank masks its own heads, and all mask copies alike


def run_planted(names: list[str | None], configs: list[TrainConfig]) -> list[Seen]:
    """Each config with the plant of that name, or with none: one start of ranks for all."""
    torch.set_num_threads(1)
    bugs = {plant.name: plant.bug for plant in PLANTS}
    seen = []
    for name, config in zip(names, configs, strict=True):
        with bugs[name]() if name else nullcontext():
            seen.append(Seen(trajectory(config), masks_hold(config)))
    return seen


def masks_hold(config: TrainConfig) -> bool:
    """Whether dropout draws as tensor parallelism needs it; no single process can say that."""
    if not config.model.dropout or config.layout.tp == 1:
        return True
    trainer, _ = make(replace(config, steps=1))
    block = next(iter(trainer.replica.stages[0].blocks.values()))
    ones = torch.ones(1, 1, 8, 8)
    of_heads = block.attention.attend(ones, ones, ones, 0.5)  # type: ignore[union-attr, operator]
    of_copies = torch.rand(8)
    held: list = [None] * config.layout.tp
    dist.all_gather_object(held, (of_heads.tolist(), of_copies.tolist()))
    heads, copies = ([numbers for numbers in kind] for kind in zip(*held, strict=True))
    apart = all(a != b for i, a in enumerate(heads) for b in heads[:i])
    return apart and all(numbers == copies[0] for numbers in copies)
