"""Pipelines walked through in torch's order, against the replay of the same programs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.layout import PipelineConfig, PipelineSchedule
from parallel.rules import takes
from simulator.order_times import PASSES, pipeline_seconds, walk
from simulator.plans import SCHEDULES
from tests.test_bubble import SECONDS, run

schedules = st.sampled_from(list(PipelineSchedule))


def durations(stages: int) -> np.ndarray:
    """Those of tests.test_bubble, of one plan."""
    each = np.array([SECONDS[kind] for kind in PASSES])
    return np.broadcast_to(each[:, None, None], (len(PASSES), stages, 1))


@settings(max_examples=60)
@given(schedules, st.integers(2, 5), st.integers(1, 12), st.sampled_from([0.0, 0.3, 2.5]))
def test_a_walk_ends_with_the_replay(
    schedule: PipelineSchedule, p: int, m: int, hop: float
) -> None:
    """Messages that are longer than what is computed too: both ends wait for their turn."""
    pipeline = PipelineConfig(schedule)
    if not takes(pipeline, p, m):
        return
    local = pipeline.local_stages
    walked = walk(schedule, p, local, m, durations(p * local), np.array([hop]))[0]
    timeline = run(schedule.value, p, m, message=hop)
    assert walked == pytest.approx(timeline.total - hop), "less the sum at the end"


@settings(max_examples=40)
@given(schedules, st.integers(2, 4), st.integers(4, 10), st.integers(0, 99))
def test_many_micro_batches_go_on_in_a_straight_line(
    schedule: PipelineSchedule, p: int, rounds: int, seed: int
) -> None:
    """Stages that differ by 15 %, and a last one that takes a third longer: within 2 %."""
    pipeline, m = PipelineConfig(schedule), p * rounds
    local = pipeline.local_stages
    uneven = 1 + 0.15 * np.random.default_rng(seed).random((1, p * local, 1))
    uneven[:, -1] *= 1.3
    each, hop = durations(p * local) * uneven, np.array([0.05])
    order = np.array([SCHEDULES.index(schedule)])
    size = [np.array([n]) for n in (p, local, m)]
    line = pipeline_seconds(order, *size, each, hop)[0]
    assert line == pytest.approx(walk(schedule, p, local, m, each, hop)[0], rel=0.02)


@given(st.integers(0, 99))
def test_plans_that_are_alike_are_walked_through_once(seed: int) -> None:
    """Each gets what it gets by itself, whatever stands beside it."""
    random = np.random.default_rng(seed)
    which = random.integers(0, 3, 12)  # of three pipelines, in any order and number
    each, hop = random.random((len(PASSES), 4, 3))[..., which], random.random(3)[which]
    order, local = np.full(12, SCHEDULES.index(PipelineSchedule("1f1b"))), np.ones(12)
    together = pipeline_seconds(order, 4 * local, local, 6 * local, each, hop)
    for i in range(12):
        one = [x[i : i + 1] for x in (order, 4 * local, local, 6 * local)]
        alone = pipeline_seconds(*one, each[..., [i]], hop[[i]])
        assert together[i] == alone[0]
