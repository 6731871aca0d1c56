"""A run's checkpoints from inside a rank: where it begins, when it saves, and when it stops."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments import checkpoints, environment
from experiments.assemble import seed_dropout
from experiments.checkpoints import Checkpoint
from experiments.config import TrainConfig
from experiments.process import REQUESTS
from experiments.resume import AUTO, check_fits, choose, same_layout
from experiments.run_folder import settings_of
from experiments.run_weights import is_base
from experiments.schedule_warnings import schedule_warnings
from experiments.verdict import failure
from minigpt.corpus import Corpus
from parallel.checkpoint import Writer, restore, state_of
from parallel.drift import check_copies
from parallel.step import Trainer


class Saver:
    """Begins where a checkpoint ended, and writes new ones. Every rank has one, in step."""

    def __init__(
        self, config: TrainConfig, folder: Path, trainer: Trainer, corpus: Corpus, run: str
    ) -> None:
        """`run`: the run's own name, which ties its files to it."""
        self.config, self.folder, self.trainer = config, folder, trainer
        self.mesh = trainer.replica.mesh
        self.settings, self.corpus, self.run = settings_of(config), corpus, run
        self.writer = Writer(self.mesh, config.checkpoint.asynchronous)
        self.source: Path | None = None  # the run that this one goes on with
        self.said: list[str] = []  # for the user, when the run begins
        self.say: Callable[[str], None] = self.said.append  # from then on
        self.start = f"{run[:8]}-{environment.restarts()}"
        self.warned: set[str] = set()
        self.warnings: list[str] = []  # of the thread that publishes, not said yet

    def begin(self) -> int:
        """Take over the state that the run is to go on from; returns the number of steps done."""
        found, self.said = self._agree()
        if found is None:
            return 0
        trainer, same = self.trainer, same_layout(found, self.settings)
        seed_dropout(self.config, self.mesh, found.step)
        restore(trainer, found.folder, same)
        if trainer.scaler and found.manifest["scaler"]:
            for key in vars(trainer.scaler):
                setattr(trainer.scaler, key, found.manifest["scaler"][key])
        self.source = found.run
        return found.step

    def _agree(self) -> tuple[Checkpoint | None, list[str]]:
        """Rank 0 looks and checks; all go on from the same, or all raise what it raised."""
        answer: list[Any] = [None]
        if self.mesh.rank == 0:
            try:
                answer = [self._find()]
            except (ValueError, OSError) as error:
                answer = [str(error)]
        if dist.is_initialized():
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], str):
            raise ValueError(answer[0])
        return answer[0]

    def _find(self) -> tuple[Checkpoint | None, list[str]]:
        """What to go on from, and what to tell the user. Damaged ones of its own are set aside."""
        left = [f"warning: {line}" for line in checkpoints.clean(self.folder)]
        resume, again = self.config.resume, environment.restarts()
        found = choose(AUTO, self.folder) if again or resume == AUTO else None
        if found is None and resume != AUTO:
            found = None if is_base(self.config) else choose(resume, self.folder)
        said = [f"start {again + 1} of this run: {failure(self.folder)}"] if again else []
        said += left
        if found is None:
            said += [f"warning: {line}" for line in schedule_warnings(self.config, None)]
        if found is None:
            if again or resume == AUTO:
                said.append(f"no checkpoint in {self.folder}: starting from step 0")
            return None, said
        check_fits(found, self.settings, self.config.batch_size, self.corpus)
        said += [f"skipped, damaged: {reason}" for reason in found.skipped]
        if found.skipped:
            newer = checkpoints.steps_of(found.run)
            aside = checkpoints.set_aside(newer[: newer.index(found.folder)])
            said += [f"warning: {line}" for line in aside if "could not" in line]
        said += [f"warning: {line}" for line in schedule_warnings(self.config, found)]
        return found, [*said, f"going on from {found.folder}, after {found.step} steps"]

    def after(self, step: int, stop: bool) -> bool:
        """Save where it is time to, or where all ranks are to stop here; returns `stop`."""
        if is_saved(self.config, step) or (stop and step + 1 < self.config.steps):
            self.save(step + 1)
        return stop

    def save(self, done: int) -> None:
        """Write the state after `done` steps, if all copies of it agree. Raises Drifted."""
        check_copies(self.trainer.replica, self.trainer.optimizer)
        folder = checkpoints.folder_of(self.folder, done)
        facts, keep = self._facts(done), self.config.checkpoint.keep

        def publish() -> None:
            self.warnings += checkpoints.publish(folder, facts, keep, self.start)

        part = checkpoints.part_of(folder, self.start)
        self.writer.write(state_of(self.trainer), part, publish)
        self._warn()

    def _warn(self) -> None:
        """Tell the user, once each, what could not be cleaned up: it ends no run."""
        while self.warnings:
            line = self.warnings.pop(0)
            if line not in self.warned:
                self.warned.add(line)
                self.say(f"warning: {line}")

    def _facts(self, done: int) -> dict[str, Any]:
        """What the manifest says besides its files."""
        text = json.dumps(self.settings, sort_keys=True)
        scaler = self.trainer.scaler
        return {
            "run": self.run,
            "step": done,
            "batch_size": self.config.batch_size,
            "corpus": self.corpus.sha256,
            "tokenizer": self.corpus.vocabulary,
            "scaler": vars(scaler).copy() if scaler else None,
            "torch": torch.__version__,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "config": self.settings,
        }

    def finish(self) -> None:
        """Until what is written in the background is whole. Raises OSError where it is not."""
        self.writer.wait()
        self._warn()


def is_saved(config: TrainConfig, step: int) -> bool:
    """After every `checkpoint.every` steps, and after the last."""
    every, done = config.checkpoint.every, step + 1
    return every > 0 and (done % every == 0 or done == config.steps)


def listen(trainer: Trainer, *numbers: signal.Signals) -> list[int]:
    """Let these signals, and those heard before, ask all ranks to stop after a step.

    Returns the list of those received, which grows as more come.
    """

    def note(number: int, _frame: object) -> None:
        REQUESTS.append(number)
        trainer.asked_to_stop = True

    for number in numbers:
        signal.signal(number, note)
    trainer.asked_to_stop = bool(REQUESTS)
    return REQUESTS
