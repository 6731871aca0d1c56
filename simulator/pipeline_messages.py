"""What a pipeline rank does in turn, with its messages: an order of work, and where torch sends.

A step is (kind, stage, micro-batch). Kinds: F, B, I, W as in simulator/schedules.py; SEND_F, RECV_F
activations, SEND_B, RECV_B their gradients; WAIT_ before one of those: until it has arrived. Both
ends of a message are named by the stage that sends or takes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from parallel.layout import PipelineConfig
from simulator.schedules import order_of

Step = tuple[str, int, int]
Steps = list[Step]
SENDS = ("SEND_F", "SEND_B")


def steps_of(pipeline: PipelineConfig, ranks: int, micro_batches: int) -> list[Steps]:
    """Return what each pp rank does in turn."""
    made = steps_of_work(pipeline, ranks, micro_batches)
    if pipeline.schedule.value in ("gpipe", "1f1b"):
        return made
    for own in made:
        own += [("WAIT_" + kind, stage, i) for kind, stage, i in own if kind in SENDS]
    return made


def steps_of_work(pipeline: PipelineConfig, ranks: int, micro_batches: int) -> list[Steps]:
    """Return what `steps_of` does, where it may leave out the sends that are waited for when all
    work is done."""
    local = pipeline.local_stages
    orders = [
        order_of(pipeline.schedule, ranks, local, micro_batches, rank) for rank in range(ranks)
    ]
    work: list[Steps] = []
    for rank, order in enumerate(orders):
        own = pipeline.stages_of(rank, ranks)
        work.append([(kind, own[lap], i) for kind, lap, i in order])
    if pipeline.schedule.value == "gpipe":
        return [list(_gpipe(own, rank, ranks)) for rank, own in enumerate(work)]
    if pipeline.schedule.value == "1f1b":
        return [list(_one_f_one_b(own, rank, ranks)) for rank, own in enumerate(work)]
    return _looped(work, pipeline, ranks)


def _gpipe(work: Steps, rank: int, ranks: int) -> Iterator[Step]:
    """Takes what it needs when it needs it, and waits for what it sent when a phase is over
    (torch's ScheduleGPipe)."""
    for phase in ("F", "B"):
        own = [step for step in work if step[0] == phase]
        ends = _ends(phase, rank, ranks)
        for step in own:
            yield from _moved(("RECV_", "WAIT_RECV_"), step, ends[0])
            yield step
            yield from _moved(("SEND_",), step, ends[1])
        for step in own:
            yield from _moved(("WAIT_SEND_",), step, ends[1])


def _one_f_one_b(work: Steps, rank: int, ranks: int) -> Iterator[Step]:
    """torch's Schedule1F1B: a send goes out together with the recv that follows it, and both are
    waited for; while the pipeline fills and empties, a send is waited for before the next one."""
    warm = next(i for i, step in enumerate(work) if step[0] == "B")
    last_forward = max(i for i, step in enumerate(work) if step[0] == "F")
    sent: Step | None = None  # under way
    held: Step | None = None  # goes out with the next recv
    for i, step in enumerate(work):
        takes, gives = _ends(step[0], rank, ranks)
        if held:
            yield from _moved(("SEND_",), held, _ends(held[0], rank, ranks)[1])
        yield from _moved(("RECV_",), step, takes)
        if held:
            yield from _moved(("WAIT_SEND_",), held, _ends(held[0], rank, ranks)[1])
        yield from _moved(("WAIT_RECV_",), step, takes)
        held = None
        yield step
        if sent:
            yield from _moved(("WAIT_SEND_",), sent, _ends(sent[0], rank, ranks)[1])
            sent = None
        if i < warm - 1 or i > last_forward:
            yield from _moved(("SEND_",), step, gives)
            sent = step
        else:
            held = step
    if sent:
        yield from _moved(("WAIT_SEND_",), sent, _ends(sent[0], rank, ranks)[1])


def _ends(kind: str, rank: int, ranks: int) -> tuple[bool, bool]:
    """Whether a rank of one stage takes something for this kind of work, and gives it on."""
    first, last = rank > 0, rank < ranks - 1
    return (first, last) if kind == "F" else (last, first)


def _moved(kinds: tuple[str, ...], step: Step, wanted: bool) -> Iterator[Step]:
    if wanted:
        for kind in kinds:
            yield (kind + step[0], *step[1:])


def _looped(work: list[Steps], pipeline: PipelineConfig, ranks: int) -> list[Steps]:
    """Several stages a rank: a recv is handed over in the sender's turn, so that both ends have one
    order, and waited for by what needs it (torch's _add_send_recv and _PipelineScheduleRuntime).
    Sends, which are waited for when all is done, are not waited for here."""
    count = ranks * pipeline.local_stages
    home = [pipeline.rank_of(stage, ranks) for stage in range(count)]
    made: list[Steps] = [[] for _ in work]
    left = [list(reversed(own)) for own in work]
    arrived: set[Step] = set()  # by way, and by the stage and micro-batch that it is for

    while any(left):
        moved = False
        for rank, own in enumerate(left):
            if not own:
                continue
            kind, stage, i = step = own[-1]
            way, on = ("F", 1) if kind == "F" else ("B", -1)  # a B and an I send the same
            comes = kind != "W" and 0 <= stage - on < count
            if comes and (way, stage, i) not in arrived:
                continue
            own.pop()
            moved = True
            mine = made[rank]
            if comes and home[stage - on] != rank:
                mine.append(("WAIT_RECV_" + way, stage, i))
            mine.append(step)
            if kind == "W" or not 0 <= stage + on < count:
                continue
            there = home[stage + on]
            if there != rank:
                mine.append(("SEND_" + way, stage, i))
                made[there].append(("RECV_" + way, stage + on, i))
            arrived.add((way, stage + on, i))
        assert moved, "no rank can go on"
    return made
