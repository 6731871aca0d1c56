"""Runs that are stopped and go on, on real ranks: what the tests and docs/results/reliability.md
ask of."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.assemble import make_batches, make_trainer, set_step, share_of_batch
from experiments.config import TrainConfig
from experiments.figures.parity import mesh_of
from minigpt.corpus import prepare
from parallel.checkpoint import Writer, restore, state_of
from parallel.checkpoint_reader import read_whole
from parallel.step import Trainer

Losses = list[float]


def train_on(config: TrainConfig, trainer: Trainer, first: int, last: int) -> Losses:
    """Steps first ... last - 1."""
    batches = make_batches(config, prepare(config.data))
    losses = []
    for step in range(first, last):
        set_step(trainer, config, step)
        share = share_of_batch(batches, step, config, trainer.replica.mesh)
        losses.append(trainer.step(list(share)).loss)
    return losses


def write(trainer: Trainer, folder: Path) -> None:
    """A checkpoint without a manifest."""
    Writer(trainer.replica.mesh, asynchronous=False).write(state_of(trainer), folder, lambda: None)


def stop_and_go_on(
    configs: list[TrainConfig], folder: Path, at: int, asynchronous: bool = False
) -> list[tuple[Losses, Losses]]:
    """Each run undisturbed, and from its checkpoint after `at` steps: both losses of the rest.

    Leaves folder/NUMBER and, of the ends of both, folder/NUMBER-whole and folder/NUMBER-resumed.
    """
    torch.set_num_threads(1)
    results = []
    for number, config in enumerate(configs):
        place, mesh = folder / str(number), mesh_of(config.layout)
        trainer = make_trainer(config, mesh)
        train_on(config, trainer, 0, at)
        writer = Writer(mesh, asynchronous)
        writer.write(state_of(trainer), place, lambda: None)
        whole = train_on(config, trainer, at, config.steps)
        writer.wait()
        write(trainer, folder / f"{number}-whole")
        resumed = make_trainer(config, mesh)
        restore(resumed, place, same_layout=True)
        results.append((whole, train_on(config, resumed, at, config.steps)))
        write(resumed, folder / f"{number}-resumed")
    return results


def load_and_go_on(
    configs: list[TrainConfig], sources: list[Path], copies: list[Path], at: int
) -> list[Losses]:
    """Each run from a source, whatever layout wrote it; what it loaded is written to its copy."""
    torch.set_num_threads(1)
    results = []
    for config, source, copy in zip(configs, sources, copies, strict=True):
        trainer = make_trainer(config, mesh_of(config.layout))
        restore(trainer, source, same_layout=False)
        write(trainer, copy)
        results.append(train_on(config, trainer, at, config.steps))
    return results


def same_state(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights and optimizer, to the bit."""
    for kind in ("model", "optimizer"):
        ours, theirs = read_whole(a, kind), read_whole(b, kind)
        equal = ours.keys() == theirs.keys() and all(
            torch.equal(ours[name], theirs[name]) for name in ours
        )
        if not equal or not ours:
            return False
    return True
