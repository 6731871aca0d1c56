"""./launch.sh [OVERRIDES], one run or a sweep (-m), and what it says when it ends.

./launch.sh                                      two ranks, DDP
./launch.sh strategy=fsdp layout.dp_shard=4      four ranks, FSDP
./launch.sh -m strategy=ddp,fsdp precision=fp32,bf16
                                                 the same line again goes on where it was stopped
./launch.sh launch=dry                           print the torchrun line, start nothing
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from costs import ledger as ledgers
from experiments import accelerate_launch, console, environment, launch
from experiments.compose import jobs_of, run_hydra, to_config
from experiments.config import Launch, LoggingConfig, TrainConfig
from experiments.environment import Rank, say_waiting
from experiments.outside_text import complain, say
from experiments.process import end
from experiments.refused import Refused
from experiments.resume import AUTO, run_dir
from experiments.run_folder import Launched, settled_keys
from experiments.run_weights import check_base, is_base
from experiments.sweep_points import Points, folder_of
from experiments.tracking import make_tracker
from experiments.warn import warn, warning
from experiments.weights_file import check_init, check_init_tokenizer
from experiments.worker import last_act
from minigpt.corpus import prepare_for

TORCHRUN_OPTIONS = (
    "--nnodes",
    "--node-rank",
    "--node_rank",
    "--rdzv",
    "--master",
    "--local-addr",
    "--max-restarts",
)


@dataclass
class Row:
    """One job, and how it ended."""

    overrides: list[str]
    status: str  # done | kept (it was done before) | failed | refused | stopped | dry
    folder: Path | None = None
    reason: str | None = None  # for a dry job its command

    def said(self) -> dict[str, Any]:
        """For --json."""
        return {
            "overrides": self.overrides,
            "status": self.status,
            "reason": self.reason,
            "run": str(self.folder) if self.folder else None,
        }

    def ledger(self) -> dict[str, Any] | None:
        """What the run cost, where it was done."""
        if self.status not in ("done", "kept") or self.folder is None:
            return None
        return ledgers.read(self.folder / "ledger.json")


class FailedElsewhere(Exception):
    """A job that Hydra's submitit launcher ran in a process of its own has failed: one line."""


@dataclass
class Command:
    """What Hydra calls with a composed job: launch it, and keep how it ended."""

    torchrun: launch.Torchrun
    as_json: bool
    sweep: Points | None = None  # of the sweep that it belongs to
    fault: str | None = None  # of `debug`
    rows: list[Row] = field(default_factory=list)
    status: int = 0
    signal: int = 0  # that came meanwhile: no other job is started
    logging: LoggingConfig = field(default_factory=LoggingConfig)  # of the last job of a sweep
    asked: DictConfig | None = None  # the job as it was composed

    def __call__(self, composed: DictConfig) -> None:
        if self.signal:  # a sweep of Hydra's own goes on, and jobs are left
            self.end_by_signal()
            return
        # unresolved: an override may hold an interpolation of its own
        hydra = HydraConfig.get()
        overrides: list[str] = OmegaConf.to_container(hydra.overrides.task)  # type: ignore
        row = Row(overrides, "done")
        self.rows.append(row)
        self.asked = composed
        try:
            status = self._launch(to_config(composed, TrainConfig), overrides, row)
        except (Refused, ValueError) as error:
            self.refuse(row, error)
        else:
            self.status = max(self.status, status)
        if self.status and "SUBMITIT_EXECUTOR" in os.environ:
            # this process is another than the one that is asked how the jobs ended
            kind = Refused if row.status == "refused" else FailedElsewhere
            raise kind(f"{shlex.join(overrides)}: {row.reason}")

    def end_by_signal(self) -> None:
        """Let the exit status say that jobs are left, if the last one was done nevertheless."""
        if self.rows[-1].status == "done":
            self.status = max(self.status, 128 + self.signal)

    def refuse(self, row: Row, error: Exception) -> None:
        row.status, row.reason = "refused", str(error)
        self.status = max(self.status, 2)

    def prepare(self, config: TrainConfig, overrides: list[str], folder: Path | None) -> launch.Job:
        """Check all that can be checked, and make the run folder. Raises ValueError, Refused."""
        return launch.prepare_job(config, overrides, self.torchrun, folder, self.fault, self.asked)

    def _launch(self, config: TrainConfig, overrides: list[str], row: Row) -> int:
        folder = run_dir(config.resume, config.run.dir)
        if self.sweep:
            done = self.sweep.done(overrides, launch.settle(config, self.torchrun))
            if done:
                row.status, row.folder = "kept", done
                return 0
            first = self.torchrun.is_first_node  # the others take part in what it launches
            if first:
                self.sweep.lock()
            dry = config.launch == Launch.dry
            resume = config.resume == AUTO
            folder = self.sweep.place(overrides, len(self.rows) - 1, first, dry, resume)
            config.logging.group = config.logging.group or self.sweep.folder.name
            self.logging = config.logging
        job = self.prepare(config, overrides, folder)
        row.folder = job.folder
        if config.launch == Launch.dry:
            variables = [f"{name}={value}" for name, value in job.environ.items()]
            row.status, row.reason = "dry", " ".join([*variables, shlex.join(job.command)])
            if not self.as_json:
                say(row.reason)
            return 0
        ended = launch.run(job, quiet=self.as_json)
        row.status, row.reason, self.signal = ended.outcome, ended.reason, ended.signal
        if row.reason:
            what = "the run failed:" if row.status == "failed" else row.status
            complain(f"{what} {row.reason}")
        return ended.status


def train(argv: list[str]) -> int:
    """Compose, launch, and print what a sweep or --json asks for."""
    as_json = "--json" in argv
    options = [a for a in argv if a.startswith(TORCHRUN_OPTIONS)]
    rest = [a for a in argv if a != "--json" and a not in options]
    bare = [option for option in options if "=" not in option]
    if bare:
        raise Refused(f"{bare[0]}: write it with its value, {bare[0]}=VALUE")
    rank = environment.given_rank()
    if rank:
        launchers = [*options, *(["--json"] if as_json else [])]
        launchers += [a for a in rest if a in ("-m", "--multirun")]
        if launchers:
            raise refused_to_rank(launchers[0], rank)
        return train_as_rank(rest, rank)
    torchrun, jobs = launch.Torchrun(options), jobs_of(rest)
    if jobs is not None:
        return sweep(jobs, Command(torchrun, as_json))
    command = Command(torchrun, as_json)
    try:
        run_hydra("train", rest, command)
    except FailedElsewhere as error:
        complain(f"a job failed: {error}")
        return 1
    return print_rows(command)


def print_rows(command: Command) -> int:
    """What is left to be said of a single job; its exit status."""
    for row in command.rows:
        if row.status == "refused":
            complain(row.reason)
        elif command.as_json and row.status in ("done", "dry"):
            print(json.dumps(row.ledger() or row.said(), indent=1))
    return command.status


def sweep(jobs: list[list[str]], command: Command) -> int:
    """One fresh launch a job that is not done yet. A job that is refused or fails is a row and not
    the end."""
    as_json = command.as_json
    command.sweep = points = Points(folder_of(jobs))
    out: Any = console.LastingOutput(sys.stdout)
    for number, argv in enumerate(jobs):
        if not as_json:
            say(f"sweep {number + 1}/{len(jobs)}: {shlex.join(argv)}", out)
        try:
            run_hydra("train", argv, command)
        except Refused as error:  # composed badly: Hydra never called the command
            row = Row(argv, "refused")
            command.rows.append(row)
            command.refuse(row, error)
        if command.signal:
            left = len(jobs) - number - 1
            if left:
                command.end_by_signal()
                name = signal.Signals(command.signal).name
                print(f"launch.sh: {name}: {left} of {len(jobs)} jobs are left", file=sys.stderr)
            break
    if as_json:
        print(json.dumps({"jobs": [row.said() for row in command.rows]}, indent=1))
    elif command.rows:  # none with --cfg and its like
        ended = [(r.overrides, r.status, r.reason, r.ledger()) for r in command.rows]
        console.print_sweep(points.folder, ended)
    if any(row.status == "done" for row in command.rows):
        tell = (lambda _text: None) if as_json else say
        make_tracker(command.logging, points.folder, {}, tell, rank=0).finish(None)
    return command.status


def refused_to_rank(what: str, rank: Rank) -> Refused:
    """Return the refusal of what only the launcher can do to a process that is one rank."""
    return Refused(
        f"{what}: this process is {rank}, which trains one run beside the other ranks; "
        f"{rank.as_launcher} makes it a launcher"
    )


def train_as_rank(argv: list[str], rank: Rank) -> int:
    """Be one rank of a world that torchrun or SLURM has started already.

    Rank 0 alone picks the run folder, and tells the others when they have met.
    """
    composed: list[DictConfig] = []
    run_hydra("train", argv, composed.append)
    if not composed:  # --help and its like
        return 0
    wanted = to_config(composed[0], TrainConfig)
    gpus = environment.gpu_count()
    # a scheduler that says RANK and WORLD_SIZE may not say how many nodes there are
    nodes = max(rank.nodes, -(-rank.world_size // gpus) if gpus else 1)
    config = environment.settle(wanted, rank.world_size, gpus, nodes)
    accelerate_launch.check(config)
    if wanted.launch == Launch.dry:
        raise refused_to_rank("launch=dry", rank)
    if rank.rank == 0:
        warn(config, nodes)
    environment.check_memory(config, rank.world_size // nodes)
    corpus = prepare_for(config.data, config.model.vocab_size, config.seq_len)
    unsure: list[str] = []  # every rank refuses what one would, so that none waits for another
    if config.init:
        unsure += check_init(Path(config.init), config.model)
        unsure += check_init_tokenizer(Path(config.init), corpus.vocabulary)
    if is_base(config):
        unsure += check_base(config, corpus.vocabulary)
    for line in unsure if rank.rank == 0 else []:
        warning(line)
    started = psutil.Process().create_time()
    settled = settled_keys(composed[0], config)
    launched = Launched(
        argv, str(corpus.folder), started, settled=settled, tokenizer=corpus.vocabulary
    )
    environment.restarts()  # refused now if it is no number
    if rank.rank == 0 and environment.others_may_be_missing(rank):
        say_waiting(rank)  # at once; the others only if it takes long
    # what fails is said in one line, not by torch's C++ with its frames
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    with last_act(rank.rank, folder=None):
        from experiments.train import train as train_here

        stopped = train_here(config, launched, None, rank)
        if stopped:
            end(128 + stopped)
    return 0
