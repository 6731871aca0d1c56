"""From the programs of ranks to a timeline: when each thing that a rank does starts and ends.

A rank does its program one thing after another (costs/program.py). A message starts when its last
member has handed it over and its group is done with the one before; the messages of one group are
matched by their order, a send and its recv by their order between two ranks. Groups do not slow
each other down. So every time is a maximum or a sum of earlier ones (a max-plus system; Baccelli
et al. 1992, Synchronization and Linearity): the order in which events are looked at changes
nothing, no queue of events is needed, and a cheaper event never makes a later one later.

Ranks that behave alike need one program: `like` names the rank whose program stands for another's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from costs.ledger import TIME_PARTS
from costs.program import Message, Program, Work
from costs.rank_grid import RankGrid
from simulator.timeline import Timeline

PARTS = {  # where the seconds of a Work are counted
    "forward": "compute",
    "backward": "compute",
    "optimizer": "optimizer",
    "data": "other",
    "other": "other",
}
# All members of one of these hand over as many bytes. An all_to_all's may differ.
EVEN = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", "recv")


class Mismatch(ValueError):
    """Programs that do not fit together: one line, with rank, message and place in the step."""


@dataclass(slots=True)
class Flight:
    """One message, from the first member that hands it over to its end."""

    message: Message
    place: int  # in the program of the rank that handed it over first
    rank: int
    missing: int  # members that have not handed it over
    handed: float = 0.0  # when the last member did
    seconds: float = 0.0  # the longest that it is under way for a member
    start: float | None = None  # None: a member is missing
    waiting: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Channel:
    """A group's messages in order, or those from one rank to another."""

    members: frozenset  # ranks that have a program; of a channel between two its ends
    flights: list[Flight] = field(default_factory=list)
    handed: dict = field(default_factory=dict)  # member -> how many it has handed over
    free: float = 0.0  # when the last message was over


def replay(
    programs: dict[int, Program],
    work_seconds: Callable[[Work], float],
    message_seconds: Callable[[Message], float],
    like: Callable[[int], int] | None = None,
    queued: bool = True,
    hidden_slows: float = 0.0,
) -> Timeline:
    """Run the programs of all ranks, or of one rank of each kind, where `like` maps a rank of the
    world to the one whose program stands for its own, and never decreases with the rank.

    `message_seconds` is asked by each member for its own end: a measured message is not over on all
    ranks at once. `queued` False: its seconds count from when the last member handed it over, as
    measured ones do, so that they hold any wait for the message before it. `hidden_slows`: of a
    collective's time behind compute, the share by which that compute takes longer, where it was
    not measured so; it is paid where the message is waited for, as exposed communication.

    Raises Mismatch where members of a group hand over different messages, or wait for ever.
    """
    return _Replay(programs, work_seconds, message_seconds, like, queued, hidden_slows).run()


class _Replay:
    def __init__(
        self,
        programs: dict[int, Program],
        work_seconds: Callable[[Work], float],
        message_seconds: Callable[[Message], float],
        like: Callable[[int], int] | None,
        queued: bool,
        hidden_slows: float,
    ) -> None:
        self.queued, self.hidden_slows = queued, hidden_slows
        self.programs, self.like = programs, like or _itself
        self.work_seconds, self.message_seconds = work_seconds, message_seconds
        self.channels: dict[tuple, Channel] = {}
        self.known: dict[tuple, tuple[Channel, object]] = {}  # hashing a thousand ranks takes long
        self.clock = dict.fromkeys(programs, 0.0)
        self.place = dict.fromkeys(programs, 0)
        # by the message's number; with how long it is under way for this rank
        self.flights: dict[int, dict[int, tuple[Flight, float]]] = {rank: {} for rank in programs}
        self.times: dict[int, list] = {rank: [] for rank in programs}
        self.time_s = {rank: dict.fromkeys(("total", *TIME_PARTS), 0.0) for rank in programs}
        self.idle: dict[int, dict[int, float]] = {rank: {} for rank in programs}
        self.ready = deque(sorted(programs))

    def run(self) -> Timeline:
        while self.ready:
            self._advance(self.ready.popleft())
        self._check_end()
        times = {
            rank: [t if t[0].__class__ is float else _span(*t) for t in own]
            for rank, own in self.times.items()
        }
        for rank, end in self.clock.items():
            self.time_s[rank]["total"] = end
        return Timeline(self.programs, times, self.time_s, self.idle)

    def _advance(self, rank: int) -> None:
        """Go on with one rank until it waits for a message that some member has not handed over."""
        program, flights, times = self.programs[rank], self.flights[rank], self.times[rank]
        parts, now, place = self.time_s[rank], self.clock[rank], self.place[rank]
        work_seconds, count = self.work_seconds, len(program)
        while place < count:
            event = program[place]
            if isinstance(event, Work):
                seconds = work_seconds(event)
                times.append((now, now + seconds))
                now += seconds
                parts[PARTS[event.phase]] += seconds
            elif isinstance(event, Message):
                found = self._hand_over(rank, place, event, now)
                flights[event.number] = found
                times.append(found)
            else:
                if event.number not in flights:
                    raise Mismatch(
                        f"rank {rank}, event {place}: waits for message {event.number}, which it "
                        "has not handed over"
                    )
                flight, seconds = flights[event.number]
                if flight.start is None:
                    flight.waiting.append(rank)
                    break
                over = flight.start + seconds
                end = max(now, over) + event.seconds + self._slowed(flight, min(now, over))
                if end > now:
                    self.idle[rank][place] = self._count_wait(parts, flight, now, end)
                times.append((now, end))
                now = end
            place += 1
        self.clock[rank], self.place[rank] = now, place

    def _slowed(self, flight: Flight, until: float) -> float:
        """What compute took longer for a message that was under way beside it."""
        if not self.hidden_slows or flight.message.collective in ("send", "recv"):
            return 0.0
        assert flight.start is not None
        return self.hidden_slows * max(0.0, until - flight.start)

    def _count_wait(self, parts: dict[str, float], flight: Flight, now: float, end: float) -> float:
        """A wait is bubble as long as another stage has not come, and else exposed. Returns the
        bubble."""
        late = 0.0
        if "pp" in flight.message.axis.split("*"):
            late = min(max(flight.handed - now, 0.0), end - now)
        parts["bubble"] += late
        parts["exposed_communication"] += end - now - late
        return late

    def _hand_over(
        self, rank: int, place: int, message: Message, now: float
    ) -> tuple[Flight, float]:
        key = (rank, id(message.ranks), message.axis, message.collective)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._channel_of(rank, place, message)
        channel, member = found
        number = channel.handed.get(member, 0)
        channel.handed[member] = number + 1
        if number == len(channel.flights):
            channel.flights.append(Flight(message, place, rank, len(channel.members)))
        flight = channel.flights[number]
        if flight.message is not message:
            _check_alike(flight, rank, place, message)
        seconds = self.message_seconds(message)
        flight.missing -= 1
        flight.handed = max(flight.handed, now)
        flight.seconds = max(flight.seconds, seconds)
        if not flight.missing:
            # all of a group's earlier messages are complete too: each member keeps the order
            flight.start = max(flight.handed, channel.free) if self.queued else flight.handed
            channel.free = flight.start + flight.seconds
            self.ready.extend(flight.waiting)
        return flight, seconds

    def _channel_of(self, rank: int, place: int, message: Message) -> tuple[Channel, object]:
        """The channel of a message, and which of its members this rank is."""
        collective, ranks = message.collective, message.ranks
        pair = collective in ("send", "recv")
        if pair:
            own: int | None = ranks[collective == "recv"]
            source, destination = map(self.like, ranks)
            key: tuple = (message.axis, "pair", source, destination)
            member: object = collective
        else:
            own = rank if rank in ranks else None
            grid = isinstance(ranks, RankGrid)
            key, member = (message.axis, ranks if grid else tuple(sorted(ranks))), rank
        if own != rank:
            raise Mismatch(
                f"rank {rank}, event {place}: {_said(message)} is not a message of its own"
            )
        channel = self.channels.get(key)
        if channel is None:
            standing = self._standing_for(ranks)
            self._check_members(rank, place, message, standing)
            members = frozenset(("send", "recv")) if pair else frozenset(standing)
            channel = self.channels[key] = Channel(members)
        return channel, member

    def _standing_for(self, ranks: Sequence[int]) -> set[int]:
        """Return the ranks whose programs stand for those of a group."""
        if self.like is _itself:  # a file may name any ranks: one too many is one without program
            return set(islice(ranks, len(self.programs) + 1))
        return ranks.images(self.like) if isinstance(ranks, RankGrid) else {*map(self.like, ranks)}

    def _check_members(self, rank: int, place: int, message: Message, standing: set[int]) -> None:
        for other in sorted(standing):
            if other not in self.programs:
                raise Mismatch(
                    f"rank {rank}, event {place}: {_said(message)} needs rank {other}, which has "
                    "no program"
                )

    def _check_end(self) -> None:
        """Raise Mismatch where a rank did not come to its end, or a message has no counterpart."""
        incomplete = [
            flight
            for channel in self.channels.values()
            for flight in channel.flights
            if flight.start is None
        ]
        if not incomplete:
            return
        waited = [flight for flight in incomplete if flight.waiting]
        flight = min(waited or incomplete, key=lambda f: (f.handed, f.rank, f.place))
        rank = flight.waiting[0] if flight.waiting else flight.rank
        place = self.place[rank] if flight.waiting else flight.place
        verb = "waits for ever for" if flight.waiting else "is alone with"
        raise Mismatch(
            f"rank {rank}, event {place}: {verb} {_said(flight.message)}, message "
            f"{flight.message.number} of rank {flight.rank}; {self._missing_from(flight)}"
        )

    def _missing_from(self, flight: Flight) -> str:
        """Who has not handed a message over, and where that rank is instead."""
        channel, _ = self._channel_of(flight.rank, flight.place, flight.message)
        number = next(i for i, f in enumerate(channel.flights) if f is flight)
        late = min((m for m in channel.members if channel.handed.get(m, 0) <= number), key=str)
        other = late
        if late in ("send", "recv"):
            other = self.like(flight.message.ranks[late == "recv"])
        program, place = self.programs[other], self.place[other]
        if place == len(program):
            return f"rank {other} has ended without it"
        wanted = self.flights[other][program[place].number][0].message  # type: ignore[union-attr]
        return f"rank {other} has not come to it: it waits at event {place} for {_said(wanted)}"


def _itself(rank: int) -> int:
    return rank


def _span(flight: Flight, seconds: float) -> tuple[float, float]:
    assert flight.start is not None
    return flight.start, flight.start + seconds


def _check_alike(flight: Flight, rank: int, place: int, message: Message) -> None:
    """Members of a group must hand over the same message."""
    first = flight.message
    pair = message.collective in ("send", "recv")
    same = (pair or first.collective == message.collective) and first.dtype == message.dtype
    if message.collective in EVEN:
        same = same and first.payload_bytes == message.payload_bytes
    if not same:
        raise Mismatch(
            f"rank {rank}, event {place}: {_said(message)} meets {_said(first)} "
            f"of rank {flight.rank}, event {flight.place}"
        )


def _said(message: Message) -> str:
    ranks = ",".join(map(str, message.ranks[:8])) + (",..." if len(message.ranks) > 8 else "")
    size = f"{message.payload_bytes} B of {message.dtype}"
    return f"{message.collective} over {message.axis} of ranks {ranks} ({size})"
