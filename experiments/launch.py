"""The parent process of a run: settles the config, makes the folder, starts and ends torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from omegaconf import DictConfig

from experiments import accelerate_launch, environment
from experiments.config import TrainConfig
from experiments.console import output_lost, progress
from experiments.memory_limit import oom_kills
from experiments.process import (
    ON_LOOPBACK,
    RANK,
    TORCHRUN,
    Forwarding,
    child_environment,
    die_with_parent,
    module_command,
)
from experiments.resume import check_fits, choose, goes_on_in, newest_step
from experiments.run_folder import Launched, make_folder, settings_of, settled_keys, write_config
from experiments.run_weights import check_base, is_base
from experiments.step_log import read_metrics
from experiments.verdict import failure, steps_before_stop, unprinted, was_stopped
from experiments.warn import warn, warning
from experiments.weights_file import check_bytes, check_init, check_init_tokenizer
from minigpt.corpus import prepare_for

NUMBERS = {  # of torchrun's options: the least and the most
    "--max-restarts": (0, 1000),
    "--node-rank": (0, 100_000),
    "--master-port": (1, 65_535),
}


@dataclass(frozen=True)
class Torchrun:
    """torchrun's own options, passed through: several nodes are its business."""

    options: list[str] = field(default_factory=list)
    on_one_machine: bool = False  # all nodes are here (experiments/lab/command.py)

    def __post_init__(self) -> None:
        """Raises ValueError for a number that torchrun would answer with a page of its own."""
        for name, (least, most) in NUMBERS.items():
            value = self._value(name)
            if value is not None and not (value.isdigit() and least <= int(value) <= most):
                raise ValueError(f"{name}={value}: must be a whole number, {least} to {most:,}")

    @property
    def nodes(self) -> int:
        value = self._value("--nnodes") or "1"
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"--nnodes={value}: must be a whole number of nodes")
        return int(value)

    @property
    def is_first_node(self) -> bool:
        number = self._value("--node-rank")
        if number is None and self.nodes > 1:
            raise ValueError("--node-rank is not set: tell each node its number, from 0")
        return number in (None, "0")

    @property
    def log(self) -> str:
        """The file for its messages: nodes may share a run folder."""
        return (
            "torchrun.log" if self.is_first_node else f"torchrun-{self._value('--node-rank')}.log"
        )

    @property
    def stands_alone(self) -> bool:
        """One node, and the user named no rendezvous: a free port of the loopback is one."""
        elsewhere = ("--rdzv", "--master")
        return self.nodes == 1 and not any(o.startswith(elsewhere) for o in self.options)

    def _value(self, name: str) -> str | None:
        named = (option.partition("=") for option in self.options)
        return next((value for key, _, value in named if key.replace("_", "-") == name), None)


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    folder: Path
    command: list[str]
    environ: dict[str, str]
    log: Path  # what the command says on standard error


def prepare_job(
    config: TrainConfig,
    overrides: list[str],
    torchrun: Torchrun,
    folder: Path | None,
    fault: str | None = None,
    asked: DictConfig | None = None,
) -> Job:
    """Check all that can be checked before a process starts, then write the run folder.

    `folder` None: one is picked. `asked` is what `config` was made of. Raises ValueError with one
    line. Nothing is written where the input is refused.
    """
    nodes, here = torchrun.nodes, torchrun.on_one_machine
    config = settle(config, torchrun)
    accelerate_launch.check(config)
    world_size = config.layout.world_size
    if world_size % nodes:
        key = "nodes" if here else "--nnodes"
        raise ValueError(f"{key}={nodes}: the layout's {world_size} ranks do not divide")
    if torchrun.is_first_node:
        warn(config, nodes)
    environment.check_memory(config, world_size if here else world_size // nodes)
    corpus = prepare_for(config.data, config.model.vocab_size, config.seq_len)
    if nodes > 1 and not here and not config.run.dir:
        raise ValueError("run.dir is not set: every node must be told the same run.dir")
    found, only_weights = None, is_base(config)
    if only_weights:
        for line in check_base(config, corpus.vocabulary):
            warning(line)
    else:
        found = choose(config.resume, folder)
    if found:
        check_fits(found, settings_of(config), config.batch_size, corpus)
    if config.init:
        for line in check_init(Path(config.init), config.model):
            warning(line)
        for line in check_init_tokenizer(Path(config.init), corpus.vocabulary):
            warning(line)
        check_bytes(Path(config.init))
    again = goes_on_in(config.resume, folder) and not only_weights
    folder = make_folder(folder, config.layout, not torchrun.is_first_node, again)
    if torchrun.is_first_node:
        # launch.sh hands its process over, so this is when the user's command began
        started = psutil.Process().create_time()
        settled = settled_keys(asked, config) if asked is not None else {}
        about = Launched(
            overrides,
            str(corpus.folder),
            started,
            fault=fault,
            settled=settled,
            tokenizer=corpus.vocabulary,
        )
        write_config(folder, config, about)
    command = torchrun_command(folder, world_size // nodes, torchrun)
    return Job(folder, command, environment.of_a_rank(nodes), folder / "logs" / torchrun.log)


def settle(config: TrainConfig, torchrun: Torchrun) -> TrainConfig:
    """environment.settle for the nodes that torchrun is told of."""
    ranks_a_node = 1 if torchrun.on_one_machine else None
    gpus = environment.gpu_count()
    return environment.settle(config, None, gpus, torchrun.nodes, ranks_a_node)


def torchrun_command(folder: Path, local_ranks: int, torchrun: Torchrun) -> list[str]:
    """Return the command that starts a node's ranks.

    Rank 0 of the node keeps the terminal and each other rank writes to a file of its own
    (experiments/agent.py: Logs); of nodes that share a terminal only the first one keeps it.
    """
    options = [*torchrun.options]
    if torchrun.stands_alone:
        options += [f"--rdzv-backend={ON_LOOPBACK}"]
    options += [f"--nproc-per-node={local_ranks}", f"--log-dir={folder / 'logs'}", "--redirects=3"]
    if torchrun.is_first_node or not torchrun.on_one_machine:
        options += ["--local-ranks-filter=0"]
    rank, *command = module_command(RANK)
    options += ["--no-python", rank, "-u", *command]
    return [*module_command(TORCHRUN), *options, str(folder)]


@dataclass(frozen=True)
class Ended:
    """How a run ended. `signal`, if not 0, was sent to this process, or to the launcher of another
    node, and asks that nothing else is started."""

    outcome: str  # done | stopped (as the signal asked) | failed
    signal: int = 0
    reason: str | None = None  # one line: why it failed, or what is left of one that was stopped

    @property
    def status(self) -> int:
        """The exit status of a command that is this run."""
        return {"done": 0, "failed": 1, "stopped": 128 + self.signal}[self.outcome]


def run(job: Job, quiet: bool) -> Ended:
    """Run the ranks to their end.

    torchrun gets a session of its own, so that Ctrl-C reaches this process alone, which then ends
    the ranks in order. Its own messages, a traceback of 300 lines for any failure, go to a file.
    """
    kills = oom_kills()
    with open(job.log, "wb") as log:
        process = subprocess.Popen(
            job.command,
            env=child_environment(job.environ),
            stderr=log,
            stdout=log if quiet else None,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        with Forwarding(process) as forwarding:
            status = process.wait()
    lost = unprinted(job.folder)
    if lost is not None:
        progress(output_lost(lost))
    received, second = forwarding.received, forwarding.second
    return _ended(job.folder, status, received, oom_kills() > kills, job.log, second)


def _ended(
    folder: Path,
    status: int,
    received: int,
    oom_killed: bool,
    log: Path | None = None,
    second: int = 0,
) -> Ended:
    """Return how a run ended, of which torchrun has ended with `status` (negative: by a signal)
    after this process had received a signal, and maybe a second one (0: none)."""
    if was_stopped(folder):  # the signal may have come to another node
        number = received or signal.SIGUSR1
        steps = steps_before_stop(folder)
        saved = f"by {signal.Signals(number).name} after {steps} steps, which are saved"
        return Ended("stopped", number, f"{saved}; run.dir={folder} resume=auto goes on")
    if status == 0:  # a signal may come when there is nothing left to do
        return Ended("done", received)
    if not received:
        return Ended("failed", 0, failure(folder, status, oom_killed, log))
    name, lost = signal.Signals(received).name, unsaved_steps(folder)
    if received in Forwarding.END or not lost:
        return Ended("stopped", received, f"by {name}; what was measured is in {folder}")
    # a scheduler that asked for a save must not take this for one
    why = failure(folder, status, oom_killed, log)
    if second:  # this process has killed torchrun then
        why = f"a second signal, {signal.Signals(second).name}, ended the run"
    return Ended("failed", received, f"{name} came and {lost} steps were not saved: {why}")


def unsaved_steps(folder: Path) -> int:
    """Return how many steps a run has done since its newest checkpoint, or since its start."""
    done = [line["step"] + 1 for line in read_metrics(folder / "metrics.jsonl")]
    saved = newest_step(folder)
    return max(0, max(done, default=0) - saved)
