"""How long a pipeline takes in the order of its schedule, for many plans at once.

Every action starts when its rank is free and its input has arrived; a message when both ends have
handed it over and the one before it, between the same two ranks, is over. Orders and messages are
torch's (simulator/schedules.py, simulator/pipeline_messages.py). Each duration is an array over
plans, so that all plans of one order are walked through at once. Tests hold this to the replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from parallel.layout import PipelineConfig, PipelineSchedule
from simulator.pipeline_messages import Steps, steps_of_work
from simulator.plans import SCHEDULES, Array, distinct

PASSES = ("F", "B", "I", "W")  # forward, backward, its halves
ROUNDS = 2  # of as many micro-batches as ranks; then each round takes as long as the one before
MOST_ENDS = 4_000_000  # numbers at a time: nodes times plans
IN_ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")  # all of a round have one length
WAYS = ("F", "B")  # of messages: activations, and their gradients
OVER = object()


class Level(NamedTuple):
    """Nodes that do not wait for each other: actions, messages, waits. They are numbered level by
    level."""

    ids: slice
    needs: Array  # (nodes, 3): what must be over; node 0 is over from the start
    costs: Array  # PASSES x stages, then a message, then nothing


class Graph:
    """Nodes in the making, as columns. Ids count from 1, and a level is one more than those of its
    needs. A message's number is made of its way, of the stage that takes it and of the
    micro-batch, so that both of its ends know it."""

    def __init__(self, pipeline: PipelineConfig, ranks: int, micro_batches: int) -> None:
        self.stages, self.micro_batches = ranks * pipeline.local_stages, micro_batches
        self.home = [pipeline.rank_of(stage, ranks) for stage in range(self.stages)]
        self.needs = [0, 0, 0]  # of node after node
        self.costs, self.levels = [0], [0]
        count = len(WAYS) * self.stages * micro_batches
        self.sent = [-1] * count  # by message: node of the end that has handed it over first
        self.over = [0] * count  # by message: its own node
        self.channels: dict[tuple[int, int], int] = {}  # source and destination: the last message
        self.message = len(PASSES) * self.stages
        # by kind of step: the cost of stage 0's action; whether it waits, and the number of stage
        # 0's first message
        self.actions = {kind: place * self.stages for place, kind in enumerate(PASSES)}
        self.moves = {
            wait + kind + way: (bool(wait), (place * self.stages + by) * micro_batches)
            for wait in ("", "WAIT_")
            for place, way in enumerate(WAYS)
            for kind, by in (("SEND_", 1 - 2 * place), ("RECV_", 0))
        }

    def add(self, cost: int, a: int, b: int, c: int) -> int:
        """Append a node that waits for three, and return its id."""
        self.needs += a, b, c
        self.costs.append(cost)
        levels = self.levels
        latest, other = levels[a], levels[b]
        if other > latest:
            latest = other
        other = levels[c]
        levels.append((latest if latest > other else other) + 1)
        return len(levels) - 1

    def hand_over(self, number: int, end: int) -> None:
        """Note the last node of one end of a message; with both there is a node for it."""
        if (other := self.sent[number]) < 0:
            self.sent[number] = end
            return
        way, taker = divmod(number // self.micro_batches, self.stages)
        channel = self.home[taker - 1 if WAYS[way] == "F" else taker + 1], self.home[taker]
        node = self.add(self.message, other, end, self.channels.get(channel, 0))
        self.over[number] = self.channels[channel] = node


def go_through(steps: Steps, graph: Graph) -> Iterator[None]:
    """Add the nodes of one rank, and stop where it must wait for a message that has none yet."""
    actions, moves = graph.actions, graph.moves
    nothing, over, add = graph.message + 1, graph.over, graph.add
    micro_batches = graph.micro_batches
    last = first = second = 0  # the rank's last node; up to two messages that its next waits for
    for kind, stage, i in steps:
        if kind in actions:
            last, first, second = add(actions[kind] + stage, last, first, second), 0, 0
            continue
        waits, number = moves[kind]
        number += stage * micro_batches + i
        if waits:
            while not over[number]:
                yield
            if second:
                last, first, second = add(nothing, last, first, second), 0, 0
            second, first = first, over[number]
            continue
        if first:
            last, first, second = add(nothing, last, first, second), 0, 0
        graph.hand_over(number, last)
    add(nothing, last, first, second)


@lru_cache(maxsize=1024)
def levels_of(
    schedule: PipelineSchedule, ranks: int, local: int, micro_batches: int
) -> tuple[list[Level], int]:
    """Return the nodes of all ranks, level by level, and how many there are with node 0."""
    pipeline = PipelineConfig(schedule, local)
    graph, programs = Graph(pipeline, ranks, micro_batches), []
    for steps in steps_of_work(pipeline, ranks, micro_batches):
        programs.append(go_through(steps, graph))
    going, before = programs, 0
    while going:
        going = [program for program in going if next(program, OVER) is not OVER]
        moved, before = len(graph.costs) > before, len(graph.costs)
        assert moved or not going, f"{schedule.value}: no rank can go on after {before} nodes"
    costs, levels = np.array(graph.costs), graph.levels
    needs = np.array(graph.needs).reshape(len(costs), 3)
    order = np.argsort(levels, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    needs, costs = number[needs[order]], costs[order]
    ends = np.cumsum(np.bincount(levels)).tolist()
    found = [slice(*pair) for pair in pairwise(ends)]
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
            np.add(over.take(needs, axis=0).max(axis=1), each.take(cost, axis=0), out=over[ids])
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
        firsts, same = alike(np.concatenate([own.reshape(-1, len(places)), way[None]]))
        own, way = own[:, :, firsts], way[firsts]
        times = [walk(SCHEDULES[schedule], p, v, n, own, way)[same] for n in walked]
        found[places] = times[-1]
        if len(walked) > 1:
            a_micro_batch = (times[1] - times[0]) / (walked[1] - walked[0])
            found[places] += (m[places] - walked[1]) * a_micro_batch
    return found


def alike(columns: Array) -> tuple[list[int], list[int]]:
    """Return the place of the first of each distinct column, and of each column which of these it
    is. Plans that differ only in what no pipeline sees are walked through once."""
    firsts: dict[bytes, int] = {}
    same = [
        firsts.setdefault(row.tobytes(), len(firsts)) for row in np.ascontiguousarray(columns.T)
    ]
    return np.unique(same, return_index=True)[1].tolist(), same


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
