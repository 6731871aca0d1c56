"""Closed forms over arrays: an array of plans is each plan on its own; orders are torch's."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from torch.distributed.pipelining import schedules as of_torch

from minigpt.config import ModelConfig
from parallel.layout import Layout, Options, PipelineConfig, PipelineSchedule
from parallel.rules import takes
from simulator.communication import messages, payload_bytes
from simulator.plans import Plans
from simulator.schedules import gathers, order_of
from tests.pipeline_orders import flat, nobody
from tests.pipeline_orders import order_of as torchs_order

KINDS = {
    of_torch.FORWARD: "F",
    of_torch.FULL_BACKWARD: "B",
    of_torch.BACKWARD_INPUT: "I",
    of_torch.BACKWARD_WEIGHT: "W",
}
LOOPED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
PIPELINES = [
    PipelineConfig(schedule, local)
    for schedule in PipelineSchedule
    for local in ([2, 3, 5] if schedule.value in LOOPED else [None])
]


def many() -> Plans:
    """Plans of all kinds, a few hundred."""
    choices = {
        "pp": [1, 2, 4],
        "dp_replicate": [1, 2],
        "dp_shard": [1, 4],
        "cp": [1, 2],
        "tp": [1, 2],
        "ep": [1],
        "micro_batch_size": [2],
        "micro_batches": [8],
        "zero_stage": [1, 2, 3],
        "syncs_each": [False],
        "sequence_parallel": [False],
        "precision": [0, 1],
        "checkpointing": [0, 2],
        "schedule": [1, 2],
        "local_stages": [1],
    }
    plans = Plans.product(ModelConfig(n_layer=12, d_model=64), 64, choices)
    return replace(plans, local_stages=np.where(plans.schedule == 2, 2, 1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_orders_are_those_of_torchs_schedules(ranks: int) -> None:
    """But for the numbers of 1f1b's micro-batches, which torch's own listing counts from 1."""
    with nobody(ranks):
        for pipeline in PIPELINES:
            for n in [n for n in range(1, 13) if takes(pipeline, ranks, n)]:
                order = torchs_order(pipeline, ranks, n)
                assert order is not None
                width = 2 if pipeline.schedule.value == "1f1b" else 3
                for rank, actions in flat(order).items():
                    stages = pipeline.stages_of(rank, ranks)
                    theirs = [
                        (KINDS[a.computation_type], stages.index(a.stage_index), a.microbatch_index)
                        for a in actions
                    ]
                    ours = order_of(pipeline.schedule, ranks, pipeline.local_stages, n, rank)
                    assert [a[:width] for a in ours] == [a[:width] for a in theirs], (pipeline, n)


def test_gathers_of_known_orders() -> None:
    """GPipe and breadth-first: before each forward, and once for all backwards. 1f1b in the steady
    state: before each backward, which the next forward finds kept."""
    assert gathers(PipelineSchedule.gpipe, 2, 1, 6, 0) == ((6, 1),)
    assert gathers(PipelineSchedule("1f1b"), 4, 1, 8, 1) == ((3, 6),)
    assert gathers(PipelineSchedule.looped_bfs, 2, 2, 4, 1) == ((4, 1), (4, 1))


def test_an_array_of_plans_sends_what_each_plan_sends() -> None:
    plans = many()
    places = np.arange(len(plans)) % plans.pp
    together = messages(plans, places)
    for i in Random(0).sample(range(len(plans)), 60):
        apart = messages(plans[[i]], places[i])
        for key, sent in together.items():
            alone = apart.get(key)
            found = [int(x[i]) for x in (sent.calls, sent.payload_bytes, sent.group_size)]
            wanted = [0, 0, 0]
            if alone is not None:
                parts = (alone.calls, alone.payload_bytes, alone.group_size)
                wanted = [int(x[0]) for x in parts]
            assert found == wanted, (key, i)
        assert apart.keys() <= together.keys()


def test_megatrons_optimizer_scatters_gradients_and_gathers_weights() -> None:
    """ZeRO 1 with tp: 4 bytes of each gradient scattered, 2 of each weight gathered, once."""
    from simulator.plans import Numerics

    model = ModelConfig(n_layer=2)
    options = Options(zero_stage=1, micro_batches=4)
    kept = Numerics(weights=2, gradients=4, optimizer=12)
    plan = Plans.of(model, Layout(dp_shard=4, tp=1), options, distributed_optimizer=True)
    sent = messages(replace(plan, numerics=kept))
    P = model.parameters
    assert sent["reduce_scatter", "dp_shard", "float32"].payload_bytes.tolist() == [4 * P]
    assert sent["all_gather", "dp_shard", "bfloat16"].payload_bytes.tolist() == [2 * P]


def test_numbers_of_a_large_model_do_not_overflow() -> None:
    model = ModelConfig(n_layer=126, d_model=16384, n_head=128, n_kv_head=8, d_ff=53248)
    layout = Layout(pp=16, dp_shard=128, tp=8)
    options = Options(seq_len=131072, micro_batches=4096, sequence_parallel=True)
    assert all(0 < size < 2**60 for size in payload_bytes(model, layout, options).values())
