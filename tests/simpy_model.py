"""The same timeline from another engine: processes and events of simpy, written apart from replay.

A process a rank, a process a message. simulator/replay.py must give what this gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any

import simpy

from costs.program import Message, Program, Work

Times = dict[int, list[tuple[float, float]]]


class World:
    """Ranks and wires. Every group, and every direction between two ranks, is one wire."""

    def __init__(self, seconds_of: Callable[[Any], float]) -> None:
        self.clock, self.seconds_of = simpy.Environment(), seconds_of
        self.wires: dict[Any, simpy.Resource] = {}
        self.arrived: dict[Any, int] = defaultdict(int)  # members that handed a message over
        self.over: dict[Any, simpy.Event] = {}
        self.spans: dict[Any, tuple[float, float]] = {}
        self.handed: dict[Any, int] = defaultdict(int)

    def rank(self, own: int, program: Program, times: list) -> Generator:
        """One rank, event by event; a message's times are filled in as its key."""
        sent = {}
        for event in program:
            start = self.clock.now
            if isinstance(event, Work):
                yield self.clock.timeout(self.seconds_of(event))
            elif isinstance(event, Message):
                sent[event.number] = key = self.hand_over(own, event)
                times.append(key)
                continue
            else:
                yield self.over[sent[event.number]]
            times.append((start, self.clock.now))

    def hand_over(self, own: int, message: Message) -> Any:
        pair = message.collective in ("send", "recv")
        wire = (message.axis, pair, message.ranks)
        count = (wire, own)
        key = (wire, self.handed[count])
        self.handed[count] += 1
        if key not in self.over:
            self.over[key] = self.clock.event()
            self.wires.setdefault(wire, simpy.Resource(self.clock))
        self.arrived[key] += 1
        if self.arrived[key] == len(message.ranks):
            self.clock.process(self.carry(wire, key, message))
        return key

    def carry(self, wire: Any, key: Any, message: Message) -> Generator:
        with self.wires[wire].request() as turn:
            yield turn
            start = self.clock.now
            yield self.clock.timeout(self.seconds_of(message))
            self.spans[key] = (start, self.clock.now)
        self.over[key].succeed()


def simulate(programs: dict[int, Program], seconds_of: Callable[[Any], float]) -> Times:
    """Start and end of every event of every rank."""
    world = World(seconds_of)
    times: dict[int, list] = {rank: [] for rank in programs}
    for rank, program in programs.items():
        world.clock.process(world.rank(rank, program, times[rank]))
    world.clock.run()
    return {rank: [world.spans.get(t, t) for t in own] for rank, own in times.items()}
