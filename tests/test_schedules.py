"""The numbers of micro-batches that a schedule takes: rules.py against torch, and real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.figures import parity
from experiments.figures.parity import compare, make_config, trajectories, trajectory
from experiments.ranks import run_ranks
from parallel.layout import Layout, PipelineConfig, PipelineSchedule
from parallel.rules import takes
from parallel.stages import ideal_bubble
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
    """Every rank of every schedule idles as the closed form says; torch's own numbers of gpipe and
    1f1b are left out, as above."""
    seen = 0
    with nobody(ranks):
        for pipeline in PIPELINES:
            numbers = range(2 * ranks, MOST) if not pipeline.one_stage_a_rank else ()
            for n in (n for n in numbers if takes(pipeline, ranks, n)):
                order = order_of(pipeline, ranks, n)
                assert order is not None
                wanted = ideal_bubble(pipeline, ranks, n)
                shares = idle_shares(order, ranks * pipeline.local_stages)
                assert shares == pytest.approx([wanted] * ranks), (pipeline, n)
                seen += 1
    assert seen >= 5


def test_the_textbook_bubble_of_1f1b_and_gpipe() -> None:
    """Narayanan et al. 2021: (p-1)/m of the ideal time, so 3/7 of the whole at p = 4, m = 4."""
    for name in ("1f1b", "gpipe"):
        pipeline = PipelineConfig(PipelineSchedule(name))
        assert ideal_bubble(pipeline, 4, 4) == pytest.approx(3 / 7)
        assert ideal_bubble(pipeline, 2, 8) == pytest.approx(1 / 9)


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
