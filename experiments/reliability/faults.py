"""Runs in which one rank fails on purpose: the tests' and docs/results/reliability.md's.

torchrun --nproc-per-node 2 -m experiments.reliability.faults RUN_FOLDER FAULT RANK STEP

It is experiments.worker, but for what rank RANK does when it should begin step STEP.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import environment
from experiments.launch import Job
from experiments.process import RANK, die_with_parent
from experiments.verdict import path_of

HOURS_S = 3 * 3600.0


def hang(_trainer: Any) -> None:
    time.sleep(HOURS_S)


def stop(_trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spin(_trainer: Any) -> None:
    """Never gives Python's lock back for long, and never comes."""
    end = time.monotonic() + HOURS_S
    while time.monotonic() < end:
        pass


def other_collective(_trainer: Any) -> None:
    """Where the others begin their step, a message that they know nothing of."""
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.zeros(7), src=dist.get_rank())
    time.sleep(HOURS_S)


def raises(_trainer: Any) -> None:
    raise LookupError("on purpose")


def out_of_memory(_trainer: Any) -> None:
    import torch

    torch.empty(2**52)


def killed(_trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def drifts(trainer: Any) -> None:
    """Change one number of a weight by more than what weight decay rounds away again."""
    trainer.parameters[0].data.view(-1)[:1] += 1


def nan_gradient(trainer: Any) -> None:
    poison(trainer, "gradient", math.nan)


FAULTS: dict[str, Callable[[Any], None]] = {
    "hang": hang,
    "spin": spin,
    "stop": stop,
    "other-collective": other_collective,
    "raise": raises,
    "memory": out_of_memory,
    "kill": killed,
    "drift": drifts,
    "nan-gradient": nan_gradient,
}


PLACES = ("loss", "gradient", "shard")


def poison(trainer: Any, where: str, value: float) -> None:
    """Let this rank's next step have `value` in its loss, in its gradients before the ranks' are
    added up (`gradient`), or in its own piece of one afterwards (`shard`)."""
    from parallel.gradients import local

    forward_backward, hooks = trainer._forward_backward, []
    if where == "gradient":  # what comes back through the first block
        block = next(iter(trainer.replica.stages[0].blocks.values()))

        def spoil(_module: Any, _inputs: Any, output: Any) -> None:
            output.register_hook(lambda gradient: gradient * value)

        hooks.append(block.register_forward_hook(spoil))

    def once(micro_batches: Any) -> Any:
        totals = forward_backward(micro_batches)
        trainer._forward_backward = forward_backward
        for hook in hooks:
            hook.remove()
        if where == "loss":
            totals[0] = value
        if where == "shard":
            local(trainer.parameters[-1].grad).view(-1)[:1] = value
        return totals

    trainer._forward_backward = once


def with_fault(job: Job, fault: str, rank: int, step: int) -> Job:
    """The same job, with a fault in it."""
    start = job.command.index(RANK)
    command = [*job.command[:start], "experiments.reliability.faults", *job.command[start + 1 :]]
    return replace(job, command=[*command, fault, str(rank), str(step)])


def main(folder: str, fault: str, rank: str, step: str) -> None:
    """Be a rank, with the fault where it is this one's, in the first start only."""
    from experiments import train as training
    from experiments.worker import main as work

    own = environment.given_rank() or environment.Rank(0, 0, 1)
    train_step = training.train_step

    def faulty(number: int, config: Any, trainer: Any, *others: Any) -> Any:
        if number == int(step):
            path_of(Path(folder), own.rank, "fault").write_text(str(time.time()))
            FAULTS[fault](trainer)
        return train_step(number, config, trainer, *others)

    if own.rank == int(rank) and environment.restarts() == 0:
        training.train_step = faulty  # type: ignore[assignment]
    work(Path(folder))


if __name__ == "__main__":
    die_with_parent()
    main(*sys.argv[1:])
