"""One step of all ranks on a common clock: who waited for whom, as slices and as programs.

A message moves once every rank that takes part has handed its side over. So of a wait along pp,

    bubble   what passes before the last of them has: a neighbour was still busy
    exposed  the rest: what the message itself needs

for a send as for a recv, since gloo sends nothing before there is a recv for it. Collectives that
span pp count alike: the sum of the losses is where a stage that is done first waits for the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from costs.ledger import wire_bytes
from costs.messages import Call, axis_of
from costs.program import Event, Message, Program, Wait, Work
from costs.timing import MESSAGE_KINDS, Action, Interval, StepRecord, intersection
from costs.trace import COMMUNICATION, COMPUTE, STEP, WAIT, Slice

PHASE_OF_KIND = {"forward": "forward", "loss": "forward"}  # of an action; all others are backward


@dataclass(slots=True)
class Transfer:
    """What only all sides together know of one rank's call."""

    ready: float  # when the last that takes part had handed its side over
    seconds: float | None  # from then to its end


def name_axes(record: StepRecord, axis_of_ranks: dict[frozenset[int], str]) -> None:
    """Write into each call the mesh axis that its group stands for, which its own rank knows."""
    for call in record.calls:
        call.axis = axis_of(call, axis_of_ranks)


def transfers(records: Sequence[StepRecord]) -> list[list[Transfer]]:
    """Of each rank's calls in order, what the others know. `records`: of all ranks, one clock.

    All ranks issue a group's calls in one order, and so do the two ends of a send and its recv:
    the k-th is the k-th. A call whose other sides were not seen was ready when it was handed over.

    Of point to point and of reduce_scatter gloo says no end: it is when somebody waited for it, and
    so `seconds` are too many where it had arrived before.
    """
    sides: dict[tuple, list[Call]] = defaultdict(list)
    keys: list[list[tuple]] = []
    for rank, record in enumerate(records):
        count: dict[tuple, int] = defaultdict(int)
        keys.append([])
        for call in record.calls:
            group = _group(rank, call)
            count[group] += 1
            keys[-1].append((*group, count[group]))
            sides[keys[-1][-1]].append(call)
    return [
        [_transfer(call, sides[key]) for call, key in zip(record.calls, own, strict=True)]
        for record, own in zip(records, keys, strict=True)
    ]


def _group(rank: int, call: Call) -> tuple:
    """What the sides of one call have in common."""
    if call.peer is None:
        return call.collective, call.axis, call.ranks
    ends = (rank, call.peer) if call.collective == "send" else (call.peer, rank)
    return "send", call.axis, ends


def _transfer(call: Call, sides: list[Call]) -> Transfer:
    wanted = len(call.ranks) if call.peer is None else 2
    ready = max(side.start for side in sides) if len(sides) == wanted else call.start
    ends = [side.end for side in sides if side.collective == "recv"] or [call.end]
    end = ends[0]
    return Transfer(ready, None if end is None else max(0.0, end - ready))


def bubbles(record: StepRecord, own: Sequence[Transfer]) -> list[Interval]:
    """When a pipeline's rank waited for one that was still busy."""
    ready = {id(call): transfer.ready for call, transfer in zip(record.calls, own, strict=True)}
    found = []
    for start, end, call in record.all_waits():
        until = min(end, ready.get(id(call), start))
        if "pp" in (call.axis or "").split("*") and until > start:
            found.append((start, until))
    return found


class Labels:
    """Which phase, action, stage and micro-batch a moment or a message of a step belongs to."""

    def __init__(self, record: StepRecord) -> None:
        self.record = record
        self.actions = [a for a in record.actions if a.kind not in MESSAGE_KINDS]
        self.messages: dict[int, Action] = {}
        for side in ("send", "recv"):
            marks = [a for a in record.actions if a.kind.startswith(side)]
            calls = [c for c in record.calls if c.collective == side and c.axis == "pp"]
            if len(marks) == len(calls):  # a schedule that does not say leaves them without
                self.messages.update((id(c), a) for c, a in zip(calls, marks, strict=True))

    def at(self, moment: float) -> tuple[str, Action | None]:
        """Phase and action of a moment."""
        phase = self._phase(moment)
        if phase != "forward_backward":
            return phase, None
        before = [a for a in self.actions if a.start <= moment]
        if not before:
            return "forward", None
        last = before[-1]
        return phase_of(last), last if moment < last.end else None

    def _phase(self, moment: float) -> str:
        for phase, intervals in self.record.phases.items():
            if any(start <= moment < end for start, end in intervals):
                return phase
        return "other"

    def of(self, call: Call) -> Action | None:
        """What was done with the micro-batch that a message carries."""
        return self.messages.get(id(call)) or self.at(call.start)[1]

    def of_wait(self, start: float, call: Call) -> str:
        """Phase of a wait: that of the message, for one between stages; else that in which the rank
        was when it waited."""
        return call.phase if id(call) in self.messages else self.at(start)[0]


def phase_of(action: Action) -> str:
    """forward or backward."""
    return PHASE_OF_KIND.get(action.kind, "backward")


def slices_of(rank: int, record: StepRecord, own: Sequence[Transfer], zero: float) -> list[Slice]:
    """A rank's step for a viewer; `zero` is the moment that all times count from."""
    labels = Labels(record)
    number = {id(call): i for i, call in enumerate(record.calls)}
    idle_time = bubbles(record, own)
    made = [Slice(rank, COMPUTE, STEP, record.start, record.end)]
    for phase in ("data", "optimizer"):
        made += [Slice(rank, COMPUTE, phase, start, end) for start, end in record.phases[phase]]
    for a in labels.actions:
        made.append(Slice(rank, COMPUTE, a.kind, a.start, a.end, a.stage, a.micro_batch))
    for start, end, call in record.all_waits():
        idle = sum(e - s for s, e in intersection(idle_time, [(start, end)]))
        args = {
            "collective": call.collective,
            "axis": call.axis,
            "number": number.get(id(call)),
            "bubble_s": idle,
        }
        made.append(Slice(rank, COMPUTE, WAIT, start, end, args=args))
    for call, transfer in zip(record.calls, own, strict=True):
        action = labels.of(call)
        more: dict[str, Any] = {
            "number": number[id(call)],
            "axis": call.axis,
            "ranks": _ranks(rank, call),
            "dtype": call.dtype,
            "payload_bytes": call.payload_bytes,
            "wire_bytes": wire_bytes(call.collective, call.payload_bytes, len(call.ranks)),
            "phase": call.phase,
            "ready": transfer.ready - zero,
            "seconds": transfer.seconds,
        }
        stage, micro_batch = (action.stage, action.micro_batch) if action else (None, None)
        end = record.end if call.end is None else max(call.end, call.start)
        place = call.collective, call.start, end, stage, micro_batch
        made.append(Slice(rank, COMMUNICATION, *place, more))
    for piece in made:
        piece.start, piece.end = piece.start - zero, piece.end - zero
    return made


def _ranks(rank: int, call: Call) -> list[int]:
    """The group's; (source, destination) of a send or recv."""
    if call.peer is None:
        return sorted(call.ranks)
    return [rank, call.peer] if call.collective == "send" else [call.peer, rank]


def program_of(rank: int, record: StepRecord, own: Sequence[Transfer]) -> Program:
    """A rank's step as the replay takes it: what it computes between messages and waits."""
    labels = Labels(record)
    number = {id(call): i for i, call in enumerate(record.calls)}
    # (moment, order of those at one moment, when the rank goes on, what is noted)
    points: list[tuple[float, int, float, Event | None]] = []
    for start, end in [i for intervals in record.phases.values() for i in intervals]:
        points += [(start, 0, start, None), (end, 0, end, None)]
    for a in labels.actions:
        points += [(a.start, 0, a.start, None), (a.end, 0, a.end, None)]
    for call, transfer in zip(record.calls, own, strict=True):
        points.append((call.start, 1, call.start, _message(rank, call, transfer, labels, number)))
    for start, end, call in record.all_waits():
        if id(call) in number:
            points.append((start, 2, end, Wait(number[id(call)], labels.of_wait(start, call))))
    points.append((record.end, 3, record.end, None))

    program: Program = []
    now = record.start
    for moment, _, goes_on, event in sorted(points, key=lambda point: point[:2]):
        if moment > now:
            phase, action = labels.at((now + moment) / 2)
            work = Work(phase, seconds=round(moment - now, 9))
            if action:
                work.stage, work.micro_batch = action.stage, action.micro_batch
                work.action = action.kind
            program.append(work)
        if event:
            program.append(event)
        now = max(now, goes_on)
    return program


def _message(
    rank: int, call: Call, transfer: Transfer, labels: Labels, number: dict[int, int]
) -> Message:
    action = labels.of(call)
    return Message(
        number[id(call)],
        call.collective,
        call.axis or "",
        tuple(_ranks(rank, call)),
        call.dtype,
        call.payload_bytes,
        call.phase,
        transfer.seconds,
        action.stage if action else None,
        action.micro_batch if action else None,
    )


def warped(from_step: StepRecord, to_step: StepRecord) -> Callable[[float], float]:
    """The moment of `to_step` at which it did what `from_step` did at a given moment.

    Memory is followed in a step of its own, which that slows; both do the same things in the same
    order, so that a moment lies at the same share of the same action.
    """
    olds, news = _anchors(from_step), _anchors(to_step)
    if len(olds) != len(news):
        olds, news = [olds[0], olds[-1]], [news[0], news[-1]]

    def warp(moment: float) -> float:
        for (a, b), (c, d) in zip(pairwise(olds), pairwise(news), strict=True):
            if moment <= b:
                share = (moment - a) / (b - a) if b > a else 0.0
                return c + min(1.0, max(0.0, share)) * (d - c)
        return news[-1]

    return warp


def _anchors(record: StepRecord) -> list[float]:
    ends = [i for intervals in record.phases.values() for i in intervals]
    ends += [(a.start, a.end) for a in record.actions if a.kind not in MESSAGE_KINDS]
    return [record.start, *sorted(moment for pair in ends for moment in pair), record.end]
