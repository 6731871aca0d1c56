"""Memory in closed form against what is measured, and against published counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.config import TrainConfig
from experiments.figures.agreement import traced
from experiments.figures.parity import make_config
from experiments.figures.short_runs import step_costs
from minigpt.config import FFN, ModelConfig, Norm, Positions, Source
from parallel.layout import (
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from simulator.activations import Activations
from simulator.memory import Memory, memory
from simulator.plans import Numerics, Plans
from simulator.schedule_moments import Kind, column, moments
from simulator.shapes import Rank

EVEN = {"clip": 1.0, "steps": 3}
FULL = {"activation_checkpointing": ActivationCheckpointing.full}
GPT2 = {
    "model.ffn": "gelu",
    "model.norm": "layernorm",
    "model.positions": "learned",
    "model.bias": True,
}
ALONE: list[dict[str, Any]] = [
    {},
    FULL,
    {"activation_checkpointing": ActivationCheckpointing.selective},
    GPT2,
    {"model.n_kv_head": 2, "model.tied": True},
    {"gradient_accumulation_steps": 4},
    {"precision": Precision.bf16},
    {"precision": Precision.bf16, **FULL},
    {"model.ffn": "moe", "model.n_expert": 4, "model.d_ff": 64},
    {"model.vocab_size": 960, "data.vocab_size": 960},  # the loss is the fullest moment
]


# what is in no block is most of the model: the fullest moment is the loss, or the very end
LARGE_HEAD: dict[str, Any] = {
    "model.vocab_size": 4096,
    "model.n_layer": 3,
    "model.d_model": 128,
    "data.source": Source.random,
    "data.vocab_size": 200,
}


def closed_form(config: TrainConfig, place: int = 0) -> Memory:
    """On a CPU, bf16 runs attention without a fused kernel (minigpt/attention.py)."""
    flash = config.precision == Precision.fp32
    return memory(Plans.of(config.model, config.layout, config.options, flash=flash), place)


@pytest.mark.parametrize("changes", ALONE)
def test_a_single_process_holds_the_closed_form(changes: dict[str, Any]) -> None:
    config = make_config(Layout(), {**EVEN, **changes})
    measured, wanted = step_costs([config])[0]["memory_bytes"], closed_form(config)
    assert wanted.parameters.tolist() == [measured["parameters"]]
    assert wanted.optimizer.tolist() == [measured["optimizer"]]
    assert wanted.activations[0] == pytest.approx(measured["activations"], rel=0.03)
    assert wanted.peak[0] == pytest.approx(measured["peak"], rel=0.01)


def gpt3(dropout: float = 0.1) -> Plans:
    """175B (Brown et al. 2020) as Megatron-LM runs it in fp16, without a flash kernel."""
    model = ModelConfig(
        n_layer=96,
        n_head=96,
        d_model=12288,
        vocab_size=51200,
        context=2048,
        norm=Norm.layernorm,
        positions=Positions.learned,
        ffn=FFN.gelu,
        bias=True,
        dropout=dropout,
    )
    options = Options(precision=Precision.fp16, seq_len=2048, micro_batch_size=1)
    kept = Numerics(weights=2, gradients=4, optimizer=12)
    return Plans.of(model, Layout(), options, numerics=kept, flash=False)


def test_a_layer_of_gpt3_keeps_what_korthikanti_counts() -> None:
    """Korthikanti et al. 2022, eq. 1: s b h (34 + 5 a s / h) bytes; ours has 16 a token more."""
    s, b, h, a = 2048, 1, 12288, 96
    kept = Activations(Rank(gpt3())).of_block
    assert kept.tolist() == [34 * s * b * h + 5 * a * s * s * b + 16 * s * b]


def test_eight_tensor_ranks_share_gpt3s_layer_as_korthikanti_says() -> None:
    """Eq. 2, tensor parallel: s b h (10 + 24 / t + 5 a s / (h t)); eq. 4, sequence parallel: all
    of it divided by t, but for two copies of what products take that this program gathers whole."""
    s, h, a, t = 2048, 12288, 96, 8
    plans = gpt3()
    eight = Plans(**{**vars(plans), "tp": np.array([t])})
    assert Activations(Rank(eight)).of_block.tolist() == [
        10 * s * h + 24 * s * h // t + 5 * a * s * s // t + 16 * s
    ]


@pytest.mark.parametrize("micro_batches", [8, 16])
def test_micro_batches_in_flight(micro_batches: int) -> None:
    """GPipe holds all, 1F1B as many as ranks follow (Narayanan et al. 2021, section 2.2), ZBV as
    many halves as 1F1B's first rank has, on every rank (Qi et al. 2024, table 1)."""
    m = micro_batches
    for rank in range(4):
        for schedule, wanted in (("gpipe", m), ("1f1b", 4 - rank)):
            pipeline = PipelineConfig(schedule=PipelineSchedule(schedule))
            plans = Plans.of(
                ModelConfig(), Layout(pp=4), Options(micro_batches=m, pipeline=pipeline)
            )
            assert Activations(Rank(plans, rank)).in_flight == wanted
        rows = moments(Kind(PipelineSchedule.zbv_zero_bubble, 4, 2, m, rank))
        halves = rows[:, [column("waiting", lap) for lap in (0, 1)]].sum(axis=1)
        assert halves.max() <= 2 * 4


def test_more_of_anything_needs_more_and_shards_need_less() -> None:
    model, options = ModelConfig(n_layer=8, d_model=256), Options(seq_len=128, micro_batch_size=4)
    one, eight = (
        memory(Plans.of(model, layout, options)) for layout in (Layout(), Layout(dp_shard=8))
    )
    assert eight.parameters[0] * 8 == one.parameters[0]
    assert eight.peak[0] < one.peak[0]
    longer = memory(Plans.of(model, Layout(), Options(seq_len=256, micro_batch_size=4)))
    assert longer.activations[0] == pytest.approx(2 * one.activations[0], rel=0.01)


@pytest.mark.slow
def test_a_large_vocabularys_peak_is_near_the_traced_one() -> None:
    accumulated = {"gradient_accumulation_steps": 2}
    each = {"gradient_accumulation_steps": 4, "gradient_sync": GradientSync.micro_batch}
    layouts: list[tuple[Layout, dict[str, Any]]] = [
        (Layout(), {}),
        (Layout(), accumulated),
        (Layout(dp_replicate=2), {}),
        (Layout(dp_replicate=2), accumulated),
        (Layout(dp_shard=2), {}),
        (Layout(dp_shard=2), accumulated),
        (Layout(dp_shard=2), {"zero_stage": 2}),
        (Layout(dp_shard=2), each),
        (Layout(dp_shard=2), {**each, "zero_stage": 2}),
        (Layout(dp_replicate=2, dp_shard=2), {}),
        (Layout(dp_replicate=2, dp_shard=2), each),
    ]
    configs = [
        make_config(layout, {**LARGE_HEAD, **more, **checkpointed, "model.tied": tied, **kind})
        for layout, more in layouts
        for checkpointed in ({}, FULL)
        for tied in (False, True)
        for kind in ({}, {"precision": Precision.bf16})
    ]
    for config, found in zip(configs, traced([(c, 0) for c in configs]), strict=True):
        peak = memory(Plans.of(config.model, config.layout, config.options)).peak[0]
        where = (config.layout.label, config.options)
        assert peak == pytest.approx(found.memory_bytes["peak"], rel=0.01), where
