"""The parent process of a run: settles the config, makes the folder, starts and ends torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from omegaconf import OmegaConf

from experiments import environment
from experiments.config import TrainConfig
from experiments.worker import die_with_parent
from minigpt.corpus import check_vocabulary, prepare
from parallel.layout import Layout

GRACE_S = 10.0  # between asking the ranks to end and making them
SINGLE_NODE = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


@dataclass(frozen=True)
class Torchrun:
    """torchrun's own options, passed through: several nodes are its business."""

    options: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> int:
        value = self._value("--nnodes") or "1"
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"--nnodes={value}: must be a whole number of nodes")
        return int(value)

    @property
    def is_first_node(self) -> bool:
        return (self._value("--node-rank") or "0") == "0"

    def _value(self, name: str) -> str | None:
        named = (option.partition("=") for option in self.options)
        return next((value for key, _, value in named if key.replace("_", "-") == name), None)


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    folder: Path
    command: list[str]
    environ: dict[str, str]


def prepare_job(
    config: TrainConfig, overrides: list[str], torchrun: Torchrun, folder: Path | None
) -> Job:
    """Check all that can be checked before a process starts, then write the run folder.

    Raises ValueError with one line. Nothing is written where the input is refused.
    """
    nodes = torchrun.nodes
    config = environment.settle(config, None, environment.gpu_count(), nodes)
    world_size = config.layout.world_size
    if world_size % nodes:
        raise ValueError(f"--nnodes={nodes}: the layout's {world_size} ranks do not divide")
    environment.check_memory(config, world_size // nodes)
    corpus = prepare(config.data)
    check_vocabulary(corpus, config.model.vocab_size)
    corpus.check_length(config.seq_len)
    if nodes > 1 and not config.run.dir:
        raise ValueError("run.dir is not set: every node must be told the same run.dir")
    folder = Path(config.run.dir) if folder is None and config.run.dir else folder
    folder = make_folder(folder, config.layout, shared=not torchrun.is_first_node)
    if torchrun.is_first_node:
        write_config(folder, config, overrides, corpus.folder)
    command = torchrun_command(folder, world_size // nodes, torchrun)
    return Job(folder, command, rank_environment(nodes))


def make_folder(folder: Path | None, layout: Layout, shared: bool = False) -> Path:
    """Make the one folder of a run. A folder that already holds a run is refused."""
    if folder is not None:
        if (folder / "config.yaml").exists() and not shared:
            raise ValueError(f"run.dir={folder}: already holds a run")
        return _make(folder)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):  # two launches in one second must not share a folder
        suffix = f"-{attempt}" if attempt else ""
        folder = Path("runs") / f"{stamp}-{layout.label}{suffix}"
        try:
            return _make(folder, exist_ok=False)
        except FileExistsError:
            continue
    raise ValueError(f"run.dir: could not make a folder like {folder}")


def _make(folder: Path, exist_ok: bool = True) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        (folder / "logs").mkdir(exist_ok=True)
    except FileExistsError:
        if exist_ok:  # something that is no folder has the name
            raise ValueError(f"run.dir={folder}: is not a folder") from None
        raise
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be made: {error.strerror}") from error
    return folder


def write_config(
    folder: Path, config: TrainConfig, overrides: list[str], corpus_folder: Path
) -> None:
    """Freeze what the ranks will read: they never compose."""
    launch = {"overrides": overrides, "corpus": str(corpus_folder), "started": time.time()}
    try:
        (folder / "launch.json").write_text(json.dumps(launch, indent=1))
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be written: {error.strerror}") from error


def torchrun_command(folder: Path, local_ranks: int, torchrun: Torchrun) -> list[str]:
    """The line that starts the ranks. Rank 0 of this node keeps the terminal, the rest a file."""
    options = [*torchrun.options]
    if torchrun.nodes == 1:
        options += ["--standalone"]
    options += [f"--nproc-per-node={local_ranks}", f"--log-dir={folder / 'logs'}"]
    if local_ranks > 1:
        options += ["--redirects=" + ",".join(f"{i}:3" for i in range(1, local_ranks))]
    worker = ["-m", "experiments.worker", str(folder)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *worker]


def rank_environment(nodes: int) -> dict[str, str]:
    """Variables that the ranks need on top of the user's own, which win."""
    wanted = {"OMP_NUM_THREADS": "1", **(SINGLE_NODE if nodes == 1 else {})}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def run(job: Job, quiet: bool) -> int:
    """Run the ranks to their end and return torchrun's exit status.

    torchrun gets a session of its own, so that Ctrl-C reaches this process alone, which then ends
    the ranks in order. Its own messages, a traceback of 300 lines for any failure, go to a file.
    """
    environ = {**os.environ, **job.environ}
    with open(job.folder / "logs" / "torchrun.log", "wb") as log:
        process = subprocess.Popen(
            job.command,
            env=environ,
            stderr=log,
            stdout=log if quiet else None,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        with Forwarding(process) as forwarding:
            status = process.wait()
    return 128 + forwarding.received if forwarding.received else status


class Forwarding:
    """While open, the first signal to this process ends `process`, and a second one kills it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.received = 0

    def __enter__(self) -> Forwarding:
        self.saved = {number: signal.signal(number, self._forward) for number in self.SIGNALS}
        signal.signal(signal.SIGALRM, lambda *_: self.process.kill())
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.alarm(0)
        for number, handler in self.saved.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            self.process.kill()  # the ranks die with it: worker.die_with_parent
        self.received = self.received or number
        self.process.send_signal(signal.SIGTERM)
        signal.alarm(int(GRACE_S))


def failure(folder: Path) -> str:
    """One line for a run that failed: the first rank that did, and where its traceback is."""
    reports = []
    for path in (folder / "logs").glob("rank-*.error.json"):
        reports.append(json.loads(path.read_text()))
    if not reports:
        return f"a rank died without a word; see {folder / 'logs' / 'torchrun.log'}"
    first = min(reports, key=lambda report: report["time"])
    return f"rank {first['rank']}: {first['error']} (traceback: {first['traceback']})"
