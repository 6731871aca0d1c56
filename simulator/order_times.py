"""How long a pipeline takes in the order of its schedule, for many plans at once.

Every action starts when its rank is free and its input has arrived; a message when both ends have
handed it over and the one before it, between the same two ranks, is over. Orders and messages are
torch's (simulator/schedules.py, simulator/pipeline_messages.py). Each duration is an array over
plans, so that all plans of one order are walked through at once. Tests hold this to the replay.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parallel.layout import PipelineConfig, PipelineSchedule
from simulator.pipeline_messages import Steps, steps_of
from simulator.plans import SCHEDULES, Array, distinct

PASSES = ("F", "B", "I", "W")  # forward, backward, its halves
ROUNDS = 2  # of as many micro-batches as ranks; then each round takes as long as the one before
MOST_ENDS = 4_000_000  # numbers at a time: nodes times plans
IN_ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")  # all of a round have one length
NEEDS = 3  # nodes that a node waits for, at most


class Level(NamedTuple):
    """Nodes that do not wait for each other: actions, messages, waits."""

    ids: Array
    needs: Array  # (nodes, NEEDS): what must be over; node 0 is over from the start
    costs: Array  # PASSES x stages, then a message, then nothing


class Graph:
    """Nodes in the making. Ids count from 1, and a level is one more than those of its needs."""

    def __init__(self) -> None:
        self.needs: list[tuple[int, ...]] = [(0,) * NEEDS]
        self.costs, self.levels = [0], [0]

    def add(self, cost: int, *needs: int) -> int:
        """Append a node and return its id."""
        self.needs.append((*needs, *(0,) * (NEEDS - len(needs))))
        self.costs.append(cost)
        self.levels.append(1 + max(map(self.levels.__getitem__, needs)))
        return len(self.costs) - 1


class Walker:
    """One rank on its way through its steps. `last`: its last node; `arriving`: messages that its
    next node waits for."""

    def __init__(self, rank: int, steps: Steps) -> None:
        self.rank, self.steps, self.place, self.last = rank, steps, 0, 0
        self.arriving: list[int] = []

    def node(self, graph: Graph, cost: int) -> None:
        """Do something once all that is waited for has arrived."""
        self.last = graph.add(cost, self.last, *self.arriving)
        self.arriving = []


@lru_cache(maxsize=1024)
def levels_of(
    schedule: PipelineSchedule, ranks: int, local: int, micro_batches: int
) -> tuple[list[Level], int]:
    """Return the nodes of all ranks, level by level, and how many there are with node 0."""
    pipeline, graph = PipelineConfig(schedule, local), Graph()
    walkers = [
        Walker(rank, steps) for rank, steps in enumerate(steps_of(pipeline, ranks, micro_batches))
    ]
    stages = ranks * local
    home = [pipeline.rank_of(stage, ranks) for stage in range(stages)]
    for walker in walkers:  # sends that are waited for when all is done are over with it
        while walker.steps[-1][0].startswith("WAIT_"):
            walker.steps.pop()
    sent: dict[tuple, list[int]] = {}  # by message: node of each end that has handed it over
    over: dict[tuple, int] = {}  # by message: its own node
    channels: dict[tuple[int, int], int] = {}  # by source and destination: the last message
    message, nothing = len(PASSES) * stages, len(PASSES) * stages + 1

    def key_of(kind: str, stage: int, i: int) -> tuple:
        """Name a message by the stage that takes it."""
        way = kind[-1]
        gives = "SEND" in kind
        return way, stage + ((1 if way == "F" else -1) if gives else 0), i

    def go_on(walker: Walker) -> bool:
        """Do the next step; False where it must wait for another rank."""
        kind, stage, i = walker.steps[walker.place]
        if len(kind) == 1:
            walker.node(graph, PASSES.index(kind) * stages + stage)
            return True
        key = key_of(kind, stage, i)
        if kind.startswith("WAIT_"):
            if key not in over:
                return False
            if len(walker.arriving) == NEEDS - 1:
                walker.node(graph, nothing)
            walker.arriving.append(over[key])
            return True
        if walker.arriving:
            walker.node(graph, nothing)
        ends = sent.setdefault(key, [])
        ends.append(walker.last)
        if len(ends) == 2:
            way, taker, _ = key
            giver = taker - 1 if way == "F" else taker + 1
            channel = home[giver], home[taker]
            over[key] = graph.add(message, *ends, channels.get(channel, 0))
            channels[channel] = over[key]
        return True

    left = len(walkers)
    while left:
        before, left = len(graph.costs), 0
        moved = False
        for walker in walkers:
            while walker.place < len(walker.steps) and go_on(walker):
                walker.place += 1
                moved = True
            left += walker.place < len(walker.steps)
        assert moved or not left, f"{schedule.value}: no rank can go on after {before} nodes"
    for walker in walkers:
        walker.node(graph, nothing)
    needs, costs, levels = (np.array(x) for x in (graph.needs, graph.costs, graph.levels))
    order = np.argsort(levels, kind="stable")
    starts = np.flatnonzero(np.diff(levels[order], prepend=0))
    found = np.split(order, starts)[1:]
    return [Level(ids, needs[ids], costs[ids]) for ids in found], len(costs)


def walk(
    schedule: PipelineSchedule, ranks: int, local: int, m: int, durations: Array, hop: Array
) -> Array:
    """Return the seconds from the first forward to the last backward, plan by plan.

    durations: (PASSES, stages, plans). hop: seconds of a message to the next stage, by plan.
    """
    levels, count = levels_of(schedule, ranks, local, m)
    plans = durations.shape[-1]
    costs = np.concatenate([durations.reshape(-1, plans), hop[None], 0 * hop[None]])
    found = np.empty(plans)
    for start in range(0, plans, step := max(1, MOST_ENDS // count)):
        here = slice(start, start + step)
        each = np.ascontiguousarray(costs[:, here])
        over = np.zeros((count, each.shape[1]))
        for ids, needs, cost in levels:
            over[ids] = over[needs].max(axis=1) + each[cost]
        found[here] = over.max(axis=0)
    return found


def bases(schedule: PipelineSchedule, ranks: int, micro_batches: int) -> tuple[int, ...]:
    """Return the numbers of micro-batches that are walked through for so many: themselves, or where
    they are many two smaller ones, from which the rest goes on in a straight line."""
    uneven = schedule.value in IN_ROUNDS and micro_batches % ranks
    if micro_batches <= ROUNDS * ranks + 2 or uneven:
        return (micro_batches,)
    more = ranks if schedule.value in IN_ROUNDS else 2
    return (ROUNDS * ranks, ROUNDS * ranks + more)


def pipeline_seconds(
    orders: Array, ranks: Array, local: Array, m: Array, durations: Array, hop: Array
) -> Array:
    """Return `walk` of many plans, of which each has its own order.

    orders: place in SCHEDULES. durations: (PASSES, stages, plans), stages up to the most that a
    plan has. All others have one entry a plan.
    """
    found = np.zeros(len(orders))
    whole = [column.astype(np.int64) for column in (orders, ranks, local, m)]
    ends: dict[tuple[int, ...], list[int]] = {}
    for first, here in zip(*distinct(whole), strict=True):
        schedule, p, v, count = (int(column[first]) for column in whole)
        ends.setdefault((schedule, p, v, *bases(SCHEDULES[schedule], p, count)), []).extend(here)
    for (schedule, p, v, *walked), places in ends.items():
        own, way = durations[:, : p * v, places], hop[places]
        times = [walk(SCHEDULES[schedule], p, v, n, own, way) for n in walked]
        found[places] = times[-1]
        if len(walked) > 1:
            a_micro_batch = (times[1] - times[0]) / (walked[1] - walked[0])
            found[places] += (m[places] - walked[1]) * a_micro_batch
    return found


def ideal_bubble(pipeline: PipelineConfig, ranks: int, micro_batches: int) -> float:
    """Return the share of forward and backward in which a rank of a pipeline idles, by the order
    that torch works in, if messages take no time, stages cost alike and a backward takes twice as
    long as a forward (its halves as long as one).

    GPipe, 1F1B           (p-1) / (m + p-1)      Huang et al. 2019; Narayanan et al. 2021, 2.2
    interleaved, looped   (p-1) / (v m + p-1)    Narayanan et al. 2021, 2.2; Lamy-Poirier 2023
    that split backwards  (p-1) / (3 v m + p-1)  Qi et al. 2023, section 2, from so many micro-
                                                 batches on as fill the pipeline; more below
    """
    local = pipeline.local_stages
    seconds = np.array([1.0, 2.0, 1.0, 1.0]).reshape(4, 1, 1) * np.ones((1, ranks * local, 1))
    schedule, zero = pipeline.schedule, np.zeros(1)
    total = walk(schedule, ranks, local, micro_batches, seconds, zero)[0]
    return float(1 - 3 * local * micro_batches / total)
