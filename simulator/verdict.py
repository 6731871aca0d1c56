"""One line on a simulated step: does it fit, what dominates, what to change first."""

from __future__ import annotations

from typing import Any

from costs.ledger import step_of
from parallel.layout import ActivationCheckpointing, GradientSync, Layout, Options

MUCH = 0.15  # of a step: worth changing something for
ROOM = 0.5  # of the memory: so much is free that less recomputation may fit
GB = 1e9  # as all that is printed beside it


def verdict(
    steps: list[dict[str, Any]], layout: Layout, options: Options, memory_bytes: float
) -> str:
    """`memory_bytes`: of the device."""
    step = step_of(steps)
    peak = step["memory_bytes"]["peak"]
    gap = abs(memory_bytes - peak) / GB
    if peak > memory_bytes:
        return f"does not fit, by {gap:.1f} GB: {_fullest(step, layout, options)}"
    said = f"fits, with {gap:.1f} GB to spare"
    if step["time_s"]["total"] is None:
        return said
    return f"{said}; {_slowest(step, layout, options, peak / memory_bytes)}"


def _fullest(step: dict[str, Any], layout: Layout, options: Options) -> str:
    """What fills the memory, and what to change first."""
    parts = {k: v for k, v in step["memory_bytes"].items() if k != "peak"}
    name = max(parts, key=lambda part: parts[part])
    share = f"{name} are {100 * parts[name] / step['memory_bytes']['peak']:.0f} % of it"
    if name == "activations":
        none = options.activation_checkpointing == ActivationCheckpointing.none
        if none:
            change = "activation_checkpointing=selective, then full"
        elif options.micro_batch_size > 1:
            change = "a smaller micro_batch_size with more gradient_accumulation_steps"
        else:
            change = "more layout.tp with sequence_parallel=true, or layout.cp"
    elif layout.dp_shard == 1 and layout.dp_replicate > 1:
        change = "layout.dp_shard in the place of layout.dp_replicate"
    elif layout.dp_shard > 1 and options.zero_stage < 3:
        change = "zero_stage=3"
    elif options.gradient_sync == GradientSync.step and options.may_scatter_each(layout):
        change = "gradient_sync=micro_batch, which keeps no whole gradients"
    else:
        change = "more layout.dp_shard, layout.tp or layout.pp"
    return f"{share}; first try {change}"


def _slowest(step: dict[str, Any], layout: Layout, options: Options, filled: float) -> str:
    """What the time goes to, and what to change first."""
    time_s = step["time_s"]
    shares = {k: (v or 0.0) / time_s["total"] for k, v in time_s.items() if k != "total"}
    lost = {k: v for k, v in shares.items() if k != "compute"}
    name = max(lost, key=lambda part: lost[part])
    recomputes = options.activation_checkpointing != ActivationCheckpointing.none
    if lost[name] < MUCH:
        said = f"compute dominates ({100 * shares['compute']:.0f} % of the step)"
        if recomputes and filled < ROOM:
            return f"{said}; first try less activation_checkpointing, for memory is free"
        return said
    said = f"{name.replace('_', ' ')} takes {100 * lost[name]:.0f} % of the step"
    if name == "bubble":
        several = options.pipeline.local_stages > 1
        change = "more gradient_accumulation_steps" + (
            "" if several else ", or pipeline.schedule=interleaved_1f1b"
        )
    elif name == "exposed_communication":
        rows = step["communication"]
        axis = max(rows, key=lambda row: row["time_s"] or 0.0)["axis"] if rows else "its"
        change = f"fewer ranks on {axis}, or a larger micro_batch_size"
    else:
        change = "more layout.dp_shard" if name == "optimizer" else "a larger micro_batch_size"
    return f"{said}; first try {change}"
