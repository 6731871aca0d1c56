"""The numbers of micro-batches that a schedule takes: rules.py against torch, and real ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.figures import parity
from experiments.figures.parity import compare, make_config, trajectories, trajectory
from experiments.ranks import run_ranks
from parallel.layout import Layout, PipelineConfig, PipelineSchedule
from parallel.rules import takes
from simulator.order_times import ideal_bubble
from tests.pipeline_orders import ends, idle_shares, is_complete, nobody, order_of

MOST = 9  # micro-batches
PIPELINES = [
    PipelineConfig(schedule, stages)
    for schedule in PipelineSchedule
    for stages in ([2, 3] if schedule.value in ("interleaved_1f1b", "looped_bfs") else [None])
]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_schedule_takes_what_torch_can_order(ranks: int) -> None:
    """Constructed without a word, every stage meets every micro-batch, and no rank waits for ever.

    torch writes 1f1b and gpipe as an order too, but runs them by other code (and numbers the last
    rank's forwards of 1f1b from 1, in 2.13): of those two only the construction says something.
    """
    with nobody(ranks):
        for pipeline in PIPELINES:
            stages = ranks * pipeline.local_stages
            for n in range(1, MOST + 1):
                order = order_of(pipeline, ranks, n)
                good = order is not None and (
                    pipeline.one_stage_a_rank
                    or (is_complete(order, stages, n) and ends(order, stages))
                )
                assert takes(pipeline, ranks, n) == good, (pipeline, ranks, n)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ideal_bubble_is_that_of_the_orders_that_torch_makes(ranks: int) -> None:
    """Every rank of every schedule idles as much, however few micro-batches it has. torch's own
    numbers of gpipe and 1f1b are left out, as above."""
    seen = 0
    with nobody(ranks):
        for pipeline in PIPELINES:
            numbers = range(1, MOST) if not pipeline.one_stage_a_rank else ()
            for n in (n for n in numbers if takes(pipeline, ranks, n)):
                order = order_of(pipeline, ranks, n)
                assert order is not None
                wanted = ideal_bubble(pipeline, ranks, n)
                shares = idle_shares(order, ranks * pipeline.local_stages)
                assert shares == pytest.approx([wanted] * ranks), (pipeline, n)
                seen += 1
    assert seen >= 5


@given(st.sampled_from(list(PipelineSchedule)), st.integers(2, 8), st.integers(1, 5))
def test_the_textbook_bubbles(schedule: PipelineSchedule, p: int, rounds: int) -> None:
    """With enough micro-batches to fill the pipeline torch's orders reach what papers say of them:
    (p-1)/(v m + p-1) (Narayanan et al. 2021, section 2.2; Lamy-Poirier 2023), and where backwards
    are split a third of it (Qi et al. 2023, section 2)."""
    pipeline = PipelineConfig(schedule)
    m = p * rounds if not pipeline.splits_backward else 2 * p * rounds
    slots = pipeline.local_stages * m * (3 if pipeline.splits_backward else 1)
    assert ideal_bubble(pipeline, p, m) == pytest.approx((p - 1) / (slots + p - 1))


def test_too_few_micro_batches_leave_a_larger_bubble_than_the_papers() -> None:
    """Eight ranks with eight micro-batches: 7/55 is Qi et al.'s, which ZBV reaches from 14 on."""
    zbv, interleaved = (
        PipelineConfig(PipelineSchedule(n)) for n in ("zbv_zero_bubble", "interleaved_zero_bubble")
    )
    assert ideal_bubble(zbv, 8, 8) == pytest.approx(0.226, abs=5e-4)
    assert ideal_bubble(interleaved, 8, 8) == pytest.approx(7 / 55)
    assert ideal_bubble(zbv, 8, 14) == pytest.approx(7 / (3 * 28 + 7))


@pytest.mark.slow
def test_the_fewest_micro_batches_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of every schedule on two ranks, with the fewest that it takes and with three."""
    monkeypatch.setattr(parity, "GLOBAL_BATCH", 12)
    small: dict[str, Any] = {"model.n_layer": 6, "model.d_model": 32, "steps": 1}
    reference = trajectory(make_config(Layout(), small))
    cases = []
    for pipeline in PIPELINES:
        fewest = next(n for n in range(1, MOST) if takes(pipeline, 2, n))
        numbers = {fewest, 3} if takes(pipeline, 2, 3) else {fewest}
        cases += [{"pipeline": pipeline, "gradient_accumulation_steps": n} for n in numbers]
    configs = [make_config(Layout(pp=2), {**small, **case}) for case in cases]
    for case, run in zip(cases, run_ranks(2, trajectories, configs)[0], strict=True):
        assert compare(run, reference).holds, case
