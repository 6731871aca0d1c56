"""What is said of a run that will train, and waste time or memory. No torch."""

from __future__ import annotations

import math

from experiments.config import TrainConfig
from experiments.outside_text import complain
from minigpt.config import Source
from minigpt.finetune import FinetuneConfig
from parallel.layout import ActivationCheckpointing, GradientSync, PipelineConfig


def warn(config: TrainConfig, nodes: int = 1) -> None:
    """Say on standard error what will train, and waste time or memory."""
    layout, ranks = config.layout, config.layout.world_size // nodes
    if nodes > 1 and layout.leaves_node("tp", ranks):
        inside = math.gcd(layout.tp, ranks)
        warning(
            f"layout.tp={layout.tp} crosses nodes of {ranks} ranks, so that every block waits for "
            f"the network; layout.tp={inside} would stay inside"
        )
    if config.zero_stage < 3 and layout.dp_shard == 1:
        warning(f"zero_stage={config.zero_stage}: changes nothing, for layout.dp_shard is 1")
    each = config.gradient_sync == GradientSync.micro_batch
    if each and config.gradient_accumulation_steps == 1:
        warning("gradient_sync=micro_batch: changes nothing, for a step has one micro-batch")
    if layout.pp == 1 and config.pipeline != PipelineConfig():
        warning("pipeline: its keys change nothing, for layout.pp is 1")
    if config.finetune != FinetuneConfig() and not config.finetune.on:
        warning("finetune: its keys change nothing without finetune=lora")
    if config.data.path and config.data.source != Source.text:
        warning(f"data.path: data={config.data.source.value} reads no file; data=text does")
    again = config.activation_checkpointing == ActivationCheckpointing.full
    if again and layout.pp > 1 and config.pipeline.splits_backward:
        warning(
            f"activation_checkpointing=full: {config.pipeline.schedule.value} computes gradients "
            "of weights apart, and for each weight torch runs its block again and keeps half of "
            "it: more memory than without; 1f1b, or activation_checkpointing=none, needs less"
        )


def warning(line: str) -> None:
    complain(f"warning: {line}")
