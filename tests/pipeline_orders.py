"""What torch's own schedule objects say of a number of micro-batches, without ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as of_torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.layout import PipelineConfig
from parallel.pipeline import SCHEDULES

COMPUTATION = {
    of_torch.FORWARD,
    of_torch.FULL_BACKWARD,
    of_torch.BACKWARD_INPUT,
    of_torch.BACKWARD_WEIGHT,
}
Order = dict[int, list[Any]]  # by rank, what it does in turn


@contextmanager
def nobody(ranks: int) -> Iterator[None]:
    """A process group whose other ranks are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def order_of(pipeline: PipelineConfig, ranks: int, micro_batches: int) -> Order | None:
    """What every rank would do, or None where torch refuses the number.

    Needs `nobody(ranks)`.
    """
    schedule = schedule_of(pipeline, ranks, micro_batches)
    if schedule is None:
        return None
    one = pipeline.one_stage_a_rank
    return schedule._get_pipeline_order() if one else schedule.pipeline_order


def schedule_of(pipeline: PipelineConfig, ranks: int, micro_batches: int) -> Any | None:
    """torch's schedule object, rank 0's; None where torch refuses the number."""
    count = ranks * pipeline.local_stages
    tokens = torch.empty(1, 4, device="meta", requires_grad=True)
    stages = [
        PipelineStage(
            torch.nn.Linear(4, 4, device="meta"),
            number,
            count,
            torch.device("cpu"),
            input_args=tokens,
            output_args=tokens,
            group=dist.group.WORLD,
        )
        for number in pipeline.stages_of(0, ranks)
    ]
    kind: Any = of_torch.get_schedule_class(SCHEDULES[pipeline.schedule.value])
    one = pipeline.one_stage_a_rank
    try:
        return kind(stages[0] if one else stages, micro_batches, loss_fn=lambda *_: None)
    except ValueError:
        return None


def flat(order: Order) -> Order:
    """Computation only, and a forward that overlaps a backward as one after the other."""
    return {
        rank: [
            part
            for action in actions
            if action
            for part in action.sub_actions or (action,)
            if part.computation_type in COMPUTATION
        ]
        for rank, actions in order.items()
    }


def is_complete(order: Order, stages: int, micro_batches: int) -> bool:
    """Each stage does each micro-batch once: forward, and backward whole or in both parts."""
    done = Counter(
        (action.stage_index, action.microbatch_index, action.computation_type)
        for actions in flat(order).values()
        for action in actions
    )
    wanted: Counter = Counter()
    for key in itertools.product(range(stages), range(micro_batches)):
        whole = (*key, of_torch.FULL_BACKWARD) in done
        parts = (of_torch.BACKWARD_INPUT, of_torch.BACKWARD_WEIGHT)
        kinds = (of_torch.FORWARD, *((of_torch.FULL_BACKWARD,) if whole else parts))
        wanted.update((*key, kind) for kind in kinds)
    return done == wanted


def ends(order: Order, stages: int) -> bool:
    """Whether no rank waits for ever, where each does what it does in that order."""
    left = {rank: list(actions) for rank, actions in flat(order).items()}
    done: set[tuple] = set()

    def ready(action: Any) -> bool:
        stage, micro_batch = action.stage_index, action.microbatch_index
        kind = action.computation_type
        if kind == of_torch.FORWARD:
            return stage == 0 or (stage - 1, micro_batch, "F") in done
        if kind == of_torch.BACKWARD_WEIGHT:
            return (stage, micro_batch, "B") in done
        own = (stage, micro_batch, "F") in done
        return own and (stage == stages - 1 or (stage + 1, micro_batch, "B") in done)

    moved = True
    while moved:
        moved = False
        for actions in left.values():
            while actions and ready(actions[0]):
                action, moved = actions.pop(0), True
                kind = "F" if action.computation_type == of_torch.FORWARD else "B"
                if action.computation_type != of_torch.BACKWARD_WEIGHT:
                    done.add((action.stage_index, action.microbatch_index, kind))
    return not any(left.values())


COST = {
    of_torch.FORWARD: 1,
    of_torch.FULL_BACKWARD: 2,
    of_torch.BACKWARD_INPUT: 1,
    of_torch.BACKWARD_WEIGHT: 1,
}


def idle_shares(order: Order, stages: int) -> list[float]:
    """The share of the whole in which each rank idles, at the costs above and with messages that
    take no time. The order must be one that ends."""
    left = {rank: list(actions) for rank, actions in flat(order).items()}
    now, busy = dict.fromkeys(left, 0), dict.fromkeys(left, 0)
    done: dict[tuple, int] = {}  # when, by (stage, micro-batch, kind)

    def needs(stage: int, micro_batch: int, kind: Any) -> list[tuple]:
        if kind == of_torch.FORWARD:
            return [(stage - 1, micro_batch, "F")] if stage else []
        if kind == of_torch.BACKWARD_WEIGHT:
            return [(stage, micro_batch, "B")]
        behind = [(stage + 1, micro_batch, "B")] if stage < stages - 1 else []
        return [(stage, micro_batch, "F"), *behind]

    while any(left.values()):
        for rank, actions in left.items():
            while actions:
                a = actions[0]
                place, kind = (a.stage_index, a.microbatch_index), a.computation_type
                wanted = needs(*place, kind)
                if not all(need in done for need in wanted):
                    break
                actions.pop(0)
                now[rank] = max([now[rank], *(done[need] for need in wanted)]) + COST[kind]
                busy[rank] += COST[kind]
                if kind != of_torch.BACKWARD_WEIGHT:
                    done[(*place, "F" if kind == of_torch.FORWARD else "B")] = now[rank]
    whole = max(now.values())
    return [1 - busy[rank] / whole for rank in left]
