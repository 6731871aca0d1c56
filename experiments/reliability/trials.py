"""Launches that are disturbed from outside: what docs/results/reliability.md and the tests
count."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from experiments.checkpoints import STEP, steps_of
from experiments.process import TORCHRUN
from experiments.step_log import read_metrics

Made = TypeVar("Made")
ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data=generated",
    "model.n_layer=2",
    "model.d_model=64",
    "model.context=32",
    "micro_batch_size=4",
    "validation.batches=0",
    "sample.tokens=0",
    "run.save=false",
)
# what a manifest has besides its step, where no run is to go on from it
NOTHING_ELSE = {"batch_size": 1, "config": {}, "corpus": "", "scaler": None}
# how a user asks for them, and how many ranks that are
STRATEGIES = {
    "ddp": 2,
    "zero1": 2,
    "fsdp": 2,
    "tp_sp": 2,
    "pp": 2,
    "fsdp_tp": 4,
}
VICTIMS = ("rank", "torchrun", "launcher", "all")
AT_ONCE = 2  # trials side by side
PATIENCE_S = 600.0  # for what takes seconds: a machine may be busy


def without_scheduler() -> dict[str, str]:
    """This process's environment, but for what would make a launch a rank or a job of another."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM", "HYDRA")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


@dataclass
class Launch:
    """`./launch.sh OVERRIDES run.dir=FOLDER`, running."""

    folder: Path
    overrides: list[str]
    out: Path = field(init=False)
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.out = self.folder.with_name(f"{self.folder.name}.out")
        with open(self.out, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments", *self.overrides, f"run.dir={self.folder}"],
                env={**without_scheduler(), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.out.read_text()

    def steps(self) -> int:
        """Steps that are done and written down. Asked often: it counts lines, and reads none."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def reach(self, steps: int) -> bool:
        """Until so many steps are done; False where it ended before."""
        return wait_for(lambda: self.steps() >= steps, self)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired, and leaves no process behind."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill("all")
            raise

    def processes(self) -> list[psutil.Process]:
        """torchrun and its ranks: every process but the launcher that names the folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            named = any(str(self.folder) == part for part in process.info["cmdline"] or [])
            if named and process.pid != self.process.pid and process.pid != os.getpid():
                found.append(process)
        return found

    def kill(self, victim: str, rank: int = 0) -> None:
        """SIGKILL one of VICTIMS."""
        self.kill_these(self.victims(victim, rank))

    def victims(self, victim: str, rank: int = 0) -> list[psutil.Process]:
        """The processes that one of VICTIMS stands for: to find them takes longer than to kill."""
        processes = self.processes()
        launcher = psutil.Process(self.process.pid)
        ranks = [p for p in processes if TORCHRUN not in _line(p)]
        return {
            "launcher": [launcher],
            "torchrun": [p for p in processes if p not in ranks],
            "rank": ranks[rank % max(1, len(ranks)) :][:1],
            "all": [launcher, *processes],
        }[victim]

    @staticmethod
    def kill_these(processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def survivors(self, seconds: float) -> int:
        """Processes that are still there after so long; returns as soon as there is none."""
        deadline = time.monotonic() + seconds
        while (left := len(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()[:4]
    except psutil.Error:
        return []


def wait_for(holds: Callable[[], object], launch: Launch, poll_s: float = 0.02) -> bool:
    """Until it holds; False where the launch ended before. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if launch.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"{launch.folder}: {launch.said[-500:]}")
        time.sleep(poll_s)
    return True


def side_by_side(function: Callable[..., Made], *cases: Iterable[Any]) -> Iterator[Made]:
    """What map gives, two at a time: a trial mostly waits for a process that starts alone."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(function, *cases)


def few(count: int, share: float) -> int:
    """A share of so many trials, at least one."""
    return max(1, round(count * share))


def newest_in(folder: Path) -> int | None:
    """Steps of the newest published checkpoint."""
    steps = steps_of(folder)
    found = STEP.fullmatch(steps[0].name) if steps else None
    return int(found[1]) if found else None


def losses_of(launch: Launch) -> list[float]:
    return [line["loss"] for line in read_metrics(launch.folder / "metrics.jsonl")]
