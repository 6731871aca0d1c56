"""Memory of pipeline ranks with several stages, which walks their schedule: against traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costs.ledger import MEMORY_PARTS
from experiments.config import TrainConfig
from experiments.figures.agreement import traced
from experiments.figures.parity import make_config
from experiments.warn import warn
from parallel.layout import ActivationCheckpointing, Layout, PipelineConfig, PipelineSchedule
from simulator.memory import memory
from simulator.plans import Plans
from simulator.schedule_moments import ALIKE, SHARED, Kind, column, moments, walked

SCHEDULES = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
V_SHAPED = ("zbv_zero_bubble", "dualpipev")
SPLIT = ("interleaved_zero_bubble", *V_SHAPED)
SIZE: dict[str, Any] = {"clip": 1.0, "seq_len": 128, "model.context": 128, "model.n_layer": 8}
FULL = {"activation_checkpointing": ActivationCheckpointing.full}


def config(schedule: str, changes: dict[str, Any] | None = None, **axes: int) -> TrainConfig:
    pipeline = {"pipeline": PipelineConfig(schedule=PipelineSchedule(schedule))}
    pieces = {"gradient_accumulation_steps": 2 * axes["pp"]}
    return make_config(Layout(**axes), {**SIZE, **pipeline, **pieces, **(changes or {})})


CASES = [
    *((config(schedule, pp=2), 0.03) for schedule in (*SCHEDULES, *V_SHAPED)),
    *((config(schedule, pp=4), 0.03) for schedule in (*SPLIT, "interleaved_1f1b")),
    (config("zbv_zero_bubble", pp=2, dp_replicate=2), 0.03),
    (config("interleaved_zero_bubble", pp=2, tp=2), 0.03),
    (config("looped_bfs", FULL, pp=2), 0.03),
    *((config(schedule, FULL, pp=2), 0.15) for schedule in SPLIT),
]


@pytest.mark.slow
def test_the_peak_is_near_the_traced_one_on_first_and_last_rank() -> None:
    """Checkpointed blocks of a split backward run again for each weight, of which the closed form
    knows the mean: see simulator/held.py."""
    jobs = [(c, rank) for c, _ in CASES for rank in (0, c.layout.world_size - 1)]
    for (one, rank), found in zip(jobs, traced(jobs), strict=True):
        near = next(bound for c, bound in CASES if c is one)
        plans = Plans.of(one.model, one.layout, one.options)
        wanted = memory(plans, rank * one.layout.pp // one.layout.world_size).peak[0]
        where = (one.pipeline.schedule.value, one.layout.label, rank)
        assert wanted == pytest.approx(found.memory_bytes["peak"], rel=near), where


def test_checkpoints_under_a_split_backward_cost_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch runs a block again for each of its weights, and keeps what later ones need."""
    warn(config("interleaved_1f1b", FULL, pp=2))
    assert capsys.readouterr().err == ""
    warn(config("dualpipev", FULL, pp=2))
    assert "more memory than without; 1f1b" in capsys.readouterr().err
    for schedule in SPLIT:
        plain, full = (config(schedule, changes, pp=2) for changes in ({}, FULL))
        peaks = [memory(Plans.of(c.model, c.layout, c.options)).peak[0] for c in (plain, full)]
        assert peaks[1] > peaks[0]
    one = config("interleaved_1f1b", FULL, pp=2)
    other = config("interleaved_1f1b", pp=2)
    peaks = [memory(Plans.of(c.model, c.layout, c.options)).peak[0] for c in (one, other)]
    assert peaks[0] < peaks[1]


@given(
    st.sampled_from((*SCHEDULES, *V_SHAPED)),
    st.integers(1, 8),
    st.sampled_from((8, 128)),
    st.sampled_from(({"pp": 2}, {"pp": 4}, {"pp": 2, "dp_replicate": 2}, {"pp": 2, "dp_shard": 2})),
    st.sampled_from(ActivationCheckpointing),
)
def test_no_part_is_negative(
    schedule: str,
    micro_batches: int,
    seq_len: int,
    axes: dict[str, int],
    checkpointing: ActivationCheckpointing,
) -> None:
    """With few tokens and large weights the end of a stage's backward is the fullest moment."""
    one = config(schedule, {"model.d_model": 512, "zero_stage": 2}, **axes)
    options = replace(
        one.options,
        micro_batches=micro_batches,
        seq_len=seq_len,
        activation_checkpointing=checkpointing,
    )
    for place in range(axes["pp"]):
        found = memory(Plans.of(one.model, one.layout, options), place)
        assert min(getattr(found, part)[0] for part in MEMORY_PARTS) >= 0


@given(
    st.sampled_from((*SCHEDULES, *V_SHAPED)),
    st.sampled_from((2, 3, 4, 8)),
    st.integers(2, 4),
    st.integers(ALIKE + 1, 2 * ALIKE),
    st.data(),
)
def test_many_micro_batches_are_as_many_fewer(
    name: str, ranks: int, local: int, times: int, data: st.DataObject
) -> None:
    """What is taken from fewer micro-batches is what a walk through all of them gives."""
    rank, v_shaped = data.draw(st.integers(0, ranks - 1)), name in V_SHAPED
    stages = 2 if v_shaped else local
    kind = Kind(PipelineSchedule(name), ranks, stages, times * ranks, rank)
    assert sorted(map(tuple, moments(kind))) == sorted(map(tuple, walked(kind)[0]))


@given(st.sampled_from((*SCHEDULES, *V_SHAPED)), st.sampled_from((2, 4)), st.integers(0, 3))
def test_nothing_is_held_less_than_not_at_all(name: str, ranks: int, rank: int) -> None:
    """Counts are never negative; the first stage never splits; all micro-batches' buffers for what
    comes are there from the beginning."""
    rank, v_shaped, m = rank % ranks, name in V_SHAPED, 4 * ranks
    rows = moments(Kind(PipelineSchedule(name), ranks, 2, m, rank))
    assert (rows >= 0).all()
    split = rows[:, column("split", 0)].max()
    assert (split > 0) == (name in SPLIT and rank > 0)
    stages = (rank, 2 * ranks - 1 - rank if v_shaped else ranks + rank)
    others = sum(stage > 0 and not (v_shaped and stage == ranks) for stage in stages)
    assert rows[:, SHARED.index("messages")].min() >= m * others
    assert np.isin(rows[:, SHARED.index("newest")], (0, 1)).all()
