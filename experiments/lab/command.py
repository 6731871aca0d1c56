"""./launch.sh lab nodes=4 rate=1gbit [delay=1ms] [OVERRIDES]: many nodes, on one machine.

./launch.sh lab nodes=2 rate=100mbit strategy=ddp
./launch.sh lab nodes=4 rate=1gbit delay=2ms -m strategy=ddp,fsdp
./launch.sh lab nodes=2 trace=true run.dir=runs/fast           links as fast as the machine
./launch.sh lab nodes=2 rate=1gbit recorded=runs/fast          predicted from that run

Each node is a network namespace with a link of its own (experiments/lab/shaped_links.py), and a
torchrun, as on a cluster: one rank a node unless the layout asks for more. The run folder has the
network as a cluster profile, cluster.yaml. Beside the measured step stands the predicted one: a
run on links as fast as the machine, replayed over these (predicted_seconds), which is recorded=RUN
or else a short one that the command makes in RUN/fast. The machine's own limits are those of
machine=NAME or FILE (./launch.sh calibrate).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from costs.program import Message
from experiments import commands, launch
from experiments.calibrate.profile import yaml_of
from experiments.commands import Command, Row
from experiments.compose import jobs_of, run_hydra
from experiments.config import Device, TrainConfig
from experiments.console import DASH, human_seconds, make_console, progress
from experiments.environment import physical_cores
from experiments.lab import shaped_links
from experiments.lab.profile import profile_of
from experiments.lab.shaped_links import DEVICE, Links, Missing
from experiments.outside_text import complain
from experiments.predict import clusters
from experiments.predict.replay import recorded
from experiments.refused import Refused
from experiments.run_folder import read_config
from simulator.event_times import EventTimes, measured_message, measured_work
from simulator.hardware import Cluster
from simulator.replay import replay

KEYS = ("nodes", "rate", "delay", "machine", "recorded")
FAST, FAST_STEPS = "fast", 16  # the folder in a run's own of the run on fast links, and its steps
# of that run: a trace, and nothing that takes time or leaves files besides
ALONE = (
    *("trace=true", "sample.tokens=0", "validation.batches=0", "run.save=false"),
    *("checkpoint.every=0", "logging=none", "resume=null"),
)
PORT = 29500  # nothing else is in these namespaces
PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MOST_NODES = 250  # that the addresses reach


@dataclass(frozen=True)
class Lab:
    """What the command line says of the network."""

    links: Links
    machine: Cluster
    recorded: Path | None = None  # a run of the same layout on fast links, with trace=true


@dataclass
class LabCommand(Command):
    """Trains each job on the lab's nodes."""

    lab: Lab = field(kw_only=True)

    def prepare(self, config: TrainConfig, overrides: list[str], folder: Path | None) -> launch.Job:
        """Node 0's job is the pattern: the others' have another number, and all run at once."""
        if config.device == Device.cuda:
            raise Refused("device=cuda: the lab's ranks are CPU ranks; device=cpu is what it takes")
        config.device = Device.cpu
        links = self.lab.links
        job = launch.prepare_job(config, overrides, self.torchrun, folder, asked=self.asked)
        lines = [
            launch.torchrun_command(job.folder, local_ranks(job.folder, links), torchrun(links, i))
            for i in range(links.nodes)
        ]
        spec = job.folder / "lab.json"
        shaped_links.write(spec, links, lines)
        (job.folder / "cluster.yaml").write_text(
            yaml_of(profile_of_run(links, job.folder, self.lab.machine))
        )
        environ = {**job.environ, "GLOO_SOCKET_IFNAME": DEVICE}
        return launch.Job(job.folder, shaped_links.command(spec), environ, job.log)


def torchrun(links: Links, node: int) -> launch.Torchrun:
    """torchrun's options on one of the nodes."""
    where = (f"--master-addr={links.address(0)}", f"--master-port={PORT}")
    options = [f"--nnodes={links.nodes}", f"--node-rank={node}", *where]
    return launch.Torchrun(options, on_one_machine=True)


def local_ranks(folder: Path, links: Links) -> int:
    return read_config(folder).layout.world_size // links.nodes


def profile_of_run(links: Links, folder: Path, machine: Cluster) -> Cluster:
    """A run's nodes and network, as the simulator takes them."""
    ranks = read_config(folder).layout.world_size
    return profile_of(links, ranks, physical_cores(), machine)


def command(argv: list[str]) -> int:
    """Build the network, train on it, and print what was measured beside what was predicted."""
    lab, rest = options(argv)
    try:
        shaped_links.probe(lab.links)
    except Missing as error:
        raise Refused(f"lab: {error}") from error
    as_json = "--json" in rest
    rest = [a for a in rest if a != "--json"]
    made = LabCommand(torchrun(lab.links, 0), as_json, lab=lab)
    jobs = jobs_of(rest)
    if jobs is not None:
        return commands.sweep(jobs, made)
    run_hydra("train", rest, made)
    for row in made.rows:
        if row.status == "refused":
            complain(row.reason)
        elif row.status == "done":
            slower = lab.links.rate is not None or lab.links.delay > 0
            found = comparison(lab, row, lab.recorded or (fast_run(lab, row) if slower else None))
            print(json.dumps(found, indent=1)) if as_json else show(lab, found)
    return made.status


def options(argv: list[str]) -> tuple[Lab, list[str]]:
    """The lab, and what is left for the training. Raises Refused, one line."""
    given, rest = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and key in KEYS:
            given[key] = value
        else:
            rest.append(argument)
    if "nodes" not in given:
        raise Refused("nodes is not set: give it as nodes=2 or more")
    count = given["nodes"]
    if not count.isdigit() or not 2 <= int(count) <= MOST_NODES:
        raise Refused(f"nodes={count}: must be a whole number from 2 to {MOST_NODES}")
    rate, delay = given.get("rate", "none"), given.get("delay", "0ms")
    links = Links(int(count), rate_of(rate), delay_of(delay))
    run = Path(given["recorded"]).expanduser() if "recorded" in given else None
    if run:
        recorded(run)  # refused now, not when the training is over
    return Lab(links, clusters.named_or_file(given.get("machine", "laptop"), "machine"), run), rest


def rate_of(text: str) -> float | None:
    """Bits/s of 100mbit; none: no limit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text)
    if text == "none":
        return None
    if not match or not float(match[1]):
        raise Refused(f"rate={text}: must be a number with kbit, mbit or gbit, or none")
    return float(match[1]) * PREFIXES[match[2]]


def delay_of(text: str) -> float:
    """Seconds of 2ms."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    if not match:
        raise Refused(f"delay={text}: must be a number with us, ms or s")
    return float(match[1]) * SECONDS[match[2]]


def fast_run(lab: Lab, row: Row) -> Path:
    """Train the job of `row` on links as fast as the machine, with a trace, and return its folder.

    It is RUN/fast, and has as many steps as the prediction needs. Raises Refused where it fails.
    """
    assert row.folder is not None
    progress("the same on links as fast as the machine, which the prediction replays")
    fast = replace(lab, links=Links(lab.links.nodes, None))
    folder, steps = row.folder / FAST, min(FAST_STEPS, read_config(row.folder).steps)
    made = LabCommand(torchrun(fast.links, 0), as_json=True, lab=fast)
    run_hydra("train", [*row.overrides, *ALONE, f"steps={steps}", f"run.dir={folder}"], made)
    if any(job.status != "done" for job in made.rows):
        reasons = "; ".join(job.reason or job.status for job in made.rows)
        raise Refused(f"lab: the run on fast links, {folder}: {reasons}")
    return folder


def comparison(lab: Lab, row: Row, recorded_run: Path | None) -> dict[str, Any]:
    """A run's measured step, and what the replay of the recorded run predicts of it."""
    ledger = row.ledger()
    assert ledger is not None and row.folder is not None
    measured = ledger["step"]["time_s"]["total"]
    seconds = None
    if recorded_run is not None:
        seconds = predicted_seconds(recorded_run, lab.links, lab.machine)
    return {
        "run": str(row.folder),
        "nodes": lab.links.nodes,
        "rate": lab.links.rate,
        "delay": lab.links.delay,
        "machine": lab.machine.name,
        "recorded": None if recorded_run is None else str(recorded_run),
        "measured_time_s": measured,
        "predicted_time_s": seconds,
        "error": seconds / measured - 1 if seconds and measured else None,
    }


def predicted_seconds(fast: Path, links: Links, machine: Cluster) -> float:
    """Seconds of a step over `links`, by the replay of a run that was recorded on fast links.

    This is the one prediction of the lab: the command shows it, and docs/results/lab.md quotes it.
    """
    return seconds_over(fast, profile_of_run(links, fast, machine))


def seconds_over(fast: Path, cluster: Cluster) -> float:
    """A step of a run that was recorded on fast links, replayed over the lab's: a message takes
    what the profile says, or what it took there, whichever is longer, for links only add."""
    times = EventTimes(cluster)

    def message_seconds(message: Message) -> float:
        return max(measured_message(message), times.message(message))

    return replay(recorded(fast).programs, measured_work, message_seconds).total


def show(lab: Lab, found: dict[str, Any]) -> None:
    """One table."""
    table = Table(title="time of a step in the lab", title_justify="left")
    for name in ("from", "step", "error"):
        table.add_column(name, justify="left" if name == "from" else "right")
    table.add_row("measured", human_seconds(found["measured_time_s"]), "")
    off = DASH if found["error"] is None else f"{found['error']:+.1%}"
    if found["recorded"] is not None:
        table.add_row("predicted", human_seconds(found["predicted_time_s"]), off)
    console = make_console()
    console.print(table)
    if found["recorded"] is not None:
        said = f"predicted: the replay of {found['recorded']} with messages of {lab.machine.name}"
        console.print(f"{said} and of these links", markup=False, soft_wrap=True)
    console.print(f"the network as a cluster profile: {found['run']}/cluster.yaml", markup=False)
