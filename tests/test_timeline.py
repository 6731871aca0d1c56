"""Two ranks' steps on one clock: who waited for whom, as slices that nest and as programs."""

from __future__ import annotations

from itertools import pairwise

import pytest

from costs.messages import Call
from costs.program import Message, Wait, Work
from costs.timeline import bubbles, name_axes, program_of, slices_of, transfers, warped
from costs.timing import Action, StepRecord
from costs.trace import COMMUNICATION, COMPUTE, Slice

PAIR = frozenset({0, 1})


def nesting_fault(slices: list[Slice]) -> tuple[Slice, Slice] | None:
    """Two slices of one track that overlap, and neither holds the other; None where all nest."""
    open_ones: list[Slice] = []
    for piece in sorted(slices, key=lambda s: (s.start, -s.end)):
        while open_ones and open_ones[-1].end <= piece.start:
            open_ones.pop()
        if open_ones and open_ones[-1].end < piece.end:
            return open_ones[-1], piece
        open_ones.append(piece)
    return None


def message(side: str, peer: int, start: float, end: float, phase: str = "forward") -> Call:
    return Call(side, PAIR, "pp", "float32", 400, start, end, peer, phase)


def a_pipeline() -> list[StepRecord]:
    """Rank 0 forwards for 2 s and sends; rank 1, ready since 0.5 s, waits until 2.5 s and then
    computes for 1 s; rank 0 waits for its gradient from 2.25 s on."""
    ahead, back = message("send", 1, 2.0, 2.5), message("recv", 1, 2.25, 4.0, "backward")
    first = StepRecord(0.0, 4.0, calls=[ahead, back], waits=[(2.25, 4.0, back)])
    first.phases["forward_backward"] = [(0.0, 4.0)]
    first.actions = [
        Action("forward", 0, 0, 0.0, 2.0),
        Action("send_forward", 0, 0, 2.0, 2.0),
        Action("recv_backward", 0, 0, 2.25, 2.25),
    ]
    taken, given = message("recv", 0, 0.5, 2.5), message("send", 0, 3.5, 4.0, "backward")
    second = StepRecord(0.0, 4.0, calls=[taken, given], waits=[(0.5, 2.5, taken)])
    second.phases["forward_backward"] = [(0.5, 4.0)]
    second.actions = [
        Action("recv_forward", 1, 0, 0.5, 0.5),
        Action("forward", 1, 0, 2.5, 3.0),
        Action("backward", 1, 0, 3.0, 3.5),
        Action("send_backward", 1, 0, 3.5, 3.5),
    ]
    return [first, second]


def test_waiting_for_a_neighbour_is_a_bubble_until_it_has_sent() -> None:
    records = a_pipeline()
    known = transfers(records)
    assert bubbles(records[1], known[1]) == [(0.5, 2.0)]
    assert bubbles(records[0], known[0]) == [(2.25, 3.5)]
    assert [t.seconds for t in known[1]] == [0.5, 0.5]
    parts = records[1].parts(bubbles(records[1], known[1]), metered=True)
    assert parts["bubble"] == 1.5 and parts["exposed_communication"] == 0.5
    assert parts["compute"] == 1.5 and parts["other"] == 0.5


def test_a_sender_that_waits_for_its_receiver_idles_too() -> None:
    """gloo sends nothing before there is a recv for it."""
    given, taken = message("send", 1, 1.0, 3.0), message("recv", 0, 2.5, 3.0)
    records = [
        StepRecord(0.0, 3.0, calls=[given], waits=[(1.0, 3.0, given)]),
        StepRecord(0.0, 3.0, calls=[taken], waits=[(2.5, 3.0, taken)]),
    ]
    known = transfers(records)
    assert bubbles(records[0], known[0]) == [(1.0, 2.5)]
    assert bubbles(records[1], known[1]) == []


@pytest.mark.parametrize("axis, idle", [("pp", 2.0), ("pp*dp_shard", 2.0), ("dp_shard", 0.0)])
def test_waiting_for_the_last_rank_of_a_collective_idles_along_pp_alone(
    axis: str, idle: float
) -> None:
    early = Call("all_reduce", PAIR, None, "float32", 8, 1.0, 3.5)
    late = Call("all_reduce", PAIR, None, "float32", 8, 3.0, 3.5)
    records = [
        StepRecord(0.0, 4.0, calls=[early], waits=[(1.0, 3.5, early)]),
        StepRecord(0.0, 4.0, calls=[late], waits=[(3.0, 3.5, late)]),
    ]
    for record in records:
        name_axes(record, {PAIR: axis})
    known = transfers(records)
    assert sum(end - start for start, end in bubbles(records[0], known[0])) == idle
    assert bubbles(records[1], known[1]) == []


def test_a_call_whose_other_side_was_not_seen_hides_no_bubble() -> None:
    alone = message("recv", 0, 0.0, 1.0)
    record = StepRecord(0.0, 1.0, calls=[alone], waits=[(0.0, 1.0, alone)])
    known = transfers([StepRecord(0.0, 1.0), record])
    assert bubbles(record, known[1]) == []


def test_clocks_are_set_before_sides_are_compared() -> None:
    records = a_pipeline()
    known = transfers(records)
    wanted = [bubbles(*pair) for pair in zip(records, known, strict=True)]
    ahead = a_pipeline()
    ahead[1].shift(64.0)
    ahead[1].shift(-64.0)
    assert [bubbles(r, k) for r, k in zip(ahead, transfers(ahead), strict=True)] == wanted
    ahead[1].shift(0.25)
    assert bubbles(ahead[0], transfers(ahead)[0]) == [(2.25, 3.75)]


def test_slices_nest_and_know_their_micro_batch() -> None:
    records = a_pipeline()
    known = transfers(records)
    for rank, record in enumerate(records):
        slices = slices_of(rank, record, known[rank], zero=0.0)
        assert nesting_fault([s for s in slices if s.track == COMPUTE]) is None
        sent = [s for s in slices if s.track == COMMUNICATION]
        assert [(s.micro_batch, s.args["phase"]) for s in sent] == [(0, "forward"), (0, "backward")]
        assert sent[0].args["ranks"] == [0, 1] and sent[0].args["payload_bytes"] == 400


def test_the_check_of_nesting_can_fail() -> None:
    crossed = [Slice(0, COMPUTE, "forward", 0, 2), Slice(0, COMPUTE, "wait", 1, 3)]
    assert nesting_fault(crossed) == tuple(crossed)


def test_a_program_is_what_happened_in_order() -> None:
    records = a_pipeline()
    known = transfers(records)
    assert program_of(0, records[0], known[0]) == [
        Work("forward", "", 2.0, stage=0, micro_batch=0, action="forward"),
        Message(0, "send", "pp", (0, 1), "float32", 400, "forward", 0.5, 0, 0),
        Work("forward", "", 0.25),
        Message(1, "recv", "pp", (1, 0), "float32", 400, "backward", 0.5, 0, 0),
        Wait(1, "backward"),
    ]
    for rank, record in enumerate(records):
        worked = sum(
            e.seconds or 0.0 for e in program_of(rank, record, known[rank]) if isinstance(e, Work)
        )
        waited = sum(end - start for start, end, _ in record.all_waits())
        assert worked + waited == pytest.approx(record.total)


def test_ddp_waits_for_every_bucket_also_for_those_that_are_there() -> None:
    """In C++, which tells nobody: one after the other, at the end of backward."""
    sent = [Call("all_reduce", PAIR, "dp_replicate", "float32", 8, 1.0, end) for end in (2, 3.5, 4)]
    record = StepRecord(0.0, 5.0, tails=[(3.0, 4.5)], calls=sent)
    record.phases["forward_backward"] = [(0.0, 5.0)]
    record.actions = [Action("backward", 0, 0, 0.0, 4.5)]
    waits = [(start, end) for start, end, _ in record.all_waits()]
    assert waits == [(3.0, 3.0), (3.0, 3.5), (3.5, 4.0)]
    program = program_of(0, record, transfers([record])[0])
    assert [e.number for e in program if isinstance(e, Wait)] == [0, 1, 2]
    assert [e.seconds for e in program if isinstance(e, Work)] == [1.0, 2.0, 0.5, 0.5]


def test_a_moment_of_a_slow_step_is_laid_over_a_fast_one() -> None:
    """Action by action, so that what happened within one stays within it."""
    slow, fast = StepRecord(10.0, 40.0), StepRecord(0.0, 5.0)
    slow.actions = [Action("forward", 0, 0, 10.0, 30.0), Action("backward", 0, 0, 30.0, 40.0)]
    fast.actions = [Action("forward", 0, 0, 0.0, 1.0), Action("backward", 0, 0, 1.0, 5.0)]
    warp = warped(slow, fast)
    assert [warp(t) for t in (10.0, 20.0, 30.0, 35.0, 40.0)] == [0.0, 0.5, 1.0, 3.0, 5.0]
    moved = [warp(t / 2) for t in range(20, 90)]
    assert all(a <= b for a, b in pairwise(moved))
    fast.actions.pop()  # another number of actions: the whole is laid over the whole
    assert warped(slow, fast)(25.0) == 2.5
