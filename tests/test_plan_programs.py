"""Programs of plans: their messages are the closed forms', and they run to their end."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from costs.program import Message, Program
from parallel.layout import Layout
from simulator.communication import messages
from simulator.plan_programs import programs_of
from simulator.plans import Plans
from simulator.replay import replay
from tests.random_plans import random_plan


def sent(program: Program) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Calls and bytes by collective, axis and dtype."""
    calls: Counter = Counter()
    size: Counter = Counter()
    for event in program:
        if isinstance(event, Message):
            key = (event.collective, event.axis, event.dtype)
            calls[key] += 1
            size[key] += event.payload_bytes
    return {key: (calls[key], size[key]) for key in calls}


@pytest.mark.parametrize("seed", range(40))
def test_messages_are_the_closed_forms(seed: int) -> None:
    """Any layout of four ranks with any options: calls and bytes of every pp place, and no rank
    waits for ever."""
    plan = random_plan(Random(seed))
    config = plan.config({})
    programs, like = programs_of(config.model, config.layout, config.options)
    for place, rank in enumerate(sorted(programs)):
        form = messages(Plans.of(config.model, config.layout, config.options), place)
        wanted = {k: (int(v.calls[0]), int(v.payload_bytes[0])) for k, v in form.items()}
        assert sent(programs[rank]) == {k: v for k, v in wanted.items() if v[0]}, plan
    timeline = replay(programs, lambda work: 1.0, lambda message: 1.0, like)
    assert timeline.total > 0
    assert set(map(like, range(config.layout.world_size))) == set(programs)


def test_a_single_rank_sends_nothing() -> None:
    config = random_plan(Random(0)).config({})
    programs, _ = programs_of(config.model, Layout(), config.options)
    assert list(programs) == [0] and not sent(programs[0])
