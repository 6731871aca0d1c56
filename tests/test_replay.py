"""The replay against an independent model, against arithmetic, and what it says of bad programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costs.program import Message, Program, Wait, Work
from costs.trace import COMPUTE
from simulator.replay import Mismatch, replay
from simulator.timeline import Timeline
from tests.random_programs import programs, seconds_of
from tests.simpy_model import simulate
from tests.test_timeline import nesting_fault


def run(given_programs: dict[int, Program], **options: object) -> Timeline:
    return replay(given_programs, seconds_of, seconds_of, **options)  # type: ignore[arg-type]


@given(programs())
def test_simpy_gives_the_same_timeline(drawn: dict[int, Program]) -> None:
    assert run(drawn).times == simulate(drawn, seconds_of)


@given(programs())
def test_parts_add_up(drawn: dict[int, Program]) -> None:
    timeline = run(drawn)
    for rank, parts in timeline.time_s.items():
        assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
        busy = [s for s in timeline.slices(rank) if s.track == COMPUTE]
        assert nesting_fault(busy) is None
        inside = [s for s in busy if any(o.start <= s.start and s.end < o.end for o in busy)]
        outside = sum(s.end - s.start for s in busy if s not in inside)
        assert parts["total"] == outside


SLOWS = st.sampled_from([0.0, 0.25])  # exact in binary


@given(programs(), st.data(), SLOWS)
def test_a_faster_network_never_makes_a_slower_step(
    drawn: dict[int, Program], data: st.DataObject, slows: float
) -> None:
    """Each message as much faster as it likes, alike for all its members."""
    numbers = {e.number for p in drawn.values() for e in p if isinstance(e, Message)}
    gain = {number: data.draw(st.floats(0, 1)) for number in sorted(numbers)}

    def cheaper(message: Message) -> float:
        return gain[message.number] * seconds_of(message)

    faster = replay(drawn, seconds_of, cheaper, hidden_slows=slows).total
    rounding = 1e-12 if slows else 0.0
    assert faster <= run(drawn, hidden_slows=slows).total * (1 + rounding)


@given(programs(), st.data(), SLOWS)
def test_removing_a_message_never_slows(
    drawn: dict[int, Program], data: st.DataObject, slows: float
) -> None:
    numbers = sorted({e.number for p in drawn.values() for e in p if isinstance(e, Message)})
    if not numbers:
        return
    gone = data.draw(st.sampled_from(numbers))
    without: dict[int, Program] = {
        rank: [e for e in program if isinstance(e, Work) or e.number != gone]
        for rank, program in drawn.items()
    }
    assert run(without, hidden_slows=slows).total <= run(drawn, hidden_slows=slows).total


@given(programs(), st.data())
def test_permuting_ranks_gives_the_same_time(
    drawn: dict[int, Program], data: st.DataObject
) -> None:
    places = data.draw(st.permutations(sorted(drawn)))

    def renamed(event: object) -> object:
        if not isinstance(event, Message):
            return event
        ranks = tuple(places[rank] for rank in event.ranks)
        return replace(event, ranks=ranks)

    other = {places[rank]: [renamed(e) for e in program] for rank, program in drawn.items()}
    there, here = run(other), run(drawn)  # type: ignore[arg-type]
    assert there.time_s == {places[rank]: parts for rank, parts in here.time_s.items()}


def reduce(number: int, size: int, ranks: tuple[int, ...] = (0, 1), axis: str = "tp") -> Message:
    return Message(number, "all_reduce", axis, ranks, "float32", size, "forward")


def send(number: int, size: int, ranks: tuple[int, int], axis: str = "pp") -> Message:
    return Message(number, "send", axis, ranks, "float32", size, "forward")


def recv(number: int, size: int, ranks: tuple[int, int], axis: str = "pp") -> Message:
    return Message(number, "recv", axis, ranks, "float32", size, "forward")


def work(seconds: float, phase: str = "forward") -> Work:
    return Work(phase, seconds=seconds)


def test_work_hides_a_message() -> None:
    """10 s of message behind 4 s of work: 6 are exposed."""
    program: Program = [reduce(0, 10), work(4, "backward"), Wait(0, "backward")]
    timeline = run({0: program, 1: program})
    parts = timeline.time_s[0]
    assert (parts["total"], parts["compute"], parts["exposed_communication"]) == (10, 4, 6)


def test_a_hidden_message_slows_what_hides_it() -> None:
    """By a quarter of what it was under way beside compute: all of 8 s, 12 s of 16; a send
    takes no core."""
    for size, total in ((8, 12 + 2), (16, 16 + 3)):
        program: Program = [reduce(0, size), work(12), Wait(0, "forward")]
        timeline = run({0: program, 1: program}, hidden_slows=0.25)
        parts = timeline.time_s[0]
        assert (parts["total"], parts["compute"]) == (total, 12)
        assert parts["exposed_communication"] == total - 12
    to: Program = [send(0, 8, (0, 1)), work(12), Wait(0, "forward")]
    there: Program = [recv(0, 8, (0, 1)), work(12), Wait(0, "forward")]
    assert run({0: to, 1: there}, hidden_slows=0.25).total == 12


def test_a_collective_waits_for_its_last_member() -> None:
    """On tp all of the wait is exposed; between stages only what follows the last member."""
    late: Program = [work(5), reduce(0, 2), Wait(0, "forward")]
    early: Program = [work(1), reduce(0, 2), Wait(0, "forward")]
    assert run({0: early, 1: late}).time_s[0]["exposed_communication"] == 6
    timeline = run(
        {
            0: [work(5), send(0, 2, (0, 1)), Wait(0, "forward")],
            1: [recv(0, 2, (0, 1)), Wait(0, "forward")],
        }
    )
    parts = timeline.time_s[1]
    assert (parts["bubble"], parts["exposed_communication"], parts["total"]) == (5, 2, 7)


def test_a_group_carries_one_message_at_a_time_and_groups_do_not_meet() -> None:
    both: Program = [reduce(0, 3), reduce(1, 3), reduce(2, 3, axis="dp_shard"), Wait(1, "forward")]
    timeline = run({0: both, 1: both})
    assert timeline.times[0] == [(0, 3), (3, 6), (0, 3), (0, 6)]


def test_one_program_stands_for_its_like() -> None:
    """Four ranks of tp2 x cp2 with a ring over cp: what all give, rank 0 alone gives too."""

    def program(rank: int) -> Program:
        tp = (rank // 2 * 2, rank // 2 * 2 + 1)
        other = (rank + 2) % 4
        return [
            work(3),
            reduce(0, 2, tp),
            Wait(0, "forward"),
            send(1, 4, (rank, other), "cp"),
            recv(2, 4, (other, rank), "cp"),
            work(1),
            Wait(1, "forward"),
            Wait(2, "forward"),
        ]

    everybody = run({rank: program(rank) for rank in range(4)})
    alone = run({0: program(0)}, like=lambda rank: 0)
    assert alone.time_s[0] == everybody.time_s[0] == everybody.time_s[3]
    assert alone.total == 3 + 2 + 4


BROKEN: list[tuple[str, dict[int, Program], str]] = [
    (
        "sizes differ",
        {0: [reduce(0, 4)], 1: [work(1), reduce(0, 8)]},
        "rank 1, event 1: all_reduce over tp of ranks 0,1 (8 B of float32) meets all_reduce over "
        "tp of ranks 0,1 (4 B of float32) of rank 0, event 0",
    ),
    (
        "collectives differ",
        {0: [reduce(0, 4)], 1: [Message(0, "broadcast", "tp", (0, 1), "float32", 4, "other")]},
        "rank 1, event 0: broadcast over tp of ranks 0,1 (4 B of float32) meets all_reduce",
    ),
    (
        "deadlock",
        {
            0: [recv(0, 4, (1, 0)), Wait(0, "forward"), send(1, 4, (0, 1))],
            1: [recv(0, 4, (0, 1)), Wait(0, "forward"), send(1, 4, (1, 0))],
        },
        "rank 0, event 1: waits for ever for recv over pp of ranks 1,0 (4 B of float32), message "
        "0 of rank 0; rank 1 has not come to it: it waits at event 1 for recv over pp of ranks 0,1",
    ),
    (
        "one side only",
        {0: [work(1), send(0, 4, (0, 1))], 1: [work(1)]},
        "rank 0, event 1: is alone with send over pp of ranks 0,1 (4 B of float32), message 0 of "
        "rank 0; rank 1 has ended without it",
    ),
    (
        "no such rank",
        {0: [reduce(0, 4, (0, 1, 2))], 1: []},
        "rank 0, event 0: all_reduce over tp of ranks 0,1,2 (4 B of float32) needs rank 2, which",
    ),
    (
        "not a member",
        {0: [reduce(0, 4, (1, 2))], 1: [], 2: []},
        "rank 0, event 0: all_reduce over tp of ranks 1,2 (4 B of float32) is not a message of its",
    ),
    ("nothing to wait for", {0: [Wait(3, "forward")]}, "rank 0, event 0: waits for message 3"),
]


@pytest.mark.parametrize("broken,says", [r[1:] for r in BROKEN], ids=[r[0] for r in BROKEN])
def test_programs_that_do_not_fit_are_one_line(broken: dict[int, Program], says: str) -> None:
    with pytest.raises(Mismatch) as raised:
        run(broken)
    said = str(raised.value)
    assert says in said and "\n" not in said
