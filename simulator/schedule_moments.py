"""What a pipeline rank with several stages holds at each moment of its order, as counts.

A walk through simulator/schedules.py's order. What torch.distributed.pipelining (2.13) keeps was
read off its stage.py and _backward.py, and is held against traces by the tests:

- a buffer for each micro-batch that comes from another rank, all of them from the beginning;
- what is sent, and gradients that came, until the end of the step (works are waited for then); at
  the turn of a V, where two stages are neighbours on one rank, what one hands the other;
- of a backward that is split (I, W) all that forward kept, and the gradients of what its products
  gave, until W. The first stage has no input to find a gradient for: its I does nothing, and its W
  is a whole backward;
- of the last stage's newest I the loss's graph, until its next backward.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from parallel.layout import PipelineConfig, PipelineSchedule
from simulator.plans import Array
from simulator.schedules import order_of

# Columns of a rank: messages of one activation's size; those that two neighbouring stages hand over
# on it; whether the last stage's newest I holds the loss's graph
SHARED = ("messages", "turned", "newest")
ALIKE = 6
# Columns of each lap, counts: micro-batches that wait; of these, those between I and W; whether its
# weights have gradients. Then what is going on, 0 or 1: the loss's backward; a whole backward's in
# the last block and in the first, and behind it; an I in the first block, and at its end; and
# whether such a backward is the lap's first. A W, and whether it is not the lap's first
OF_LAP = (
    *("waiting", "split", "done", "loss", "last_block", "first_block", "behind", "half", "halved"),
    *("new_last_block", "new_first_block", "new_behind", "weights", "again"),
)


@cache
def column(name: str, lap: int) -> int:
    """The place of a lap's column."""
    return len(SHARED) + lap * len(OF_LAP) + OF_LAP.index(name)


class Walk:
    """The state of one rank, and the moments that it has been through.

    Messages only grow: of moments that are else alike the latest is the fullest, and is kept.
    """

    def __init__(self, stages: list[int], count: int, turns: set[int], micro_batches: int) -> None:
        """`stages`: the rank's, of `count`. `turns`: those whose one before is on the same rank."""
        self.last = [stage == count - 1 for stage in stages]
        self.first = [stage == 0 for stage in stages]
        self.turned = [stage in turns for stage in stages]
        self.comes = [stage > 0 and stage not in turns for stage in stages]
        self.goes = [stage < count - 1 and stage + 1 not in turns for stage in stages]
        self.messages, self.handed, self.newest = micro_batches * sum(self.comes), 0, False
        self.waiting, self.split, self.done = ([0] * len(stages) for _ in range(3))
        self.begun = 0  # actions
        self.seen: dict[tuple, tuple[int, int, int]] = {}

    def look(self, lap: int, *names: str) -> None:
        """Note this moment, with what is going on in it."""
        state = (*self.waiting, *self.split, *self.done)
        self.seen[names, lap, self.newest, state] = self.messages, self.handed, self.begun

    def do(self, kind: str, lap: int) -> None:
        """One action. A forward is not looked at: what begins after the last of several is."""
        self.begun += 1
        if kind == "F":
            self.waiting[lap] += 1
            self.messages += self.goes[lap]
            self.handed += self.turned[lap]
            return
        if kind != "W":
            self.messages += self.goes[lap]  # the gradient that came
            self.newest &= not self.last[lap]
        if self.first[lap] and kind == "I":
            self.look(lap)
        elif kind == "B" or self.first[lap]:
            self.whole(lap)
        elif kind == "I":
            self.half(lap)
        else:
            self.look(lap, "weights", *(["again"] if self.done[lap] else []))
            self.split[lap] -= 1
            self.over(lap)

    def whole(self, lap: int) -> None:
        """A backward of inputs and weights at once. In its first block it is fuller than in its
        last one only where the gradients are new."""
        if self.last[lap]:
            self.look(lap, "loss")
        if self.done[lap]:
            self.look(lap, "last_block")
            if self.first[lap]:
                self.look(lap, "behind")
        else:
            for name in ("last_block", "first_block", "behind"):
                self.look(lap, name, f"new_{name}")
        self.hand_down(lap)
        self.over(lap)

    def half(self, lap: int) -> None:
        """A backward of inputs."""
        if self.last[lap]:
            self.look(lap, "loss")
        self.look(lap, "half")
        self.look(lap, "halved")
        self.split[lap] += 1
        self.hand_down(lap)
        self.newest |= self.last[lap]

    def hand_down(self, lap: int) -> None:
        """The gradient of its input goes to the stage before."""
        self.messages += self.comes[lap]
        self.handed += self.turned[lap]

    def over(self, lap: int) -> None:
        """Nothing of a micro-batch waits any longer."""
        self.waiting[lap] -= 1
        self.done[lap] = 1

    def rows(self) -> Array:
        """(moments, columns)."""
        laps = len(self.waiting)
        states = np.array([state for *_, state in self.seen])
        table = np.zeros((len(states), len(SHARED) + laps * len(OF_LAP)))
        table[:, :2] = [grown[:2] for grown in self.seen.values()]
        counts = ("waiting", "split", "done")
        table[:, [column(name, lap) for name in counts for lap in range(laps)]] = states
        table[:, SHARED.index("newest")] = [newest for _, _, newest, _ in self.seen]
        ones = [
            (row, column(name, lap))
            for row, (names, lap, _, _) in enumerate(self.seen)
            for name in names
        ]
        if ones:
            table[tuple(zip(*ones, strict=True))] = 1
        return table


class Kind(NamedTuple):
    """What decides the order of a rank's work (simulator.schedules.order_of)."""

    schedule: PipelineSchedule
    ranks: int
    local: int  # stages of each
    micro_batches: int
    rank: int


def moments(kind: Kind) -> Array:
    """(moments, columns): all that the rank goes through, each once.

    Many micro-batches come and go as ALIKE times as many as ranks do, and only add messages: what
    was there in the first half of those then has to come from the beginning, the rest to the end.
    """
    more = kind.micro_batches - ALIKE * kind.ranks
    uneven = kind.micro_batches % kind.ranks > 0
    if more <= 0 or uneven or kind.schedule == PipelineSchedule.looped_bfs:
        return walked(kind)[0]
    fewer = kind._replace(micro_batches=ALIKE * kind.ranks)
    rows, late, comes, steady, turned = walked(fewer)
    rows = rows.copy()
    rows[:, SHARED.index("messages")] += more * np.where(late, steady, comes)
    rows[:, SHARED.index("turned")] += more * late * turned
    return rows


@lru_cache(maxsize=100_000)
def walked(kind: Kind) -> tuple[Array, Array, int, int, int]:
    """All moments, and which are in the second half; a micro-batch's buffers for what comes, all of
    its messages, and what neighbouring stages hand over of it."""
    pipeline, ranks, local = PipelineConfig(kind.schedule, kind.local), kind.ranks, kind.local
    stages = pipeline.stages_of(kind.rank, ranks)
    turns = set(range(ranks, local * ranks, ranks)) if pipeline.is_v_shaped else set()
    walk = Walk(stages, local * ranks, turns, kind.micro_batches)
    for action, lap, _ in order_of(*kind):
        walk.do(action, lap)
    begun = np.array([number for *_, number in walk.seen.values()])
    comes = sum(walk.comes)
    both = 2 * (comes + sum(walk.goes))
    return walk.rows(), 2 * begun > walk.begun, comes, both, 2 * sum(walk.turned)
