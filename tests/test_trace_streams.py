"""Traces with the streams of a GPU: what overlaps what, and that nothing else changes."""

from __future__ import annotations

import pytest

from costs.program import Message, Program, Wait, Work
from experiments.figures.agreement import traced
from experiments.figures.parity import make_config
from parallel.layout import Layout
from simulator.replay import replay
from simulator.trace import Traced

pytestmark = pytest.mark.slow

BLOCKS = {"model.n_layer": 4}
LAYOUTS = {
    "fsdp": Layout(dp_shard=2),
    "hsdp": Layout(dp_replicate=2, dp_shard=2),
    "ddp": Layout(dp_replicate=2),
    "tp": Layout(tp=2),
}


@pytest.fixture(scope="module")
def both() -> dict[str, tuple[Traced, Traced]]:
    """Each layout without streams and with them."""
    jobs = [(make_config(layout, BLOCKS), 0) for layout in LAYOUTS.values()]
    return dict(zip(LAYOUTS, zip(traced(jobs), traced(jobs, True), strict=True), strict=True))


def numbers(program: Program, kind: type) -> list[int]:
    return [event.number for event in program if isinstance(event, kind)]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LAYOUTS)
def test_streams_change_when_and_nothing_else(
    both: dict[str, tuple[Traced, Traced]], name: str
) -> None:
    without, with_streams = both[name]
    assert with_streams.rows == without.rows
    assert with_streams.flops == without.flops
    assert with_streams.memory_bytes == without.memory_bytes
    program = with_streams.program
    sent = numbers(program, Message)
    assert sorted(numbers(program, Wait)) == sorted(sent) == numbers(without.program, Message)
    for number in sent:  # handed over, then waited for
        places = [i for i, e in enumerate(program) if getattr(e, "number", None) == number]
        assert isinstance(program[places[0]], Message)


def exposed(traced_one: Traced, message_s: float, product_s: float = 1.0) -> float:
    """Of a step whose products take a second each, and whose messages over data axes take so
    long."""

    def work_seconds(work: Work) -> float:
        return product_s if work.flops else 0.0

    def message_seconds(message: Message) -> float:
        return message_s if message.axis.startswith("dp") and message.payload_bytes > 100 else 0.0

    programs = {0: traced_one.program}
    found = replay(programs, work_seconds, message_seconds, like=lambda _: 0)
    return found.time_s[0]["exposed_communication"]


def test_fsdp_hides_all_but_its_ends(both: dict[str, tuple[Traced, Traced]]) -> None:
    """A message shorter than a block's products: the gathers of the root and of the first block
    have nothing to hide behind, nor has the scatter of the last gradients."""
    without, with_streams = both["fsdp"]
    messages = sum(
        isinstance(e, Message) and e.axis == "dp_shard" and e.payload_bytes > 100
        for e in without.program
    )
    assert messages >= 3 * BLOCKS["model.n_layer"]
    assert exposed(without, 1.0) == pytest.approx(messages)
    assert exposed(with_streams, 1.0) <= 4
    # the next block's weights are under way while this one computes, no more than two ahead
    gathered, most, computing = 0, 0, False
    for event in with_streams.program:
        if isinstance(event, Message) and event.collective == "all_gather":
            gathered += 1
        elif isinstance(event, Wait):
            gathered = max(0, gathered - 1)
        elif isinstance(event, Work) and event.flops:
            computing, most = True, max(most, gathered)
    assert computing and 1 <= most <= 2


def test_ddp_overlaps_backward_and_tp_waits(both: dict[str, tuple[Traced, Traced]]) -> None:
    _, tp = both["tp"]
    for place, event in enumerate(tp.program):
        if isinstance(event, Message) and event.axis == "tp" and event.phase != "optimizer":
            following = tp.program[place + 1 :]
            work = next(e for e in following if isinstance(e, Work | Wait) and not _is_idle(e))
            assert isinstance(work, Wait)
    without, ddp = both["ddp"]
    assert ddp.program == without.program  # its buckets are under way without streams too


def _is_idle(event: Work | Wait) -> bool:
    """Work of no length: a note that DTensor was called."""
    return isinstance(event, Work) and not (event.flops or event.bytes)
