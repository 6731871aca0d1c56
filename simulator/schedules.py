"""In which order a pipeline rank works: the orders of torch.distributed.pipelining, without torch.

An order is a list of (kind, lap, micro-batch): F a forward, B a whole backward, I and W its two
halves, the gradients of inputs and of weights. `lap` counts the rank's own stages. Tests hold them
against torch's schedule objects. GPipe: Huang et al. 2019; 1F1B and interleaved: Narayanan et al.
2021; breadth-first: Lamy-Poirier 2023; zero bubble and ZBV: Qi et al. 2023, 2024; DualPipeV:
DeepSeek-AI 2025.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from functools import lru_cache

from parallel.layout import PipelineSchedule

Action = tuple[str, int, int]
Order = list[Action]
PREFETCHED = 3  # stages that torch keeps gathered ahead: max_active_stages of its lowering


class Turns:
    """An order in the making: each kind of work takes a stage's micro-batches one after another."""

    def __init__(self) -> None:
        self.order: Order = []
        self.next: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.waiting = deque[tuple[int, int]]()  # whose gradients of weights are still to come

    def do(self, kinds: str, lap: int) -> None:
        """Append one action of each kind. I leaves a W behind."""
        for kind in kinds:
            counter = ("F" if kind == "F" else "B"), lap
            number = self.next[counter]
            self.order.append((kind, lap, number))
            self.next[counter] += 1
            if kind == "I":
                self.waiting.append((lap, number))

    def weights(self) -> None:
        """The longest waiting W, if there is one."""
        if self.waiting:
            self.order.append(("W", *self.waiting.popleft()))


def gpipe(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    """All forwards, then all backwards."""
    every = range(micro_batches)
    return [("F", 0, i) for i in every] + [("B", 0, i) for i in every]


def one_f_one_b(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    turns, warm = Turns(), min(micro_batches, ranks - rank)
    for _ in range(warm):
        turns.do("F", 0)
    for _ in range(micro_batches - warm):
        turns.do("BF", 0)
    for _ in range(warm):
        turns.do("B", 0)
    return turns.order


def looped_bfs(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    """One stage after another, each with all micro-batches; back in the opposite order."""
    forward = [("F", lap, i) for lap in range(local) for i in range(micro_batches)]
    return forward + [("B", lap, i) for _, lap, i in reversed(forward)]


def interleaved_1f1b(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    return _interleaved(ranks, local, micro_batches, rank, splits=False)


def interleaved_zero_bubble(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    return _interleaved(ranks, local, micro_batches, rank, splits=True)


def _interleaved(ranks: int, local: int, micro_batches: int, rank: int, splits: bool) -> Order:
    """Rounds of micro-batches through one stage after another (Narayanan et al. 2021, section
    2.2.2). Gradients of weights, where they are split off, come `rank` backwards later."""
    a_round = micro_batches // max(1, micro_batches // ranks)
    total = local * micro_batches
    hops = (1 if splits else 2) * (ranks - 1 - rank)
    warm = min((local - 1) * a_round + hops, total)
    turns = Turns()
    for step in range(total + warm):
        if step < total:
            turns.do("F", step // a_round % local)
        if step >= warm:
            lap = local - 1 - (step - warm) // a_round % local
            turns.do("I" if splits else "B", lap)
            if step - warm >= rank:
                turns.weights()
    while turns.waiting:
        turns.weights()
    return turns.order


def zbv_zero_bubble(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    """Qi et al. 2024, section 4: the second stage of each rank lies on the way back of a V."""
    turns, later = Turns(), ranks - rank
    most = max(
        2 * ranks - 1, micro_batches
    )  # it is written for so many; what is beyond is left out
    for _ in range(2 * later - 1):
        turns.do("F", 0)
    for _ in range(rank):
        turns.do("F", 1)
        turns.do("F", 0)
    for _ in range(later):
        turns.do("FI", 1)
        turns.weights()
    while turns.next["F", 1] < turns.next["F", 0] or turns.next["F", 0] < most:
        if turns.next["F", 0] < most:
            turns.do("F", 0)
        turns.do("I", 0)
        turns.weights()
        turns.do("FI", 1)
        turns.weights()
    for _ in range(rank):
        turns.do("I", 0)
        turns.do("I", 1)
    # the second stage's W wait for the end, and the first stage's go in their order
    waiting = {lap: deque(w for w in turns.waiting if w[0] == lap) for lap in (0, 1)}
    for _ in range(later):
        turns.do("I", 0)
        waiting[0].append(turns.waiting[-1])
        turns.order.append(("W", *waiting[0].popleft()))
    turns.order += [("W", *w) for lap in (1, 0) for w in waiting[lap]]
    return [action for action in turns.order if action[2] < micro_batches]


def dualpipev(ranks: int, local: int, micro_batches: int, rank: int) -> Order:
    """DeepSeek-AI 2025 (DualPipe, cut in half). A forward and a backward that overlap come one
    after the other here."""
    turns, later = Turns(), ranks - rank - 1
    for _ in range(2 * later):
        turns.do("F", 0)
    for _ in range(rank + 1):
        turns.do("F", 0)
        turns.do("F", 1)
    for _ in range(later):
        turns.do("I", 1)
        turns.weights()
        turns.do("F", 1)
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        turns.do("F", 0)
        turns.do("B", 1)
        turns.do("F", 1)
        turns.do("B", 0)
    for _ in range(later):
        turns.do("B", 1)
        turns.do("F", 1)
        turns.do("B", 0)
    half, odd = (rank + 1) // 2, rank % 2 == 1  # from here on backwards are split
    for i in range(rank + 1):
        turns.do("I" if i > half or (i == half and odd) else "B", 1)
        turns.do("I" if i >= half else "B", 0)
    for _ in range(later):
        turns.weights()
        turns.do("I", 0)
    for _ in range(rank + 1):
        turns.weights()
    return turns.order


ORDERS: dict[str, Callable[[int, int, int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "looped_bfs": looped_bfs,
    "interleaved_zero_bubble": interleaved_zero_bubble,
    "zbv_zero_bubble": zbv_zero_bubble,
    "dualpipev": dualpipev,
}


def order_of(
    schedule: PipelineSchedule, ranks: int, local: int, micro_batches: int, rank: int
) -> Order:
    """What pp rank `rank` of `ranks` does in turn, with `local` stages. The number of micro-batches
    must be one that the schedule takes (parallel.rules.takes)."""
    return ORDERS[schedule.value](ranks, local, micro_batches, rank)


@lru_cache(maxsize=100_000)
def gathers(
    schedule: PipelineSchedule, ranks: int, local: int, micro_batches: int, rank: int
) -> tuple[tuple[int, int], ...]:
    """How often each stage of a rank gathers a block's weights for forwards, and for backwards.

    With zero_stage=3. A forward gives the weights up and a backward keeps them, so that a forward
    must gather them unless it follows a backward, and a backward if it follows a forward. Before a
    stage's first turn torch gathers all of it, and again if it was pushed out: it holds the three
    stages that come next.
    """
    order = order_of(schedule, ranks, local, micro_batches, rank)
    held, active = [False] * local, set[int]()
    counts = [[0, 0] for _ in range(local)]
    for i, (kind, lap, _) in enumerate(order):
        coming = _next_stages(order, i) if local > PREFETCHED else set(range(local))
        for gone in active - coming:
            held[gone] = False
        for new in sorted(coming - active):
            # of torch's lowering; without it the first turn would gather: the same count
            counts[new][kind != "F"] += not held[new]
            held[new] = True
        active = coming
        counts[lap][kind != "F"] += not held[lap]
        held[lap] = kind != "F"
    return tuple((forward, backward) for forward, backward in counts)


def _next_stages(order: Order, start: int) -> set[int]:
    coming = set[int]()
    for _, lap, _ in order[start:]:
        coming.add(lap)
        if len(coming) == PREFETCHED:
            break
    return coming
