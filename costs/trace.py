"""trace.json.gz: what every rank did in one step, on a common clock. Opens in Perfetto.

A JSON object as Chrome's trace viewer and Perfetto take it (Trace Event Format, Google 2016), with
keys of our own that they pass over:

traceEvents   ph "X": a slice, ts and dur in microseconds. pid: the rank. tid 0: what it computes;
              tid 1, 2 ...: its messages, as many tracks as it has in flight at once.
              cat: "compute,KIND" or "communication,COLLECTIVE". args: stage, micro_batch, and of a
              message number, axis, ranks, dtype, payload_bytes, wire_bytes, phase; the ranks
              of a group of more than 64 as {first, axes: [[size, stride], ...]}.
              ph "C": the rank's bytes by category of memory.
              ph "M": names.
programs      {rank: [event, ...]}, a rank's step as costs/program.py has it; an event is its fields
              and "event": "work" | "message" | "wait". Fields at their defaults are left out.
about         what else is known: the step's number, seconds by phase, how memory was followed

Slices of a track nest: a wait lies in the forward or backward that waits, or in none; so does an
operator. Standard library only, so that simulated steps are written and read by the same functions.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from costs.outside import read_json
from costs.program import PHASES, Event, Message, Program, Wait, Work
from costs.rank_grid import RankGrid, ranks_from_json

COMPUTE, COMMUNICATION = "compute", "communication"  # tracks
# kinds of slices of the compute track
STEP, WAIT = "step", "wait"
EVENTS: dict[str, type] = {"work": Work, "message": Message, "wait": Wait}
MICRO = 1e6  # microseconds of a second


@dataclass(slots=True)
class Slice:
    """A stretch of time of one rank, in seconds since the step began on the first rank."""

    rank: int
    track: str  # COMPUTE | COMMUNICATION
    kind: str  # step, wait, a phase of costs/program.py, an action of a pipeline, an operator, or a
    # collective
    start: float
    end: float
    stage: int | None = None
    micro_batch: int | None = None
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a viewer writes on it."""
        if self.track == COMMUNICATION:
            return f"{self.kind} {self.args.get('axis', '')}".rstrip()
        if self.kind == WAIT and "collective" in self.args:
            return f"wait for {self.args['collective']}"
        number = "" if self.micro_batch is None else f" {self.micro_batch}"
        return f"{self.kind}{number}"


@dataclass(slots=True)
class MemorySample:
    """What a rank held at one moment, in bytes by category."""

    rank: int
    time: float  # seconds, as in Slice
    held: dict[str, int]


@dataclass
class Trace:
    """One step of all ranks."""

    slices: list[Slice]
    programs: dict[int, Program] = field(default_factory=dict)
    memory: list[MemorySample] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def write(path: Path, trace: Trace) -> None:
    """Write a trace, whole or not at all."""
    whole = {
        "traceEvents": list(events_of(trace)),
        "displayTimeUnit": "ms",
        "programs": {
            str(rank): [_to_json(event) for event in program]
            for rank, program in trace.programs.items()
        },
        "about": trace.about,
    }
    part = path.with_name(path.name + ".part")
    try:
        with gzip.open(part, "wt", compresslevel=6) as file:
            # dump() would encode value by value in Python, ten times slower
            file.write(json.dumps(whole, separators=(",", ":"), allow_nan=False))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


NO_PROGRAMS = (
    "it lacks the program of each rank (torch's profiler writes none); ./launch.sh trace=true ... "
    "records a trace that has them"
)


def read(path: Path) -> Trace:
    """What write() wrote. Raises ValueError, one line with the file's name."""
    try:
        whole = read_json(path, packed=True)
        if not isinstance(whole, dict) or "programs" not in whole:
            raise ValueError(NO_PROGRAMS)
        _need(type(whole["about"]) is dict, "about", whole["about"])
        return Trace(
            slices=[_slice(e) for e in whole["traceEvents"] if e["ph"] == "X"],
            programs={
                int(rank): [_from_json(event) for event in program]
                for rank, program in whole["programs"].items()
            },
            memory=[_sample(e) for e in whole["traceEvents"] if e["ph"] == "C"],
            about=whole["about"],
        )
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        said = str(error) if error.args == (NO_PROGRAMS,) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a trace: {said}") from error


def events_of(trace: Trace) -> Iterator[dict[str, Any]]:
    """The Chrome events of a trace."""
    for rank in sorted({s.rank for s in trace.slices}):
        own = [s for s in trace.slices if s.rank == rank]
        tracks = [[s for s in own if s.track == COMPUTE]]
        tracks += lanes(s for s in own if s.track == COMMUNICATION)
        yield _named("process_name", rank, 0, f"rank {rank}")
        for tid, track in enumerate(tracks):
            name = COMPUTE if tid == 0 else COMMUNICATION + (f" {tid}" if len(tracks) > 2 else "")
            yield _named("thread_name", rank, tid, name)
            # of two that begin at once, the one that holds the other comes first
            for piece in sorted(track, key=lambda s: (s.start, -s.end)):
                yield _event(piece, tid)
    for sample in trace.memory:
        at = {"ph": "C", "pid": sample.rank, "tid": 0, "ts": round(sample.time * MICRO, 3)}
        yield {**at, "name": "memory", "args": sample.held}


def lanes(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Slices spread over as few tracks as it takes for none to overlap another of its track."""
    made: list[list[Slice]] = []
    for piece in sorted(slices, key=lambda s: (s.start, s.end)):
        free = next((lane for lane in made if lane[-1].end <= piece.start), None)
        if free is None:
            made.append([piece])
        else:
            free.append(piece)
    return made


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _event(piece: Slice, tid: int) -> dict[str, Any]:
    start, end = round(piece.start * MICRO, 3), round(piece.end * MICRO, 3)
    place = {"stage": piece.stage, "micro_batch": piece.micro_batch}
    args = {**{key: value for key, value in place.items() if value is not None}, **piece.args}
    return {
        "ph": "X",
        "name": piece.name,
        "cat": f"{piece.track},{piece.kind}",
        "pid": piece.rank,
        "tid": tid,
        "ts": start,
        "dur": round(end - start, 3),
        "args": args,
    }


def _slice(event: dict[str, Any]) -> Slice:
    track, _, kind = event["cat"].partition(",")
    args, start = dict(event["args"]), event["ts"]
    place = args.pop("stage", None), args.pop("micro_batch", None)
    end = start + event["dur"]
    piece = Slice(event["pid"], track, kind, start / MICRO, end / MICRO, *place, args)
    _check_fields(piece)
    for key, kinds in ARGS.items():
        _need(_fits(args.get(key), kinds), key, args.get(key))
    return piece


# what is read of a slice's args; all else is for viewers
ARGS = {
    "number": "int | None",
    "axis": "str | None",
    "collective": "str | None",
    **dict.fromkeys(("ready", "seconds", "bubble_s"), "float | None"),
}


def _sample(event: dict[str, Any]) -> MemorySample:
    sample = MemorySample(event["pid"], event["ts"] / MICRO, event["args"])
    _check_fields(sample)
    for part, held in sample.held.items():
        _need(_whole(held), part, held)
    return sample


def _check_fields(made: Any) -> None:
    """Raise ValueError unless every field has the type that its class states."""
    for f in fields(made):
        value = getattr(made, f.name)
        _need(_fits(value, str(f.type)), f.name, value)


def _fits(value: Any, kinds: str) -> bool:
    return any(FITS[kind](value) for kind in kinds.split(" | "))


def _whole(value: Any) -> bool:
    return type(value) is int


def _ranks(value: Any) -> bool:
    return isinstance(value, RankGrid) or (type(value) is tuple and all(map(_whole, value)))


FITS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "str": lambda value: type(value) is str,
    "int": _whole,
    "float": lambda value: type(value) in (int, float),
    "tuple[int, ...]": _ranks,
    "Sequence[int]": _ranks,
    "dict[str, Any]": lambda value: type(value) is dict,
    "dict[str, int]": lambda value: type(value) is dict,
}


def _need(holds: bool, key: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{key}: {repr(value)[:60]} is none")


def _to_json(event: Event) -> dict[str, Any]:
    kind = next(name for name, made in EVENTS.items() if isinstance(event, made))
    values = {f.name: (getattr(event, f.name), f.default) for f in fields(event)}
    kept = {k: v for k, (v, default) in values.items() if default is MISSING or v != default}
    if isinstance(event, Message) and isinstance(event.ranks, RankGrid):
        kept["ranks"] = event.ranks.to_json()
    return {"event": kind, **kept}


def _from_json(event: dict[str, Any]) -> Event:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in event.items()}
    if "ranks" in values:
        values["ranks"] = ranks_from_json(values["ranks"])
    made: Event = EVENTS[str(values.pop("event"))](**values)
    _check_fields(made)
    _need(made.phase in PHASES, "phase", made.phase)
    if isinstance(made, Message):
        ends = made.collective in ("send", "recv")
        _need(len(made.ranks) == 2 if ends else len(made.ranks) > 0, "ranks", made.ranks)
    return made
