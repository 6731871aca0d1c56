"""Programs that fit together, drawn by hypothesis: one order of everything, cut up by rank."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from costs.program import Message, Program, Wait, Work

DURATIONS = st.integers(0, 20)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


@st.composite
def programs(draw: Any) -> dict[int, Program]:
    """2 to 5 ranks, up to 40 things. A message's bytes are whole numbers, a Work's seconds too."""
    ranks = list(range(draw(st.integers(2, 5))))
    made: dict[int, Program] = {rank: [] for rank in ranks}
    owed: dict[int, list[int]] = {rank: [] for rank in ranks}
    for number in range(draw(st.integers(0, 40))):
        kind = draw(st.sampled_from(("work", "collective", "pair", "wait")))
        rank = draw(st.sampled_from(ranks))
        if kind == "work":
            phase = draw(st.sampled_from(("forward", "backward", "optimizer", "data")))
            made[rank].append(Work(phase, seconds=float(draw(DURATIONS))))
        elif kind == "wait" and owed[rank]:
            which = draw(st.integers(0, len(owed[rank]) - 1))
            made[rank].append(Wait(owed[rank].pop(which), "forward"))
        elif kind == "collective":
            group = draw(st.lists(st.sampled_from(ranks), min_size=2, unique=True))
            name, size = draw(st.sampled_from(COLLECTIVES)), draw(DURATIONS)
            members = tuple(sorted(group))
            for member in members:
                made[member].append(
                    Message(number, name, "tp", members, "float32", size, "forward")
                )
                owed[member].append(number)
        elif kind == "pair":
            other = draw(st.sampled_from([r for r in ranks if r != rank]))
            size = draw(DURATIONS)
            for side, own in (("send", rank), ("recv", other)):
                made[own].append(
                    Message(number, side, "pp", (rank, other), "float32", size, "forward")
                )
                owed[own].append(number)
    return made


def seconds_of(event: Work | Message) -> float:
    """A Work's own seconds, a message's bytes: whole numbers, so that sums are exact."""
    return event.seconds or 0.0 if isinstance(event, Work) else float(event.payload_bytes)
