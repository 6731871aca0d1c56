"""The streams of a GPU in a trace: which messages go beside the computing, and what waits for them.

fully_shard gathers and scatters on streams of its own. On CPUs it makes the same calls to
torch.cpu, where they do nothing; here they keep the order that CUDA's have. A rank's program has
one line of events, that of the stream which computes:

- what is handed over on another stream goes to the place up to which that stream has waited for the
  computing one, for the host is far ahead of the device; messages of a group keep their order,
  as those of an NCCL communicator do
- a call that waits on another stream holds nothing up; the computing stream waits where it is told
  to wait for an event, or for a stream, that is behind the message

What is computed on another stream stays in the line: it takes the same device. A message that
follows one of another group on the same stream (HSDP's all_reduce behind its reduce_scatter) is not
held back by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MAIN = torch.cpu.current_stream()  # the stream that computes: torch.cpu's default one


@dataclass(frozen=True)
class Moment:
    """How far a stream is: behind the first `place` events of the line, and behind messages."""

    place: int = 0
    messages: frozenset[int] = frozenset()

    def and_(self, other: Moment) -> Moment:
        return Moment(max(self.place, other.place), self.messages | other.messages)


class Line(Protocol):
    """Who writes the line of events."""

    def length(self) -> int: ...

    def held_up(self, number: int) -> None:
        """The computing stream waits for a message."""
        ...


class Streams:
    """What the streams of one rank have waited for."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.moments: dict[Any, Moment] = {}
        self.open: set[int] = set()  # messages of other streams that MAIN has not waited for

    def patches(self) -> Iterator[tuple[Any, str, Callable]]:
        """What to put in the place of the methods of torch.cpu: (owner, name, function)."""
        stream, event = torch.cpu.Stream, torch.cpu.Event
        yield stream, "wait_stream", lambda own, other: self.wait(own, self.moment(other))
        yield stream, "wait_event", lambda own, one: self.wait(own, moment_of(one))
        yield stream, "record_event", lambda own, one=None: self.record(own, one or event())
        yield event, "wait", lambda one, own=None: self.wait(own or current(), moment_of(one))
        yield event, "record", lambda one, own=None: self.record(own or current(), one)

    def place(self) -> int | None:
        """Behind how many events of the line a message of the current stream goes; None: at its
        end."""
        stream = current()
        return None if stream is MAIN else self.moment(stream).place

    def handed_over(self, number: int) -> None:
        """The current stream has handed a message over, and is behind it from now on."""
        stream = current()
        if stream is not MAIN:
            self.open.add(number)
            self.wait(stream, Moment(messages=frozenset((number,))))

    def moment(self, stream: Any) -> Moment:
        if stream is MAIN:
            return Moment(self.line.length())
        return self.moments.get(stream, Moment())

    def wait(self, stream: Any, moment: Moment) -> None:
        if stream is not MAIN:
            self.moments[stream] = self.moment(stream).and_(moment)
            return
        for number in sorted(moment.messages & self.open):
            self.open.remove(number)
            self.line.held_up(number)

    def record(self, stream: Any, event: Any) -> Any:
        event.moment = self.moment(stream)
        return event


def moment_of(event: Any) -> Moment:
    """Of an event; of one that was recorded before the trace began, the beginning."""
    return getattr(event, "moment", Moment())


def current() -> Any:
    return torch.cpu.current_stream()
