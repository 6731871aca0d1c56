"""Bubbles of every schedule: replayed programs against what the papers say."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costs.program import Message, Program, Wait, Work
from parallel.layout import PipelineConfig, PipelineSchedule
from parallel.rules import takes
from simulator.programs import PHASE_OF_KIND, pipeline_programs
from simulator.replay import replay
from simulator.timeline import Timeline

SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
SPLIT = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")


def work(kind: str, stage: int, micro_batch: int) -> Program:
    """Every stage alike."""
    phase = PHASE_OF_KIND[kind]
    name = {"I": "backward_input", "W": "backward_weight"}.get(kind, phase)
    return [Work(phase, name, SECONDS[kind], stage=stage, micro_batch=micro_batch)]


def run(name: str, ranks: int, m: int, local: int | None = None, message: float = 0.0) -> Timeline:
    """A pipeline of equal stages, whose ranks meet when all is done, as for the sum of losses."""
    pipeline = PipelineConfig(PipelineSchedule(name), local)
    made = pipeline_programs(pipeline, range(ranks), m, work, payload_bytes=4)
    group = tuple(range(ranks))
    end: Program = [
        Message(-1, "all_reduce", "pp", group, "float64", 16, "optimizer"),
        Wait(-1, "optimizer"),
    ]
    programs = {rank: program + end for rank, program in made.items()}
    return replay(programs, lambda w: w.seconds or 0.0, lambda sent: message)


def shares(timeline: Timeline) -> set[Fraction]:
    """Of the step, on each rank."""
    times = timeline.time_s.values()
    return {Fraction(parts["bubble"]) / Fraction(parts["total"]) for parts in times}


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 24))
def test_one_stage_a_rank(name: str, p: int, m: int) -> None:
    """(p-1) / (m+p-1) of the step, on every rank (Narayanan et al. 2021, section 2.2.1)."""
    if takes(PipelineConfig(PipelineSchedule(name)), p, m):
        assert shares(run(name, p, m)) == {Fraction(p - 1, m + p - 1)}


@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 4))
def test_interleaved(p: int, rounds: int, v: int) -> None:
    """v stages a rank make the bubble v times smaller (Narayanan et al. 2021, section 2.2.2)."""
    m = rounds * p
    assert shares(run("interleaved_1f1b", p, m, v)) == {Fraction(p - 1, v * m + p - 1)}


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", SPLIT)
def test_halves_of_the_backward_fill_the_bubble(name: str, p: int) -> None:
    """Less than 1F1B's interleaved with as many stages, where input and weight take alike."""
    m = 4 * p
    assert max(shares(run(name, p, m))) < Fraction(p - 1, 2 * m + p - 1)


@given(
    st.sampled_from(list(PipelineSchedule)),
    st.integers(2, 4),
    st.integers(1, 12),
    st.floats(0, 3),
    st.floats(0, 1),
)
def test_no_schedule_hangs_and_none_is_faster_on_a_slower_network(
    schedule: PipelineSchedule, p: int, m: int, slow: float, share: float
) -> None:
    if takes(PipelineConfig(schedule), p, m):
        name = schedule.value
        assert run(name, p, m, message=share * slow).total <= run(name, p, m, message=slow).total
