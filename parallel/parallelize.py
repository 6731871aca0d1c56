"""From a model and a layout to a replica that trains: the only file that knows the order.

Stages are split first, for each is then a model of its own. LoRA puts its adapters beside plain
modules, fp8 takes their place, and tensor parallel cuts them. Activation checkpointing must see
blocks that are already cut, compile must see the checkpoint, and the data axes come last: they take
weights as they are by then, and their hooks stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minigpt.by_hand.cross_entropy import token_loss as token_loss_by_hand
from minigpt.config import ModelConfig, Pieces
from minigpt.lora import apply_lora
from minigpt.model import GPT, initial_value
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.context_parallel import apply_context_parallel, local_part
from parallel.ddp import apply_replicate
from parallel.experts import apply_data_axes_to_experts, apply_expert_parallel, experts_dtype
from parallel.layout import GradientSync, Impl, Options, Precision
from parallel.mesh import Mesh
from parallel.passes import Context, Loss, MicroBatch, OneByOne, Passes, loss_and_count
from parallel.pipeline import split_model
from parallel.precision import DTYPES, autocast
from parallel.replica import Replica, as_it_is
from parallel.strategies import strategies

Fill = Callable[[GPT], None]  # gives a model on the meta device its memory and its first weights


def parallelize(
    config: ModelConfig, mesh: Mesh, options: Options, seed: int, fill: Fill | None = None
) -> Replica:
    """Build the model for this rank, with the same initial weights for every layout.

    `fill` defaults to `fill_weights`; a trace, which has no memory, brings its own.
    """
    layout = mesh.layout
    fill = fill or partial(fill_weights, mesh=mesh, seed=seed)
    stages = split_model(config, mesh, options) if layout.pp > 1 else {0: whole_model(config)}
    for stage in stages.values():
        if options.finetune.on:
            apply_lora(stage, stage.blocks, options.finetune)
        if options.precision == Precision.fp8:
            from parallel.float8 import apply_float8  # a package that may not be there

            apply_float8(stage.blocks)
        apply_inside(stage, mesh, options)
    if options.impl == Impl.accelerate:
        from parallel.through_accelerate import apply_accelerate  # a package that may not be there

        whole = stages[0]
        return Replica([whole], mesh, apply_accelerate(whole, mesh, options, partial(fill, whole)))
    outside = [apply_data_axes(stage, mesh, options, fill) for stage in stages.values()]
    passes = make_passes(stages, outside, mesh, options)

    def take(micro_batch: MicroBatch) -> MicroBatch:
        inputs, targets = (local_part(x, mesh.index("cp"), layout.cp) for x in micro_batch)
        return inputs, targets

    copies = frozenset({"head.weight"} if config.tied and layout.pp > 1 else ())
    return Replica(list(stages.values()), mesh, passes, take if layout.cp > 1 else as_it_is, copies)


def apply_inside(stage: GPT, mesh: Mesh, options: Options) -> None:
    """What changes a stage's modules, before the data axes take its weights."""
    layout = mesh.layout
    if layout.tp > 1:
        by = strategies(options.impl)
        by.apply_tensor_parallel(stage, mesh.tensor, options.sequence_parallel)
    if layout.ep > 1:
        apply_expert_parallel(stage, mesh.experts, experts_dtype(mesh, options))
    cuts = layout.tp if options.sequence_parallel and stage.embedding is None else 1
    if layout.cp > 1:
        apply_context_parallel(stage, mesh.group("cp"), cuts)
    elif cuts > 1:
        supply_positions(stage, cuts)
    mode, dropout = options.activation_checkpointing, stage.config.dropout > 0
    apply_activation_checkpointing(stage.blocks, mode, dropout)
    if options.compile:
        # One graph where nothing happens between blocks: a GPU would wait for a host that starts
        # graph after graph. Static, for dynamic shapes break a block into five graphs
        alone = layout.world_size == 1 and mesh.device.type == "cuda"
        for part in [stage] if alone else stage.blocks.values():
            part.compile(dynamic=False)


def make_passes(
    stages: dict[int, GPT], outside: list[Outside], mesh: Mesh, options: Options
) -> Passes:
    """How micro-batches run: one by one, or through the stages of a pipeline."""
    layout, by, has_policy = mesh.layout, strategies(options.impl), outside[0].has_policy

    def cast() -> AbstractContextManager:
        return nullcontext() if has_policy else autocast(options.precision, mesh.device)

    config = next(iter(stages.values())).config
    loss: Loss = loss_and_count
    spread: Context = nullcontext
    if layout.tp > 1:
        loss, spread = by.tensor_parallel_loss(mesh)
    elif config.impl == Pieces.by_hand:
        loss = token_loss_by_hand
    if layout.pp == 1:
        call, sync_gradients, _ = outside[0]
        if options.compile:  # one kernel, which keeps no logits in fp32
            loss = torch.compile(loss, dynamic=False)
        return OneByOne(call, mesh.device, sync_gradients, cast, spread, loss)
    dtype = DTYPES[options.precision] if has_policy else torch.float32
    sequence = options.seq_len // layout.cp // (layout.tp if options.sequence_parallel else 1)
    activation = dtype, (options.micro_batch_size, sequence, config.d_model)
    return by.Pipeline(stages, mesh, options, activation, cast, spread)


def whole_model(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def supply_positions(stage: GPT, cuts: int) -> None:
    """Tell a stage the positions of its tokens: it would count those of an activation's piece."""
    forward = stage.forward

    def forward_at(x: Tensor) -> Tensor:
        return forward(x, torch.arange(x.shape[1] * cuts, device=x.device))

    stage.forward = forward_at  # type: ignore[method-assign, assignment]


class Outside(NamedTuple):
    """What the data axes leave of a stage."""

    call: nn.Module  # what to call in its place
    sync_gradients: Callable[[bool], None]  # whether the next backward completes the gradients
    has_policy: bool  # weights have a precision policy of their own; else it is for autocast


def apply_data_axes(stage: GPT, mesh: Mesh, options: Options, fill: Fill) -> Outside:
    """Shard or replicate a stage and fill it."""
    layout, by = mesh.layout, strategies(options.impl)
    ranks = mesh.data("replicate", "shard")
    sharded = layout.dp_shard > 1 and options.zero_stage > 1
    if ranks is not None and (sharded or layout.pp > 1 or layout.tp > 1 or layout.ep > 1):
        apply: Callable = apply_replicate
        if sharded:
            apply = partial(by.apply_fsdp, reshard_after_forward=options.zero_stage == 3)
            if options.gradient_sync != GradientSync.step:  # only torch's knows another
                apply = partial(apply, gradient_sync=options.gradient_sync)
        if layout.ep > 1:
            apply = partial(apply, leave=apply_data_axes_to_experts(stage, mesh, options))
        switch = apply(stage, stage.blocks, ranks, options.precision)
        fill(stage)
        return Outside(stage, switch, True)
    fill(stage)
    if ranks is not None:
        call, switch = by.apply_ddp(stage, ranks, mesh.device)
        return Outside(call, switch, has_policy=False)
    return Outside(stage, lambda on: None, has_policy=False)


def fill_weights(model: GPT, mesh: Mesh, seed: int) -> None:
    """Give a model on the meta device its memory and its initial weights.

    A sharded parameter is made whole on the host, one at a time, and cut: no rank ever holds the
    whole model, and the values are those of a single process.
    """
    model.to_empty(device=mesh.device)
    model.tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "head.weight" and model.config.tied:
                name = "embedding.weight"  # a stage that has the head only
            value = initial_value(name, parameter.shape, model.config, seed).to(mesh.device)
            if isinstance(parameter, DTensor):
                where = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, *where, src_data_rank=None)
            parameter.copy_(value)
