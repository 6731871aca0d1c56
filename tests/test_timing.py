"""Where the seconds of a step go: parts add up, and what waits is what is called exposed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costs import moments, timing
from costs.ledger import TIME_PARTS
from costs.messages import Call, CommunicationMeter
from costs.timing import Interval, StepTimer, intersection, length, union

points = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


def as_set(intervals: list[tuple[float, float]]) -> set[int]:
    return {t for start, end in intervals for t in range(int(start), int(end))}


@given(points, points)
def test_intervals_are_sets_of_points(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    first = [(float(min(p)), float(max(p))) for p in a]
    second = [(float(min(p)), float(max(p))) for p in b]
    assert as_set(union(first)) == as_set(first)
    assert as_set(intersection(first, second)) == as_set(first) & as_set(second)
    assert length(first) == len(as_set(first))
    merged = union(first)
    assert all(x[1] < y[0] for x, y in pairwise(merged))


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    monkeypatch.setattr(moments, "time", made)
    return made


A_CALL = Call("all_reduce", frozenset({0, 1}), "dp_replicate", "float32", 8, 100.0)


def run_step(timer: StepTimer, clock: Clock, waits: float = 0.0) -> None:
    """3 s of forward and backward, `waits` of them held up; 2 s of optimizer, 1 s of data, 0.5 of
    nothing in particular."""
    with timer.step():
        with timer.phase("data"):
            clock.now += 1
        with timer.phase("forward_backward"):
            clock.now += 3 - waits
            if timer.communication and waits:
                timer.communication.waits.append((clock.now, clock.now + waits, A_CALL))
            clock.now += waits
        with timer.phase("optimizer"):
            clock.now += 2
        clock.now += 0.5


NO_BUBBLE: list[Interval] = []


def test_parts_add_up_to_the_step(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"), None)
    run_step(timer, clock)
    assert timer.record.parts(NO_BUBBLE, metered=True) == {
        "total": 6.5,
        "compute": 3.0,
        "exposed_communication": 0.0,
        "bubble": 0.0,
        "optimizer": 2.0,
        "other": 1.5,
    }


def test_a_wait_is_exposed_and_is_no_compute(clock: Clock) -> None:
    meter = CommunicationMeter()
    meter.start()
    timer = StepTimer(torch.device("cpu"), meter)
    run_step(timer, clock, waits=1.25)
    parts = timer.record.parts(NO_BUBBLE, metered=True)
    assert parts["exposed_communication"] == 1.25 and parts["compute"] == 1.75
    assert sum(parts[name] for name in TIME_PARTS) == parts["total"]


def test_the_end_of_backward_is_exposed_while_a_message_is_in_flight(clock: Clock) -> None:
    """DDP waits for its last bucket in C++, after the engine has run its last operator."""
    meter = CommunicationMeter()
    meter.start()
    timer = StepTimer(torch.device("cpu"), meter)
    loss = torch.ones(1, requires_grad=True).sum()
    with timer.step(), timer.phase("forward_backward"):
        clock.now += 2
        with timer.backward(loss):
            loss.backward()
            sent = Call(
                "all_reduce", frozenset({0, 1}), None, "float32", 8, clock.now - 1, clock.now + 3
            )
            meter.calls.append(sent)
            clock.now += 4  # what DDP's finalisation takes: the message ends before it
    parts = timer.record.parts(NO_BUBBLE, metered=True)
    assert parts["exposed_communication"] == 3
    assert parts["compute"] == 2 + 1
    assert timer.record.all_waits() == [(102.0, 105.0, sent)]


def test_without_a_meter_exposed_time_is_not_known(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"), None)
    run_step(timer, clock)
    assert timer.record.parts(NO_BUBBLE, metered=False)["exposed_communication"] is None


def test_a_bubble_is_the_part_of_a_wait_that_is_not_exposed(clock: Clock) -> None:
    meter = CommunicationMeter()
    meter.start()
    timer = StepTimer(torch.device("cpu"), meter)
    run_step(timer, clock, waits=1.25)
    begin = timer.record.waits[0][0]
    parts = timer.record.parts([(begin, begin + 1.0)], metered=True)
    assert parts["bubble"] == 1.0 and parts["exposed_communication"] == 0.25
    assert sum(parts[name] for name in TIME_PARTS) == parts["total"]
    unknown = timer.record.parts(None, metered=True)
    assert unknown["bubble"] is None and unknown["exposed_communication"] == 1.25
