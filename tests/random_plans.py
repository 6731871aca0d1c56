"""Plans that nobody thought of: any layout of four ranks, with any options that it takes."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from experiments.figures.parity import Plan
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    Impl,
    Layout,
    PipelineConfig,
    PipelineSchedule,
)
from parallel.rules import of_size

LAYOUTS = list(of_size(Layout(dp_replicate=4)))
Changes = dict[str, Any]
MODELS: dict[str, list[Any]] = {
    "model.n_layer": [4, 4, 8],
    "model.n_kv_head": [None, 1, 2, 4],
    "model.ffn": ["swiglu", "gelu", "swiglu", "moe"],
    "model.norm": ["rmsnorm", "layernorm"],
    "model.positions": ["rotary", "learned", "sinusoidal"],
    "model.bias": [False, True],
    "model.tied": [False, True],
    "data.ragged": [False, True],
    "clip": [None, 0.5],
}
EXPERTS: dict[str, list[Any]] = {
    "model.ffn": ["moe"],
    "model.n_expert": [4, 8],
    "model.d_ff": [64],
    "model.capacity_factor": [None, 1.0],
    "model.balance": [0.0, 1.0],
}
SMALL: Changes = {"model.d_model": 32}
CHECKPOINTING = [ActivationCheckpointing(mode) for mode in ("none", "selective", "full")]


def random_plan(random: Random) -> Plan:
    """One plan that the rules let pass. Only options are drawn again, so that layouts are even."""
    layout, has_experts = random.choice(LAYOUTS), random.random() < 0.3
    if has_experts and layout.tp == layout.cp == 1 and layout.data_parallel > 1:
        ranks = layout.dp_shard if layout.dp_shard > 1 else layout.dp_replicate
        layout = replace(layout, ep=random.choice([n for n in (2, 4) if ranks % n == 0]))
    while True:
        changes = {**SMALL, **one_of(MODELS, random), **one_of(ways(layout), random)}
        if layout.ep > 1 or changes["model.ffn"] == "moe":
            changes |= one_of(EXPERTS, random)
        plan = Plan(written(layout, changes), layout, changes)
        try:
            plan.config({})
        except ValueError:
            continue
        return plan


def one_of(choices: dict[str, list[Any]], random: Random) -> Changes:
    return {key: random.choice(values) for key, values in choices.items()}


def ways(layout: Layout) -> dict[str, list[Any]]:
    """How a layout can be run: only what makes a difference on its axes."""
    choices: dict[str, list[Any]] = {
        "gradient_accumulation_steps": [4, 8] if layout.pp > 1 else [1, 2, 4],
        "activation_checkpointing": CHECKPOINTING,
    }
    if layout.dp_shard > 1:
        choices["zero_stage"] = [1, 2, 3]
        choices["gradient_sync"] = list(GradientSync)
    if layout.tp > 1:
        choices["sequence_parallel"] = [False, True]
    if layout.pp > 1:
        choices["pipeline"] = [
            PipelineConfig(schedule, split=split)
            for schedule in PipelineSchedule
            for split in (None, [3, 1], [1, 2, 2, 3])
        ]
    if max(layout.sizes) == 4:  # one axis alone: that is written by hand too
        choices["impl"] = [Impl.torch, Impl.torch, Impl.by_hand]
    return choices


def written(layout: Layout, changes: Changes) -> str:
    """The plan as it is written on the command line."""
    sizes = {f"layout.{axis}": getattr(layout, axis) for axis in (*MESH_AXES, "ep")}
    chosen = {key: getattr(value, "value", value) for key, value in changes.items()}
    pipeline = chosen.pop("pipeline", None)
    if pipeline:
        chosen |= {
            "pipeline.schedule": pipeline.schedule.value,
            "pipeline.split": pipeline.split,
        }
    said = {**{axis: size for axis, size in sizes.items() if size > 1}, **chosen}
    return " ".join(f"{key}={'null' if value is None else value}" for key, value in said.items())
