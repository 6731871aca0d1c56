"""Where the seconds of a step go: parts add up, and what waits is what is called exposed."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costs.communication import Call, CommunicationMeter
from costs.ledger import TIME_PARTS
from costs.timing import StepTimer, intersection, length, union

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


def run_step(timer: StepTimer, waits: float = 0.0) -> dict[str, float | None]:
    with timer.step():
        with timer.phase("data"):
            time.sleep(0.01)
        with timer.phase("forward_backward"):
            time.sleep(0.03)
            if timer.communication and waits:
                start = time.perf_counter()
                time.sleep(waits)
                timer.communication.waits.append((start, time.perf_counter()))
        with timer.phase("optimizer"):
            time.sleep(0.02)
    return timer.last


def test_parts_add_up_to_the_step() -> None:
    parts = run_step(StepTimer(torch.device("cpu"), None, alone=True))
    total = parts["total"]
    assert total is not None
    assert sum(parts[name] or 0 for name in TIME_PARTS) == pytest.approx(total, rel=1e-9)
    assert parts["exposed_communication"] == 0.0
    assert parts["compute"] == pytest.approx(0.03, abs=0.02)
    assert parts["optimizer"] == pytest.approx(0.02, abs=0.02)


def test_a_wait_is_exposed_and_is_no_compute() -> None:
    meter = CommunicationMeter()
    meter.start()
    parts = run_step(StepTimer(torch.device("cpu"), meter, alone=False), waits=0.05)
    assert parts["exposed_communication"] == pytest.approx(0.05, abs=0.02)
    assert parts["compute"] == pytest.approx(0.03, abs=0.02)
    total = parts["total"]
    assert total == pytest.approx(sum(parts[name] or 0 for name in TIME_PARTS), rel=1e-9)


def test_the_end_of_backward_is_exposed_while_a_message_is_in_flight() -> None:
    """DDP waits for its last bucket in C++, after the engine has run its last operator."""
    meter = CommunicationMeter()
    meter.start()
    timer = StepTimer(torch.device("cpu"), meter, alone=False)
    loss = torch.ones(1, requires_grad=True).sum()
    with timer.step(), timer.phase("forward_backward"):
        start = time.perf_counter()
        with timer.backward(loss):
            loss.backward()
            time.sleep(0.04)  # what DDP's finalisation does
        call = Call("all_reduce", frozenset({0, 1}), "float32", 8, start, start + 0.03)
        meter.calls.append(call)
    assert timer.last["exposed_communication"] == pytest.approx(0.03, abs=0.015)


def test_without_a_meter_exposed_time_is_not_known() -> None:
    parts = run_step(StepTimer(torch.device("cpu"), None, alone=False))
    assert parts["exposed_communication"] is None
