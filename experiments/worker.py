"""One rank of a run: torchrun --nproc-per-node 2 -m experiments.worker RUN_FOLDER

It reads the frozen config of the run folder, joins the others, trains, and leaves without a trace:
an error becomes one small file that the parent reads, and no rank outlives its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from experiments import environment
from experiments.config import TrainConfig


def main(
    config: TrainConfig, corpus_folder: Path, folder: Path | None, overrides: list[str]
) -> None:
    """Train as the rank that the environment says, then end the process.

    `folder` is None where no parent made one: rank 0 makes it when the ranks have met.
    """
    rank = environment.given_rank() or environment.Rank(0, 0, 1)
    try:
        from experiments.train import train

        train(config, corpus_folder, folder, rank, overrides)
    except BaseException as error:
        report(error, rank.rank, folder)
        leave(1)
    leave(0)


def read_config(folder: Path) -> TrainConfig:
    """The frozen config of a run folder."""
    stored = OmegaConf.merge(
        OmegaConf.structured(TrainConfig), OmegaConf.load(folder / "config.yaml")
    )
    config = OmegaConf.to_object(stored)
    assert isinstance(config, TrainConfig)
    return config


def report(error: BaseException, rank: int, folder: Path | None) -> None:
    """Leave the error where the parent finds it: launch.failure() takes the earliest."""
    if folder is None:
        traceback.print_exception(error)
        return
    lines = str(error).strip().splitlines() or ["no message"]
    path = folder / "logs" / f"rank-{rank}.traceback.txt"
    said = {
        "rank": rank,
        "time": time.time(),
        "error": f"{type(error).__name__}: {lines[0]}",
        "traceback": str(path),
    }
    try:
        path.write_text(traceback.format_exc())
        (folder / "logs" / f"rank-{rank}.error.json").write_text(json.dumps(said))
    except OSError:  # a full disk: the message still reaches the terminal
        print(said["error"], file=sys.stderr)


def leave(status: int) -> None:
    """End the process at once: right runs may hang or abort in gloo's destructors (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between
            os._exit(1)


if __name__ == "__main__":
    die_with_parent()
    run_folder = Path(sys.argv[1])
    launched = json.loads((run_folder / "launch.json").read_text())
    corpus = Path(launched["corpus"])
    main(read_config(run_folder), corpus, run_folder, launched["overrides"])
