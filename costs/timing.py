"""Where the seconds of a step go, on one rank.

total                  the step's wall time
compute                forward and backward, without what is exposed
exposed_communication  time in which this rank could only wait for messages
bubble                 time in which a pipeline stage had nothing to do; 0 without a pipeline. With
                       one it is not told from waiting for messages so far: null, and counted there
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
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from costs.communication import CommunicationMeter

Interval = tuple[float, float]
PHASES = ("data", "forward_backward", "optimizer")


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


class StepTimer:
    """Times the phases of one step after another.

    `communication`: the meter of this rank's messages; None where their times are not known
    (NCCL), which makes exposed_communication null. `alone`: one rank, which exposes nothing.
    `staged`: the model is a pipeline.
    """

    def __init__(
        self,
        device: torch.device,
        communication: CommunicationMeter | None,
        alone: bool,
        staged: bool = False,
    ) -> None:
        self.staged = staged
        self.device, self.communication, self.alone = device, communication, alone
        self.phases: dict[str, list[Interval]] = {}
        self.tails: list[Interval] = []
        self.last: dict[str, float | None] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step; afterwards `last` holds its parts."""
        self.phases, self.tails = {name: [] for name in PHASES}, []
        start = self._now()
        yield
        self.last = self._parts(start, self._now())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step; a phase may come several times."""
        start = self._now()
        yield
        self.phases[name].append((start, self._now()))

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
            self.tails.append((engine_ended[0], time.perf_counter()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run behind the host
        return time.perf_counter()

    def _parts(self, start: float, end: float) -> dict[str, float | None]:
        total = end - start
        spent = {name: length(intervals) for name, intervals in self.phases.items()}
        exposed = self._exposed(end)
        hidden = {name: length(intersection(exposed, self.phases[name])) for name in PHASES}
        compute = spent["forward_backward"] - hidden["forward_backward"]
        optimizer = spent["optimizer"] - hidden["optimizer"]
        waited = length(exposed)
        measured = self.alone or self.communication is not None
        return {
            "total": total,
            "compute": compute,
            "exposed_communication": waited if measured else None,
            "bubble": None if self.staged else 0.0,
            "optimizer": optimizer,
            "other": max(0.0, total - compute - optimizer - waited),
        }

    def _exposed(self, end: float) -> list[Interval]:
        if self.communication is None:
            return []
        in_flight = [(call.start, call.end or end) for call in self.communication.calls]
        return union([*self.communication.waits, *intersection(self.tails, in_flight)])
