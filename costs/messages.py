"""What one rank sent in one step, message by message, and summed up as rows of the ledger."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from costs.ledger import wire_bytes
from costs.phases import Phases
from costs.standing import CallCounter

Row = dict[str, Any]
Key = tuple[str, str, str]  # collective, axis, dtype


@dataclass(slots=True)
class Call:
    """One collective, as one rank saw it. Times are those of time.perf_counter."""

    collective: str
    ranks: frozenset[int]  # global
    axis: str | None  # as the group's maker called it
    dtype: str
    payload_bytes: int
    start: float
    end: float | None = None  # None: not yet over
    peer: int | None = None  # global rank of the other end of a send or recv
    phase: str = "other"  # of costs.program.PHASES

    @property
    def is_control(self) -> bool:
        """No part of the mathematics: a barrier, an object that travels as its pickled bytes
        (uint8), or a single integer a rank: how long that object is, or that a stage is there."""
        number = self.dtype in ("int32", "int64") and self.payload_bytes <= 8 * len(self.ranks)
        lone = number and self.collective != "all_to_all"  # as of the tokens for each expert
        return self.collective == "barrier" or self.dtype == "uint8" or lone


@dataclass(slots=True)
class Control:
    """Messages that are only counted."""

    calls: int = 0
    payload_bytes: int = 0

    def add(self, call: Call) -> None:
        self.calls += 1
        self.payload_bytes += call.payload_bytes


@dataclass
class CommunicationMeter:
    """What this process sent between start() and stop(). There is one, as there is one wire."""

    calls: list[Call] = field(default_factory=list)
    # when the calling thread was held up, and by what
    waits: list[tuple[float, float, Call]] = field(default_factory=list)
    recording: bool = False
    phases: Phases = field(default_factory=Phases)
    outside: Control = field(default_factory=Control)  # sent while nothing was recorded
    standing: CallCounter | None = None  # counts them in a file, for when this rank is no more

    def start(self) -> None:
        """Forget the last step and record the next."""
        self.calls, self.waits, self.recording = [], [], True

    def stop(self) -> None:
        self.recording = False

    def add(self, call: Call) -> None:
        if self.recording:
            self.calls.append(call)
        else:
            self.outside.add(call)


def gloo_bytes(collective: str, payload_bytes: int, group_size: int) -> int:
    """Bytes that a rank sends under gloo, on the average of its group, rounded down.

    Those of a ring (gloo/allreduce.cc, allgather.cc, alltoall.cc; a broadcast's tree sends as many
    in all), but for reduce_scatter: ProcessGroupGloo all_reduces the whole input, twice the bytes.
    Checked against the kernel's counters in tests/test_kernel_bytes.py.
    """
    ring = "all_reduce" if collective == "reduce_scatter" else collective
    return wire_bytes(ring, payload_bytes, group_size)


def axis_of(call: Call, axis_of_ranks: dict[frozenset[int], str]) -> str:
    """The axis that a call's group was made for, or else that its ranks stand for."""
    unnamed = "ranks " + ",".join(map(str, sorted(call.ranks)))
    return call.axis or axis_of_ranks.get(call.ranks, unnamed)


def rows_of(calls: list[Call], axis_of_ranks: dict[frozenset[int], str]) -> list[Row]:
    """Sum calls up by (collective, axis, group size, dtype, phase), in the order of their first.

    A group of one rank moves nothing, and control is counted elsewhere: neither is a row.
    """
    grouped: dict[tuple, list[Call]] = defaultdict(list)
    for call in calls:
        if len(call.ranks) > 1 and not call.is_control:
            axis = axis_of(call, axis_of_ranks)
            grouped[call.collective, axis, len(call.ranks), call.dtype, call.phase].append(call)
    return [_row(key, same) for key, same in grouped.items()]


def _row(key: tuple[str, str, int, str, str], calls: list[Call]) -> Row:
    collective, axis, n, dtype, phase = key
    seconds = [call.end - call.start for call in calls if call.end is not None]
    return {
        "collective": collective,
        "axis": axis,
        "group_size": n,
        "dtype": dtype,
        "phase": phase,
        "calls": len(calls),
        "payload_bytes": sum(call.payload_bytes for call in calls),
        "wire_bytes": sum(wire_bytes(collective, c.payload_bytes, n) for c in calls),
        "backend_bytes": sum(gloo_bytes(collective, c.payload_bytes, n) for c in calls),
        "time_s": sum(seconds) if len(seconds) == len(calls) else None,
    }


def payloads(rows: Iterable[Row]) -> Counter[Key]:
    """Payload bytes by (collective, axis, dtype): of all phases and group sizes together."""
    sent: Counter[Key] = Counter()
    for row in rows:
        sent[row["collective"], row["axis"], row["dtype"]] += row["payload_bytes"]
    return sent


def control_of(calls: list[Call]) -> Control:
    """The barriers and objects among them."""
    control = Control()
    for call in calls:
        if call.is_control:
            control.add(call)
    return control


def tensors_in(argument: Any) -> Iterator[Tensor]:
    """Tensors of an argument that may be a tensor or nested lists of them."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from tensors_in(part)


meter = CommunicationMeter()
