"""Plans that nobody thought of: any layout of four ranks, with any options that it takes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from experiments.parity import Plan
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    Impl,
    Layout,
    PipelineConfig,
    PipelineSchedule,
)
from parallel.rules import of_size

LAYOUTS = [layout for layout in of_size(Layout(dp_replicate=4))]
CHECKPOINTING = [mode for mode in ActivationCheckpointing if mode.value != "offload"]
TRIES = 20
Changes = dict[str, Any]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """One plan that the rules let pass."""
    for _ in range(TRIES):
        layout = draw(st.sampled_from(LAYOUTS))
        changes = {**draw(models()), **draw(ways(layout))}
        if changes["model.ffn"] == "moe":
            changes |= draw(experts())
            layout = Layout(*layout.sizes, ep=draw(st.sampled_from([1, 2, 4])))
        plan = Plan(written(layout, changes), layout, changes)
        with suppress(ValueError):
            plan.config({"steps": 1})
            return plan
    assume(False)
    raise AssertionError


def models() -> st.SearchStrategy[Changes]:
    return st.fixed_dictionaries(
        {
            "model.n_layer": st.sampled_from([4, 8]),
            "model.n_kv_head": st.sampled_from([None, 1, 2, 4]),
            "model.ffn": st.sampled_from(["swiglu", "gelu", "swiglu", "moe"]),
            "model.norm": st.sampled_from(["rmsnorm", "layernorm"]),
            "model.positions": st.sampled_from(["rotary", "learned", "sinusoidal"]),
            "model.bias": st.booleans(),
            "model.tied": st.booleans(),
            "data.ragged": st.booleans(),
            "clip": st.sampled_from([None, 0.5]),
        }
    )


def experts() -> st.SearchStrategy[Changes]:
    return st.fixed_dictionaries(
        {
            "model.n_expert": st.sampled_from([4, 8]),
            "model.d_ff": st.just(64),
            "model.capacity_factor": st.sampled_from([None, 1.0]),
            "model.balance": st.sampled_from([0.0, 1.0]),
        }
    )


def ways(layout: Layout) -> st.SearchStrategy[Changes]:
    """How the layout is run: only what could make a difference on its axes."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "gradient_accumulation_steps": st.sampled_from([4, 8] if layout.pp > 1 else [1, 2, 4]),
        "activation_checkpointing": st.sampled_from(CHECKPOINTING),
    }
    if layout.dp_shard > 1:
        choices["zero_stage"] = st.sampled_from([1, 2, 3])
    if layout.tp > 1:
        choices["sequence_parallel"] = st.booleans()
    if layout.pp > 1:
        split = st.sampled_from([None, None, [3, 1]])
        choices["pipeline"] = st.builds(
            PipelineConfig, st.sampled_from(PipelineSchedule), st.none(), split
        )
    if max(layout.sizes) == 4:  # one axis: it is written by hand too
        choices["impl"] = st.sampled_from([Impl.torch, Impl.torch, Impl.by_hand])
    return st.fixed_dictionaries(choices)


def written(layout: Layout, changes: Changes) -> str:
    """The plan as it is written on the command line."""
    axes = [f"layout.{axis}={getattr(layout, axis)}" for axis in (*MESH_AXES, "ep")]
    chosen = {key: getattr(value, "value", value) for key, value in changes.items()}
    pipeline = chosen.pop("pipeline", None)
    if pipeline:
        chosen["pipeline.schedule"] = pipeline.schedule.value
        chosen["pipeline.split"] = pipeline.split
    said = [f"{key}={'null' if value is None else value}" for key, value in chosen.items()]
    return " ".join([*(axis for axis in axes if not axis.endswith("=1")), *said])
