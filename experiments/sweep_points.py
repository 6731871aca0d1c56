"""The folder of a sweep: which of its points are done, and where the others run.

A point is what its overrides and the configuration that they compose to say. One that is done is
not run again; one that failed, or was stopped, is. The same command line finds its folder by its
name, runs/sweep-DATE-HASH; run.dir=DIR, or Hydra's own hydra.sweep.dir=DIR, names another.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

from costs import ledger as ledgers
from experiments.checkpoints import steps_of
from experiments.config import TrainConfig
from experiments.free_text import path_in
from experiments.resume import RUNS, newest_step
from experiments.run_folder import read_config, read_launched

FOLDER_KEYS = ("run.dir=", "hydra.sweep.dir=")
HASH_LENGTH = 8
NOT_OF_A_POINT = ("run", "logging", "launch")  # fields that change nothing that is measured


def folder_of(jobs: list[list[str]]) -> Path:
    """The folder that was asked for, that of the same sweep before, or a new one."""
    given = [word.partition("=")[2] for word in jobs[0] if word.startswith(FOLDER_KEYS)]
    if given:
        return path_in(given[0])
    points = sorted(sorted(_of_a_point(job)) for job in jobs)
    digest = hashlib.sha256(json.dumps(points).encode()).hexdigest()[:HASH_LENGTH]
    before = sorted(RUNS.glob(f"sweep-*-{digest}"))
    return before[-1] if before else RUNS / time.strftime(f"sweep-%Y%m%d-%H%M%S-{digest}")


def _of_a_point(overrides: list[str]) -> tuple[str, ...]:
    """What tells points apart, in an order of its own."""
    return tuple(sorted(o for o in overrides if not o.startswith((*FOLDER_KEYS, "launch="))))


class Points:
    """What the folder of a sweep holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptor: int | None = None  # of the lock
        self.runs: dict[tuple[str, ...], list[Path]] = {}
        self.taken: set[Path] = set()
        for path in sorted(folder.glob("*/config.yaml")):
            self.taken.add(path.parent)
            try:
                overrides = read_launched(path.parent).overrides
            except ValueError:  # half written: not done, and nobody's
                continue
            self.runs.setdefault(_of_a_point(overrides), []).append(path.parent)

    def done(self, overrides: list[str], config: TrainConfig) -> Path | None:
        """The finished run of a point; `config` is settled. None where it must be run."""
        return next((f for f in self._of(overrides) if _is_done(f) and _is_same(f, config)), None)

    def place(
        self,
        overrides: list[str],
        number: int,
        first: bool,
        dry: bool = False,
        resume: bool = False,
    ) -> Path:
        """Return where a point runs: `number` in this folder, or the next that is free.

        An attempt that failed gives its folder to the next one. The first node removes what is in
        it, and what it makes then is where the others find themselves. With `resume`
        (resume=auto) an attempt that has saved a checkpoint keeps all it has, to go on from there.
        If nothing will be started (`dry`), what was started once stays.
        """
        attempts = [folder for folder in self._of(overrides) if not _is_done(folder)]
        if resume:
            attempts.sort(key=newest_step, reverse=True)
        for folder in attempts:
            if dry and _was_started(folder):
                continue
            if first and not (resume and steps_of(folder)):
                shutil.rmtree(folder)
            return folder
        while self.folder / str(number) in self.taken:
            number += 1
        self.taken.add(self.folder / str(number))
        return self.folder / str(number)

    def _of(self, overrides: list[str]) -> list[Path]:
        return list(self.runs.get(_of_a_point(overrides), ()))

    def lock(self) -> None:
        """No second launcher in this folder, until this process ends. Raises ValueError where
        there is one."""
        if self.descriptor is not None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)  # the folder itself: no file is left
        except OSError as error:
            said = "is not a folder" if self.folder.is_file() else error.strerror
            raise ValueError(f"run.dir={self.folder}: {said}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            busy = isinstance(error, BlockingIOError)
            said = "a sweep is running there" if busy else error.strerror
            raise ValueError(f"run.dir={self.folder}: {said}") from error
        self.descriptor = descriptor


def _is_done(folder: Path) -> bool:
    try:
        ledgers.read(folder / "ledger.json")
    except ValueError:
        return False
    return True


def _was_started(folder: Path) -> bool:
    return any((folder / "logs").iterdir()) if (folder / "logs").is_dir() else False


def _is_same(folder: Path, config: TrainConfig) -> bool:
    """Whether what was run is what would be run: defaults may have changed since."""
    try:
        before = read_config(folder)
    except ValueError:
        return False
    names = (field.name for field in fields(TrainConfig) if field.name not in NOT_OF_A_POINT)
    return all(getattr(before, name) == getattr(config, name) for name in names)
