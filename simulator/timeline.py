"""What a replay found: when each event of each rank's program started and ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from costs.ledger import wire_bytes
from costs.program import Message, Program, Work
from costs.rank_grid import RankGrid
from costs.trace import COMMUNICATION, COMPUTE, WAIT, Slice

Interval = tuple[float, float]


@dataclass
class Timeline:
    """What a replay found. Seconds from the start of the step.

    `times`: start and end of every event of a rank's program; of a Wait, how long it held the rank.
    `time_s`: each rank's parts as in a ledger; they add up to when the rank was done. `idle`: by
    place in the program, the part of a Wait that is bubble.
    """

    programs: dict[int, Program]
    times: dict[int, list[Interval]]
    time_s: dict[int, dict[str, float]]
    idle: dict[int, dict[int, float]]

    @property
    def total(self) -> float:
        """Of the slowest rank."""
        return max(parts["total"] for parts in self.time_s.values())

    def slices(self, rank: int) -> list[Slice]:
        """What to draw of one rank: passes and other phases, in them operators and waits; messages.
        Nothing of no length."""
        messages: dict[int, Message] = {}
        made: list[Slice] = []
        current = Slice(rank, COMPUTE, "", 0.0, 0.0)  # the phase that goes on
        both = zip(self.programs[rank], self.times[rank], strict=True)
        for place, (event, (start, end)) in enumerate(both):
            if isinstance(event, Message):
                messages[event.number] = event
            if end <= start:
                continue
            span = (start, end)
            if isinstance(event, Work):
                kind = event.action or event.phase
                key = (kind, event.stage, event.micro_batch)
                if key != (current.kind, current.stage, current.micro_batch):
                    current = Slice(rank, COMPUTE, kind, *span, event.stage, event.micro_batch)
                    made.append(current)
                current.end = end
                if event.name not in ("", kind):
                    made.append(Slice(rank, COMPUTE, event.name, *span))
            elif isinstance(event, Message):
                sent = Slice(rank, COMMUNICATION, event.collective, *span, args=_args(event))
                sent.stage, sent.micro_batch = event.stage, event.micro_batch
                made.append(sent)
            else:
                waited = messages[event.number]
                args: dict[str, Any] = {"collective": waited.collective, "axis": waited.axis}
                args |= {"number": waited.number, "bubble_s": self.idle[rank][place]}
                made.append(Slice(rank, COMPUTE, WAIT, *span, args=args))
        return made

    def in_flight(self, rank: int) -> Iterator[tuple[Message, float]]:
        """Each message of a rank, and how long after it was handed over it was over."""
        now = 0.0
        for event, (_, end) in zip(self.programs[rank], self.times[rank], strict=True):
            if isinstance(event, Message):
                yield event, end - now
            else:
                now = end


def _args(message: Message) -> dict[str, Any]:
    """What a viewer shows of a message."""
    size, n = message.payload_bytes, len(message.ranks)
    listed = message.ranks.to_json() if isinstance(message.ranks, RankGrid) else list(message.ranks)
    return {
        "number": message.number,
        "axis": message.axis,
        "ranks": listed,
        "dtype": message.dtype,
        "payload_bytes": size,
        "wire_bytes": wire_bytes(message.collective, size, n),
        "phase": message.phase,
    }
