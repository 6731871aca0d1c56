"""What one rank does in one step, in order: what a trace records and what the replay takes.

Three sources write it (a measured run, a traced one, the closed forms) and one engine reads it
(simulator/replay.py). Standard library only. Units: seconds, FLOPs, bytes.

The rank does one thing after another. A Message is handed over and the rank goes on at once; it
starts when every rank of its group has handed its own over, and when the group is done with the
one before. A Wait holds the rank up until that message has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PHASES = ("data", "forward", "backward", "optimizer", "other")


@dataclass(slots=True)
class Work:
    """The rank computes: for `seconds` where they were measured, else as long as `flops` and
    `bytes` (read and written) take on the device."""

    phase: str
    name: str = ""  # of the operator
    seconds: float | None = None
    flops: int = 0
    bytes: int = 0
    dtype: str = "float32"
    shape: tuple[int, ...] = ()  # of a matrix product: (batch, rows, inner, columns)
    operators: float = 1  # launched by the host, in those of plain tensors
    stage: int | None = None
    micro_batch: int | None = None
    action: str = ""  # of a pipeline (costs/timing.py), where one is known


@dataclass(slots=True)
class Message:
    """One collective, or one side of a send and its recv."""

    number: int  # its own within this rank's step; a Wait names it
    collective: str
    axis: str
    # global, of the group, a RankGrid where nobody listed them; (source, destination) of a send
    # or recv
    ranks: Sequence[int]
    dtype: str
    payload_bytes: int
    phase: str
    seconds: float | None = None  # from the last member's start to its end, where measured
    stage: int | None = None
    micro_batch: int | None = None


@dataclass(slots=True)
class Wait:
    """Nothing more is done until that message is over."""

    number: int
    phase: str
    seconds: float = 0.0  # from the message's end until the rank went on, where measured


Event = Work | Message | Wait
Program = list[Event]  # of one rank
