"""What a search looks at is what the rules let pass: no more and no less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.config import ModelConfig
from parallel.layout import (
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
    Precision,
)
from parallel.rules import check, fits, of_size
from simulator.plans import SCHEDULES, distinct
from simulator.space import Space, layout_at, options_at, plans_of, stages_a_rank

DENSE = ModelConfig(n_layer=8, n_head=4, n_kv_head=2)
# zero_stage and gradient_sync, without accumulation and with it
SHARDED = [[(zero, GradientSync.step) for zero in (1, 2, 3)]]
SHARDED.append([*SHARDED[0], *[(zero, GradientSync.micro_batch) for zero in (2, 3)]])
MOE = ModelConfig(n_layer=4, n_head=4, ffn="moe", n_expert=4)  # type: ignore[arg-type]


def by_rules(space: Space) -> set[tuple[str, str]]:
    """The same plans, each asked for by itself."""
    found = set()
    eps = (1, 2, 4) if space.model.ffn == "moe" else (1,)
    layouts = [one for ep in eps for one in of_size(Layout(dp_shard=space.devices, ep=ep))]
    pipelines = [PipelineConfig(s, n) for s in SCHEDULES for n in stages_a_rank(s)]
    for layout, size in itertools.product(layouts, space.micro_batch_sizes):
        count, rest = divmod(space.batch_size, size * layout.data_parallel)
        if rest or layout.data_parallel % layout.ep:
            continue
        accumulates = layout.dp_shard > 1 and layout.pp == 1 and count > 1
        for pipeline, checkpointing, (zero, sync) in itertools.product(
            pipelines if layout.pp > 1 else [PipelineConfig()],
            space.checkpointing,
            SHARDED[accumulates] if layout.dp_shard > 1 else [(1, GradientSync.step)],
        ):
            options = Options(
                precision=Precision.bf16,
                activation_checkpointing=checkpointing,
                zero_stage=zero,
                gradient_sync=sync,
                sequence_parallel=layout.tp > 1,
                pipeline=pipeline,
                micro_batch_size=size,
                seq_len=space.seq_len,
                micro_batches=count,
            )
            again = checkpointing != ActivationCheckpointing.none
            if fits(space.model, layout, options) and not (again and pipeline.splits_backward):
                found.add((str(layout), str(options)))
    return found


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("devices", [1, 6, 8])
def test_the_space_is_what_the_rules_allow(model: ModelConfig, devices: int) -> None:
    none, full = ActivationCheckpointing.none, ActivationCheckpointing.full
    space = Space(model, 64, devices, 24, checkpointing=(none, full), micro_batch_sizes=(1, 2, 4))
    plans, _ = plans_of(space)
    seen = {(str(layout_at(plans, i)), str(options_at(plans, i))) for i in range(len(plans))}
    assert len(seen) == len(plans)
    assert seen == by_rules(space)
    assert set(plans.world_size.tolist()) == {devices}
    assert set((plans.tokens // 64).tolist()) == {24}


def test_refusals_are_counted_by_key() -> None:
    plans, refused = plans_of(Space(DENSE, 64, 8, 8))
    assert refused["zero_stage"] > 0 and refused["gradient_accumulation_steps"] > 0
    check(DENSE, layout_at(plans, 0), options_at(plans, 0))


def test_an_axis_may_be_given() -> None:
    plans, _ = plans_of(Space(DENSE, 64, 8, 8, fixed={"tp": 2, "pp": 2}))
    assert set(plans.tp.tolist()) == {2} and set(plans.pp.tolist()) == {2}
    with pytest.raises(ValueError, match="no layout has so many ranks"):
        plans_of(Space(DENSE, 64, 8, 8, fixed={"tp": 3}))
    with pytest.raises(ValueError, match="no layout of 8 ranks divides it"):
        plans_of(Space(DENSE, 64, 8, 7, fixed={"dp_shard": 8}))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**40), st.sampled_from([0, 2**61]))))
def test_combinations_are_found_once_with_all_their_places(rows: list[tuple[int, ...]]) -> None:
    """Of numbers so large, too, that no one number could hold a combination of them."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    first, places = distinct([*columns])
    wanted: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        wanted.setdefault(row, []).append(place)
    assert sorted(p.tolist() for p in places) == sorted(wanted.values())
    assert [p[0] for p in places] == first.tolist()
