"""Where the seconds of a step go, on one rank.

total                  the step's wall time, or that of a GPU's stream (costs/moments.py)
compute                forward and backward, without what is exposed
exposed_communication  time in which this rank could only wait for messages
bubble                 the part of a wait along pp before all who take part had handed their side of
                       the message over (costs/timeline.py): a neighbour was still busy; 0 without a
                       pipeline. Along other axes waiting for the last rank counts as exposed
optimizer              clipping and the update, without what is exposed
other                  the rest: batches, bookkeeping

Exposed time is seen in two ways, because one would miss half of it. FSDP, clipping and the loss sum
wait in Work.wait(), which is timed. DDP waits for its last buckets in C++, at the end of backward;
that wait is the part of backward after the autograd engine has run its last operator, during which
a message was in flight. The engine's end is known from a callback queued at the start of backward:
such callbacks run in order, so it runs before the one that DDP queues later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from costs.messages import Call, CommunicationMeter
from costs.moments import moments_of

Interval = tuple[float, float]
PHASES = ("data", "forward_backward", "optimizer")
# kinds of Action that are no work, but say to which micro-batch the next message belongs
MESSAGE_KINDS = ("send_forward", "recv_forward", "send_backward", "recv_backward")


def union(intervals: list[Interval]) -> list[Interval]:
    """The same points of time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Points of time that are in both."""
    both = [(max(s, t), min(e, f)) for s, e in union(a) for t, f in union(b)]
    return union([(start, end) for start, end in both if end > start])


def length(intervals: list[Interval]) -> float:
    """Seconds covered."""
    return sum(end - start for start, end in union(intervals))


@dataclass(slots=True)
class Action:
    """One thing that a rank did with one micro-batch of one stage."""

    kind: str  # forward, loss, backward, backward_input, backward_weight, or of MESSAGE_KINDS
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass
class StepRecord:
    """What one rank did in one step, as it was. Times are those of time.perf_counter."""

    start: float
    end: float = 0.0
    phases: dict[str, list[Interval]] = field(default_factory=lambda: {p: [] for p in PHASES})
    actions: list[Action] = field(default_factory=list)
    tails: list[Interval] = field(default_factory=list)  # of backwards, once the engine had ended
    calls: list[Call] = field(default_factory=list)
    waits: list[tuple[float, float, Call]] = field(default_factory=list)

    @property
    def total(self) -> float:
        return self.end - self.start

    def shift(self, seconds: float) -> None:
        """Move all times, onto another rank's clock."""
        self.start, self.end = self.start + seconds, self.end + seconds
        for intervals in (*self.phases.values(), self.tails):
            intervals[:] = [(start + seconds, end + seconds) for start, end in intervals]
        for action in self.actions:
            action.start, action.end = action.start + seconds, action.end + seconds
        for call in self.calls:
            call.start += seconds
            call.end = None if call.end is None else call.end + seconds
        self.waits = [(start + seconds, end + seconds, call) for start, end, call in self.waits]

    def all_waits(self) -> list[tuple[float, float, Call]]:
        """When this rank was held up, and by which message, in order; DDP's final waits included.

        Those are for the messages that nobody else waits for, one after the other as they end. One
        that had ended before held nobody up, but is waited for.
        """
        named = {id(call) for _, _, call in self.waits}
        unnamed = [(call.end or self.end, call) for call in self.calls if id(call) not in named]
        unnamed.sort(key=lambda pair: pair[0])
        found = list(self.waits)
        for start, end in sorted(self.tails):
            sent = [(over, call) for over, call in unnamed if call.start < end]
            for over, call in sent:
                begin = max(start, call.start)
                start = max(begin, min(over, end))
                found.append((begin, start, call))
            unnamed = [(over, call) for over, call in unnamed if call.start >= end]
        return sorted(found, key=lambda wait: wait[:2])

    def held_up(self) -> list[Interval]:
        """When this rank could only wait for messages."""
        return union([(start, end) for start, end, _ in self.all_waits()])

    def parts(self, bubble: list[Interval] | None, metered: bool) -> dict[str, float | None]:
        """Seconds by part; they add up to the total.

        `bubble`: the parts of held_up() that are; None where that is not known, which leaves them
        in exposed_communication. `metered` False: messages are not seen (NCCL), and neither is
        what they expose.
        """
        held_up = self.held_up()
        own = {
            name: length(intervals) - length(intersection(held_up, intervals))
            for name, intervals in self.phases.items()
        }
        compute, optimizer, waited = own["forward_backward"], own["optimizer"], length(held_up)
        idle = None if bubble is None else length(bubble)
        return {
            "total": self.total,
            "compute": compute,
            "exposed_communication": max(0.0, waited - (idle or 0.0)) if metered else None,
            "bubble": idle,
            "optimizer": optimizer,
            "other": max(0.0, self.total - compute - optimizer - waited),
        }


class StepTimer:
    """Times what one step after another does. `communication`: the meter of this rank's messages;
    None where their times are not known (NCCL)."""

    def __init__(self, device: torch.device, communication: CommunicationMeter | None) -> None:
        self.moments, self.communication = moments_of(device), communication
        self.record = StepRecord(0.0)
        self.phases: list[tuple[str, Any, Any]] = []  # and the moments of its start and end
        self.actions: list[tuple[Action, Any, Any]] = []
        self.unread: Callable[[], None] | None = None  # puts the moments of a step into its record

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step; `record` holds what it did, after `settle` at the latest."""
        record = self.record = StepRecord(0.0)
        self.phases, self.actions = [], []
        phases, actions = self.phases, self.actions
        self.moments.begin()
        start = self.moments.now()
        yield
        end = self.moments.now()
        self.settle()  # the step before, which is over by now
        seconds = self.moments.reader()

        def read() -> None:
            record.start, record.end = seconds(start), seconds(end)
            for name, first, last in phases:
                record.phases[name].append((seconds(first), seconds(last)))
            for action, first, last in actions:
                action.start, action.end = seconds(first), seconds(last)
                record.actions.append(action)

        self.unread = read
        if not self.moments.lags:
            self.settle()
        if self.communication:
            record.calls, record.waits = self.communication.calls, self.communication.waits

    def settle(self) -> None:
        """Until the last step is over and its record complete."""
        if self.unread:
            self.unread()
            self.unread = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step; a phase may come several times."""
        start = self.moments.now()
        yield
        self.phases.append((name, start, self.moments.now()))

    @contextmanager
    def action(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Around one micro-batch's way through a stage."""
        action, start = Action(kind, stage, micro_batch, 0.0, 0.0), self.moments.now()
        place = len(self.actions)
        yield
        self.actions.insert(place, (action, start, self.moments.now()))

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Around loss.backward()."""
        engine_ended: list[float] = []

        def queue(_gradient: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: engine_ended.append(time.perf_counter())
            )

        hook = loss.register_hook(queue)
        yield
        hook.remove()
        if engine_ended:
            self.record.tails.append((engine_ended[0], time.perf_counter()))
