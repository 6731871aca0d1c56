"""./launch.sh replay RUN cluster=NAME|FILE [out=DIR] [--json]: a recorded run, on another network.

./launch.sh strategy=fsdp trace=true run.dir=runs/fsdp
./launch.sh replay runs/fsdp cluster=ethernet_10g

What its ranks computed stays as it was measured; how long a message takes is the cluster's. It
first replays the run on its own messages, which must give back the step that was measured. Writes
ledger.json (source "replayed"), trace.json.gz and timeline.png/.svg into a new run folder.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from costs import ledger as ledgers
from costs import trace as traces
from costs.program import Message, Program, Wait
from costs.trace import COMMUNICATION, WAIT, Trace
from experiments.arguments import key_values
from experiments.console import human_seconds, make_console
from experiments.predict import clusters
from experiments.refused import Refused
from experiments.run_folder import make_folder
from parallel.layout import MESH_AXES, Layout
from simulator.event_times import EventTimes, measured_message, measured_work
from simulator.hardware import Cluster
from simulator.replay import replay
from simulator.timeline import Timeline

Step = dict[str, Any]
TRACE = "trace.json.gz"
RECORDS = "./launch.sh trace=true ... records one"


@dataclass(frozen=True)
class Replayed:
    """A recorded run's ledger, its replay on its own messages, and on a cluster's."""

    run: Path
    measured: dict[str, Any]
    own: Timeline
    cluster: Cluster
    there: Timeline

    @property
    def error(self) -> float:
        """Of the step time, replayed on its own messages against measured; signed."""
        return self.own.total / self.measured["step"]["time_s"]["total"] - 1

    def ledger(self) -> dict[str, Any]:
        """The run's own ledger with the times of the other network."""
        made = {key: value for key, value in self.measured.items() if key != "training"}
        steps = [
            replayed_step(step, self.there, rank)
            for rank, step in enumerate(self.measured["ranks"])
        ]
        if "pipeline" in made:
            made["pipeline"] = self._pipeline()
        said = {"run": str(self.run), "cluster": self.cluster.name, "own_error": self.error}
        environment = {**self.measured["environment"], "replay": said}
        return {
            **made,
            "source": "replayed",
            "environment": environment,
            "step": ledgers.step_of(steps),
            "ranks": steps,
        }

    def _pipeline(self) -> dict[str, Any]:
        stages = []
        for stage in self.measured["pipeline"]["stages"]:
            parts = self.there.time_s[stage["rank"]]
            idle, busy = parts["bubble"], parts["compute"]
            stages.append({**stage, "bubble_s": idle, "bubble": idle / (idle + busy)})
        return {**self.measured["pipeline"], "stages": stages}


def command(argv: list[str]) -> int:
    """Replay, write, and print the table or the ledger."""
    run, given = options(argv)
    cluster = clusters.named_or_file(given["cluster"])
    trace = recorded(run)
    done = replayed(run, trace, cluster)
    layout = done.measured["layout"]
    axes = {axis: layout[axis] for axis in (*MESH_AXES, "ep")}
    folder = make_folder(Path(given["out"]) if "out" in given else None, Layout(**axes))
    ledger = write(done, trace, folder)
    if "--json" in argv:
        print(json.dumps(ledger, indent=1))
    else:
        show(done, folder)
    return 0


def options(argv: list[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the KEY=VALUE arguments. Raises Refused, one line."""
    runs, given = key_values("replay", "RUN, cluster=NAME|FILE, out=DIR, --json", argv)
    if len(runs) != 1:
        raise Refused(f"replay takes one run's folder, not {len(runs)}: replay RUN cluster=NAME")
    if "cluster" not in given:
        raise Refused(f"cluster is not set: give it as cluster=..., {', '.join(clusters.names())}")
    return folder_of(Path(runs[0])), given


def folder_of(path: Path) -> Path:
    """Return the run's folder, of which its trace.json.gz may be given. Raises Refused."""
    if path.name == TRACE:
        return path.parent
    if path.is_file():
        raise Refused(f"{path}: replay takes a run's folder, or its {TRACE}; {RECORDS}")
    return path


def recorded(run: Path) -> Trace:
    """The trace of a run, with what its ranks took to go on after each wait. Raises Refused."""
    path = run / TRACE
    if not path.is_file():
        raise Refused(f"{run}: no {TRACE} there; {RECORDS}")
    trace = traces.read(path)
    if not any(trace.programs.values()):
        raise Refused(f"{run}: its trace has no programs; messages are metered on gloo only")
    for rank, program in trace.programs.items():
        trace.programs[rank] = with_delays(rank, program, trace)
    return trace


def with_delays(rank: int, program: Program, trace: Trace) -> Program:
    """The same program, its waits with the time from a message's end until the rank went on: a
    thread that is woken late, a copy out of a buffer."""
    own = [piece for piece in trace.slices if piece.rank == rank and "number" in piece.args]
    ends = {piece.args["number"]: piece.end for piece in own if piece.track == COMMUNICATION}
    seen = [p for p in own if p.kind == WAIT and p.args["number"] is not None]
    waits = iter(sorted(seen, key=lambda piece: piece.start))
    made: Program = []
    for event in program:
        if isinstance(event, Wait):
            wait = next(waits, None)
            if wait is not None and wait.args["number"] == event.number:
                over = max(wait.start, ends[event.number])
                event = replace(event, seconds=max(0.0, wait.end - over))
        made.append(event)
    return made


def replayed(run: Path, trace: Trace, cluster: Cluster) -> Replayed:
    """Both replays. Raises ValueError, one line, for a ledger or a program that is damaged."""
    measured = ledgers.read(run / "ledger.json")
    own = replay(trace.programs, measured_work, measured_message, queued=False)
    times = EventTimes(cluster)
    there = replay(trace.programs, times.work, times.message)
    return Replayed(run, measured, own, cluster, there)


def replayed_step(step: Step, there: Timeline, rank: int) -> Step:
    """One rank's part of the ledger on the other network."""
    total = there.time_s[rank]["total"]
    was = step["time_s"]["total"]
    spent: dict[tuple, float] = defaultdict(float)
    for message, seconds in there.in_flight(rank):
        spent[row_key(message)] += seconds
    rows = [
        {**row, "time_s": spent.get((row["collective"], row["axis"], row["dtype"]))}
        for row in step["communication"]
    ]
    rates = {key: scaled(step[key], was, total) for key in ("tokens_per_s", "mfu", "hfu")}
    return {**step, "time_s": there.time_s[rank], "communication": rows, **rates}


def row_key(message: Message) -> tuple[str, str, str]:
    return message.collective, message.axis, message.dtype


def scaled(rate: float | None, was: float, total: float) -> float | None:
    return None if rate is None else rate * was / total


def timed(step: Step) -> Step:
    """What of a step depends on its time."""
    return {key: step[key] for key in ("time_s", "tokens_per_s", "mfu", "hfu")}


def write(done: Replayed, trace: Trace, folder: Path) -> dict[str, Any]:
    """Ledger, trace and picture."""
    from experiments.pictures import draw_timeline  # matplotlib takes a second

    ledger = done.ledger()
    ledgers.write(folder / "ledger.json", ledger)
    shutil.copyfile(done.run / "config.yaml", folder / "config.yaml")
    times = EventTimes(done.cluster)
    programs: dict[int, Program] = {
        rank: [
            replace(event, seconds=times.message(event)) if isinstance(event, Message) else event
            for event in program
        ]
        for rank, program in trace.programs.items()
    }
    slices = [piece for rank in sorted(programs) for piece in done.there.slices(rank)]
    about = {**trace.about, "replayed": done.cluster.name}
    traces.write(folder / "trace.json.gz", Trace(slices, programs, about=about))
    title = f"one step of {trace.about.get('layout', done.run.name)}, on {done.cluster.name}"
    draw_timeline(slices, folder / "timeline", title)
    return ledger


def show(done: Replayed, folder: Path) -> None:
    """Parts before and after, and how well the replay gives back what was measured."""
    console = make_console()
    before, after = done.measured["step"]["time_s"], done.ledger()["step"]["time_s"]
    table = Table(title=f"time of a step of {done.run}", title_justify="left")
    table.add_column("part")
    for name in ("measured", f"on {done.cluster.name}"):
        table.add_column(name, justify="right")
    for part in ledgers.TIME_PARTS:
        words = part.replace("_", " ")
        table.add_row(words, human_seconds(before[part]), human_seconds(after[part]))
    table.add_section()
    table.add_row("total", human_seconds(before["total"]), human_seconds(after["total"]))
    console.print(table)
    console.print(
        f"replayed on its own messages {human_seconds(done.own.total)}, measured "
        f"{human_seconds(before['total'])} ({done.error:+.1%})"
    )
    console.print(f"run folder {folder}", markup=False, soft_wrap=True)
