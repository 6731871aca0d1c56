"""How far a rank has come among its messages, in a file that outlives it.

A rank that hangs says nothing, and one that was killed never will. So every message is counted in a
mapped file, at half a microsecond and without a call of the system, and whoever is left can read
where each rank stands: experiments/verdict.py. The file is

    head     process, step, and how long the description is
    counts   one record for each kind of message: how often, and what the last one was
    kinds    their description in JSON, in the order of the records

A kind is a group, or one direction to one peer: what is called in one order by all ranks of it.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEAD = struct.Struct("<qqq")  # process, step, bytes of the description
RECORD = struct.Struct("<qdq16s")  # calls, time.time() of the last, its bytes, its collective
KINDS = 128  # more are not counted: a layout has some twenty
SIZE = 2**16


@dataclass(frozen=True)
class Kind:
    """Messages that come in one order: of a group, or from one rank to another."""

    axis: str | None  # as the group's maker called it; None: the group of all
    ranks: tuple[int, ...]  # global, in order
    way: str = ""  # send or recv; nothing for what the whole group calls
    peer: int | None = None  # global rank at the other end


@dataclass(frozen=True)
class Called:
    """What a rank has called of a kind."""

    calls: int
    time: float  # time.time() of the last
    payload_bytes: int  # of the last
    collective: str  # the last


@dataclass(frozen=True)
class Standing:
    """What the file of a rank says."""

    process: int
    step: int  # the one that it was in; -1 before the first
    called: dict[Kind, Called]


class Tally:
    """The record of one kind of message."""

    def __init__(self, memory: mmap.mmap, place: int) -> None:
        self.memory, self.place, self.calls = memory, place, 0

    def add(self, payload_bytes: int, collective: str) -> None:
        """One more call."""
        self.calls += 1
        said = self.calls, time.time(), payload_bytes, collective.encode()
        RECORD.pack_into(self.memory, self.place, *said)


class CallCounter:
    """Writes the file of this rank."""

    def __init__(self, path: Path, process: int) -> None:
        with open(path, "w+b") as file:
            file.write(bytes(SIZE))  # truncate allots nothing: on a full disk a store is a SIGBUS
            file.flush()
            self.memory = mmap.mmap(file.fileno(), SIZE)
        self.process, self.kinds, self.length = process, list[Kind](), 0
        self.at_step(-1)

    def at_step(self, step: int) -> None:
        """From now on it is in this step."""
        self.step = step
        HEAD.pack_into(self.memory, 0, self.process, step, self.length)

    def tally(self, kind: Kind) -> Tally | None:
        """The record of a kind that is new; None where there is no room for it."""
        kinds = [*self.kinds, kind]
        text = json.dumps([[k.axis, k.ranks, k.way, k.peer] for k in kinds]).encode()
        start = HEAD.size + KINDS * RECORD.size
        if len(kinds) > KINDS or start + len(text) > SIZE:
            return None
        self.kinds, self.length = kinds, len(text)
        self.memory[start : start + len(text)] = text
        self.at_step(self.step)
        return Tally(self.memory, HEAD.size + (len(kinds) - 1) * RECORD.size)


def read(path: Path) -> Standing | None:
    """What a rank's file says; None where there is none, or it is not whole."""
    try:
        content = path.read_bytes()
        process, step, length = HEAD.unpack_from(content)
        start = HEAD.size + KINDS * RECORD.size
        kinds = json.loads(content[start : start + length]) if length else []
        called = dict(_records(kinds, content))
    except (OSError, ValueError, TypeError, struct.error):
        return None
    return Standing(process, step, called)


def _records(kinds: list, content: bytes) -> Iterator[tuple[Kind, Called]]:
    for number, (axis, ranks, way, peer) in enumerate(kinds):
        record = RECORD.unpack_from(content, HEAD.size + number * RECORD.size)
        calls, when, size, collective = record
        name = collective.rstrip(b"\0").decode(errors="replace")
        yield Kind(axis, tuple(ranks), way, peer), Called(calls, when, size, name)
