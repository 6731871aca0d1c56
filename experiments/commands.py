"""./launch.sh [OVERRIDES], one run or a sweep (-m), and what it says when it ends.

./launch.sh                                      two ranks, DDP
./launch.sh strategy=fsdp layout.dp_shard=4      four ranks, FSDP
./launch.sh -m strategy=ddp,fsdp precision=fp32,bf16
./launch.sh launch=dry                           print the torchrun line, start nothing
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import console, environment, launch
from experiments.compose import Refused, run_hydra, to_config
from experiments.config import Launch, TrainConfig
from experiments.run_folder import Launched, failure
from experiments.worker import last_act
from minigpt.corpus import check_vocabulary, prepare

TORCHRUN_OPTIONS = (
    "--nnodes",
    "--node-rank",
    "--node_rank",
    "--rdzv",
    "--master",
    "--max-restarts",
)


@dataclass
class Row:
    """One job of a sweep."""

    overrides: str
    status: str  # done | failed | refused | stopped
    folder: Path | None = None
    reason: str | None = None


@dataclass
class Command:
    """The jobs of one command line; Hydra calls it once for each."""

    torchrun: launch.Torchrun
    as_json: bool
    rows: list[Row] = field(default_factory=list)
    status: int = 0
    sweep: bool = False
    refused: Exception | None = None

    def __call__(self, composed: DictConfig) -> None:
        hydra = HydraConfig.get()
        self.sweep = hydra.mode == RunMode.MULTIRUN
        # unresolved: an override may hold an interpolation of its own
        overrides: list[str] = OmegaConf.to_container(hydra.overrides.task)  # type: ignore
        row = Row(" ".join(overrides), "done")
        self.rows.append(row)
        try:
            config = to_config(composed, TrainConfig)
            folder = None
            if self.sweep:
                base = Path(config.run.dir or hydra.sweep.dir)
                folder = base / str(hydra.job.num)
            status = self._launch(config, overrides, folder, row)
        except (Refused, ValueError) as error:
            self.refused = error
            row.status, row.reason, status = "refused", str(error), 2
        self.status = max(self.status, status)
        if status > 128:  # a signal ends the sweep too
            sys.exit(status)

    def _launch(
        self, config: TrainConfig, overrides: list[str], folder: Path | None, row: Row
    ) -> int:
        job = launch.prepare_job(config, overrides, self.torchrun, folder)
        row.folder = job.folder
        if config.launch == Launch.dry:
            variables = [f"{name}={value}" for name, value in job.environ.items()]
            print(" ".join([*variables, shlex.join(job.command)]))
            return 0
        status = launch.run(job, quiet=self.as_json)
        if status > 128:
            row.status, row.reason = "stopped", f"by signal {status - 128}"
            print(f"launch.sh: stopped; what was measured is in {job.folder}", file=sys.stderr)
            return status
        if status:
            row.status, row.reason = "failed", failure(job.folder)
            print(f"launch.sh: the run failed: {row.reason}", file=sys.stderr)
            return 1
        return 0


def train(argv: list[str]) -> int:
    """Compose, launch, and print what a sweep or --json asks for."""
    as_json = "--json" in argv
    options = [a for a in argv if a.startswith(TORCHRUN_OPTIONS)]
    rest = [a for a in argv if a != "--json" and a not in options]
    bare = [option for option in options if "=" not in option]
    if bare:
        raise Refused(f"{bare[0]}: write it with its value, {bare[0]}=VALUE")
    if environment.given_rank():
        return train_as_rank(rest)
    command = Command(launch.Torchrun(options), as_json)
    try:
        run_hydra("train", rest, command)
    finally:
        if command.sweep:
            print_sweep(command.rows, as_json)
    if command.refused and not command.sweep:
        raise command.refused
    if as_json and not command.sweep and command.status == 0 and command.rows:
        show_ledger(command.rows[0])
    return command.status


def show_ledger(row: Row) -> None:
    """The ledger on standard output, for --json."""
    path = row.folder / "ledger.json" if row.folder else None
    if path and path.exists():
        print(path.read_text())


def print_sweep(rows: list[Row], as_json: bool) -> None:
    """Every job of a sweep as a row: one that failed is not the end of it."""
    if as_json:
        keys = ("overrides", "status", "reason")
        jobs = [{**{k: getattr(r, k) for k in keys}, "run": str(r.folder or "")} for r in rows]
        print(json.dumps({"jobs": jobs}))
    else:
        console.print_sweep([(r.overrides, r.status, r.reason, r.folder) for r in rows])


def train_as_rank(argv: list[str]) -> int:
    """Be one rank of a world that torchrun or SLURM has started already.

    Rank 0 alone picks the run folder, and tells the others when they have met.
    """
    rank = environment.given_rank()
    assert rank is not None
    composed: list[DictConfig] = []
    run_hydra("train", argv, composed.append)
    if not composed:  # --help and its like
        return 0
    gpus = environment.gpu_count()
    nodes = -(-rank.world_size // gpus) if gpus else 1
    wanted = to_config(composed[0], TrainConfig)
    config = environment.settle(wanted, rank.world_size, gpus, nodes)
    corpus = prepare(config.data)
    check_vocabulary(corpus, config.model.vocab_size)
    corpus.check_length(config.seq_len)
    launched = Launched(argv, str(corpus.folder), psutil.Process().create_time())
    with last_act(rank.rank, folder=None):
        from experiments.train import train as train_here

        train_here(config, launched, None, rank)
    return 0
