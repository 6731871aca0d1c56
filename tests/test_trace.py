"""Traces of real ranks: they nest, hold every message of the ledger, and add up."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from costs.ledger import MEMORY_PARTS, TIME_PARTS
from costs.program import Message, Wait, Work
from costs.trace import COMMUNICATION, COMPUTE, WAIT, Trace, lanes
from experiments.config import TrainConfig
from experiments.figures.parity import make_config
from experiments.figures.short_runs import recorded, step_costs
from experiments.ranks import run_ranks
from parallel.layout import Impl, Layout, PipelineConfig, PipelineSchedule
from simulator.plans import Plans
from simulator.shapes import Rank, weights_of
from tests.test_timeline import nesting_fault
from tests.trace_on_ranks import offset_of_a_clock_that_is_ahead

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"model.n_layer": 4, "model.d_model": 32, "steps": 7, "trace": True}
STAGED = {"gradient_accumulation_steps": 4}


def staged(schedule: str, **more: Any) -> TrainConfig:
    pipeline = PipelineConfig(PipelineSchedule(schedule))
    return make_config(Layout(pp=2), {**SMALL, **STAGED, "pipeline": pipeline, **more})


CONFIGS = {
    "1f1b": staged("1f1b"),
    "1f1b by hand": staged("1f1b", impl=Impl.by_hand),
    "zbv": staged("zbv_zero_bubble"),
    "ddp": make_config(Layout(dp_replicate=2), {**SMALL, "gradient_accumulation_steps": 2}),
    "fsdp": make_config(Layout(dp_shard=2), SMALL),
    "tp": make_config(Layout(tp=2), SMALL),
}
Runs = dict[str, tuple[Trace, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """The trace of each, and what the ledger says of each rank."""
    ranks = run_ranks(2, recorded, list(CONFIGS.values()))
    found = {}
    for i, name in enumerate(CONFIGS):
        trace = ranks[0][i][0]
        assert trace is not None and ranks[1][i][0] is None
        found[name] = trace, [rank[i][1] for rank in ranks]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_of_a_track_nest(runs: Runs, name: str) -> None:
    slices = runs[name][0].slices
    for rank in (0, 1):
        own = [s for s in slices if s.rank == rank]
        tracks = [[s for s in own if s.track == COMPUTE]]
        tracks += lanes(s for s in own if s.track == COMMUNICATION)
        for track in tracks:
            assert nesting_fault(track) is None
        step = next(s for s in own if s.kind == "step")
        assert all(step.start <= s.start <= s.end <= step.end + 1e-3 for s in own)
        numbers = {s.args["number"] for s in own if s.track == COMMUNICATION}
        waits = [s for s in own if s.kind == WAIT]
        assert waits and {s.args["number"] for s in waits} <= numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_every_message_of_the_ledger_is_there_with_its_bytes(runs: Runs, name: str) -> None:
    trace, ledger = runs[name]
    for rank, costs in enumerate(ledger):
        wanted: Counter = Counter()
        for row in costs["communication"]:
            key = row["collective"], row["axis"], row["dtype"], row["phase"]
            for what in ("calls", "payload_bytes", "wire_bytes"):
                wanted[(*key, what)] += row[what]
        found: Counter = Counter()
        for s in trace.slices:
            if s.rank == rank and s.track == COMMUNICATION:
                key = s.kind, s.args["axis"], s.args["dtype"], s.args["phase"]
                found[(*key, "calls")] += 1
                found[(*key, "payload_bytes")] += s.args["payload_bytes"]
                found[(*key, "wire_bytes")] += s.args["wire_bytes"]
        assert found == wanted
        sent = [e for e in trace.programs[rank] if isinstance(e, Message)]
        assert sum(e.payload_bytes for e in sent) == sum(
            row["payload_bytes"] for row in costs["communication"]
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_waits_for_what_was_sent_and_takes_as_long(runs: Runs, name: str) -> None:
    trace, ledger = runs[name]
    for rank, costs in enumerate(ledger):
        sent: set[int] = set()
        worked = 0.0
        for event in trace.programs[rank]:
            if isinstance(event, Message):
                sent.add(event.number)
            elif isinstance(event, Wait):
                assert event.number in sent
            else:
                worked += event.seconds or 0.0
        waits = {e.number for e in trace.programs[rank] if isinstance(e, Wait)}
        sends = {e.number for e in trace.programs[rank] if e_is(e, "send")}
        assert waits | sends == sent, "a schedule may leave a send to itself, and nothing else"
        time_s = costs["time_s"]
        idle = time_s["exposed_communication"] + time_s["bubble"]
        assert worked == pytest.approx(time_s["total"] - idle, rel=1e-3)


def e_is(event: Any, collective: str) -> bool:
    return isinstance(event, Message) and event.collective == collective


@pytest.mark.parametrize("name", CONFIGS)
def test_times_add_up_and_only_pipelines_have_bubbles(runs: Runs, name: str) -> None:
    idle = []
    for costs in runs[name][1]:
        time_s = costs["time_s"]
        assert sum(time_s[part] for part in TIME_PARTS) == pytest.approx(time_s["total"])
        idle.append(time_s["bubble"])
    if CONFIGS[name].layout.pp == 1:
        assert idle == [0, 0]
    else:  # on a busy machine the one or the other: whoever is done first waits for the last
        assert sum(idle) > 0


@pytest.mark.parametrize("name", ["1f1b", "1f1b by hand"])
def test_1f1b_is_in_the_order_of_the_textbook(runs: Runs, name: str) -> None:
    """Narayanan et al. 2021, figure 3: the last stage takes turns from the first on."""
    orders = []
    for rank in (0, 1):
        own = [s for s in runs[name][0].slices if s.rank == rank and s.track == COMPUTE]
        acts = sorted((s for s in own if s.micro_batch is not None), key=lambda s: s.start)
        orders.append([s.kind[0].upper() + str(s.micro_batch) for s in acts if s.kind != "loss"])
    assert " ".join(orders[0]) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert " ".join(orders[1]) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_messages_of_a_pipeline_know_their_micro_batch(runs: Runs) -> None:
    for name in ("1f1b", "zbv"):
        trace, _ = runs[name]
        ends: dict[tuple, list] = {}
        for event in [e for program in trace.programs.values() for e in program]:
            if isinstance(event, Message) and event.collective in ("send", "recv"):
                assert event.micro_batch is not None and event.phase in ("forward", "backward")
                key = event.ranks, event.phase, event.micro_batch
                ends.setdefault(key, []).append((event.collective, event.stage))
        for key, sides in ends.items():
            assert sorted(side for side, _ in sides) == ["recv", "send"], key
            (one, other) = (stage for _, stage in sides)
            assert abs(one - other) == 1


def test_zero_bubble_cuts_backwards_in_two(runs: Runs) -> None:
    kinds = Counter(s.kind for s in runs["zbv"][0].slices if s.track == COMPUTE)
    whole, inputs, weights = (kinds[k] for k in ("backward", "backward_input", "backward_weight"))
    assert inputs == weights > 0 and whole + inputs == 4 * 4, "stages by micro-batches"


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_over_the_step_reaches_the_peak_of_the_ledger(runs: Runs, name: str) -> None:
    trace, ledger = runs[name]
    for rank, costs in enumerate(ledger):
        samples = [s for s in trace.memory if s.rank == rank]
        fullest = max(samples, key=lambda s: sum(s.held.values()))
        wanted = costs["memory_bytes"]
        assert fullest.held == {part: wanted[part] for part in MEMORY_PARTS}
        step = next(s for s in trace.slices if s.rank == rank and s.kind == "step")
        times = [s.time for s in samples]
        assert times == sorted(times) and step.start <= times[0] and times[-1] <= step.end + 1e-6
        assert costs["process_bytes"]["resident_peak"] > wanted["peak"]


def test_work_of_a_program_says_what_it_is(runs: Runs) -> None:
    work = [e for e in runs["1f1b"][0].programs[1] if isinstance(e, Work)]
    assert {e.phase for e in work} == {"data", "forward", "backward", "optimizer", "other"}
    assert {e.micro_batch for e in work if e.action == "backward"} == {0, 1, 2, 3}


def test_the_clock_of_another_machine_is_found() -> None:
    _, found = run_ranks(2, offset_of_a_clock_that_is_ahead, 1000.0)
    assert found == pytest.approx(-1000.0, abs=1.0)


def test_what_a_pipeline_and_tp_hold_is_what_textbooks_say() -> None:
    """1F1B keeps the activations of as many micro-batches as there are stages behind a rank, itself
    included, however many there are; GPipe keeps all. tp keeps 1/tp of the weights that it cuts."""
    long = {"model.context": 128, "seq_len": 128, "data.tokens": 20_000, "steps": 4}
    configs = [
        replace(
            staged(schedule, **long),
            gradient_accumulation_steps=n,
            micro_batch_size=2,
            global_batch_size=None,
        )
        for schedule in ("gpipe", "1f1b")
        for n in (4, 8)
    ]
    tp = replace(CONFIGS["tp"], steps=4)
    for rank, steps in enumerate(run_ranks(2, step_costs, [*configs, tp])):
        gpipe, more, in_turn, longer = (s["memory_bytes"]["activations"] for s in steps[:4])
        one = (more - gpipe) / 4
        assert one > 2 * 128 * 32 * 4, "more than a block's input"
        assert longer == pytest.approx(in_turn, rel=0.02)
        assert gpipe - in_turn == pytest.approx((4 - (2 - rank)) * one, abs=0.3 * one)
        memory = steps[4]["memory_bytes"]
        plan, whole = Plans.of(tp.model, tp.layout, tp.options), tp.model.block_shapes
        local = Rank(plan)
        one = np.ones(1, dtype=np.int64)
        assert (
            4 * (local.layers * local.of_block(one) + local.of_outer(one)) == memory["parameters"]
        )
        steps_of_adamw = memory["optimizer"] - 2 * memory["parameters"]
        assert 0 < steps_of_adamw < 400
        cut = [w for w in weights_of(whole) if w.name.endswith(("out.weight", "up.weight"))]
        assert len(cut) == 2
        for weight in cut:
            rows, width = weight.local(plan)
            assert 2 * rows * width == math.prod(weight.shape)
