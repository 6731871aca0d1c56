"""Traces with the kernels of a GPU, and the closed forms of memory beside them."""

from __future__ import annotations

from typing import Any

import pytest

from costs.program import Work
from experiments.config import TrainConfig
from experiments.figures.agreement import traced
from experiments.figures.parity import make_config
from parallel.layout import (
    ActivationCheckpointing,
    Layout,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from simulator.memory import memory
from simulator.plans import Plans
from simulator.trace import Traced

pytestmark = pytest.mark.slow

FULL: dict[str, Any] = {"activation_checkpointing": ActivationCheckpointing.full}
EIGHT: dict[str, Any] = {"gradient_accumulation_steps": 8}
GPIPE: dict[str, Any] = {"pipeline": PipelineConfig(PipelineSchedule.gpipe)}
# Llama's shapes in small: weights, logits and activations are each a part of the memory
LLAMA: dict[str, Any] = {
    "model.norm": "rmsnorm",
    "model.n_layer": 8,
    "model.d_model": 256,
    "model.n_head": 8,
    "model.n_kv_head": 2,
    "model.vocab_size": 4096,
    "data.vocab_size": 4096,
    "model.context": 1024,
    "seq_len": 1024,
    "precision": Precision.bf16,
    "clip": 1.0,
}
WIDE: dict[str, Any] = {"model.d_model": 1024, "seq_len": 256}
PLANS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "fsdp": (Layout(dp_shard=8), {}),
    "fsdp, full": (Layout(dp_shard=8), {**FULL, **WIDE}),
    "tp": (Layout(tp=2), {}),
    "tp, sequence": (Layout(tp=2), {"sequence_parallel": True}),
    "tp and fsdp, full": (Layout(tp=2, dp_shard=2), {**FULL, **WIDE}),
    "tp and fsdp, micro-batches": (Layout(tp=2, dp_shard=2), EIGHT),
    "cp and fsdp": (Layout(cp=2, dp_shard=2), {}),
    "pp and fsdp": (Layout(pp=2, dp_shard=2), {**EIGHT, **WIDE}),
    "pp and fsdp, gpipe": (Layout(pp=2, dp_shard=2), {**EIGHT, **WIDE, **GPIPE}),
    "pp, fsdp and tp": (Layout(pp=2, dp_shard=2, tp=2), {**EIGHT, "model.n_layer": 4}),
    "pp, fsdp and tp, full": (Layout(pp=2, dp_shard=2, tp=2), {**EIGHT, **FULL, **WIDE}),
}
Found = dict[str, list[tuple[TrainConfig, int, Traced]]]


@pytest.fixture(scope="module")
def found() -> Found:
    """By plan, of the first rank of each stage: its config, its place, its trace."""
    configs = {
        name: make_config(layout, {**LLAMA, **more}) for name, (layout, more) in PLANS.items()
    }
    for config in configs.values():
        config.micro_batch_size = 1
    jobs = [
        (name, config, place)
        for name, config in configs.items()
        for place in range(config.layout.pp)
    ]
    traces = traced(
        [(c, place * (c.layout.world_size // c.layout.pp)) for _, c, place in jobs], gpu=True
    )
    made: Found = {}
    for (name, config, place), one in zip(jobs, traces, strict=True):
        made.setdefault(name, []).append((config, place, one))
    return made


@pytest.mark.parametrize("name", PLANS)
def test_every_stage_is_as_full_as_the_closed_form(found: Found, name: str) -> None:
    for config, place, one in found[name]:
        plans = Plans.of(config.model, config.layout, config.options)
        formula = memory(plans, place).peak[0]
        assert formula == pytest.approx(one.memory_bytes["peak"], rel=0.05), place


@pytest.mark.parametrize("name", PLANS)
def test_attention_is_in_the_dtype_of_products_and_a_norm_is_one_kernel(
    found: Found, name: str
) -> None:
    for config, place, one in found[name]:
        works = [event for event in one.program if isinstance(event, Work)]
        attention = [work for work in works if "scaled_dot_product" in work.name]
        assert attention and {work.dtype for work in attention} == {"bfloat16"}
        forward = [work for work in works if work.phase == "forward"]
        norms = sum(work.name == "worldsize.rms_norm" for work in forward)
        last = place == config.layout.pp - 1
        of_blocks = 2 * config.model.n_layer // config.layout.pp
        assert norms == config.gradient_accumulation_steps * (of_blocks + last)
        assert not any("rsqrt" in work.name for work in works)
