"""From a model and a layout to a replica that trains: the only file that knows the order.

Stages are split first, for each is then a model of its own. Tensor parallel cuts the plain modules.
Activation checkpointing must see blocks that are already cut, compile must see the checkpoint, and
the data axes come last: they take weights as they are by then, and their hooks stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minigpt.config import ModelConfig
from minigpt.model import GPT, initial_value
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.context_parallel import apply_context_parallel, local_part
from parallel.ddp import apply_replicate
from parallel.layout import Options
from parallel.mesh import Mesh
from parallel.passes import MicroBatch, OneByOne, loss_and_count
from parallel.pipeline import split_model
from parallel.precision import DTYPES, autocast
from parallel.replica import Replica, as_it_is
from parallel.strategies import strategies


def parallelize(config: ModelConfig, mesh: Mesh, options: Options, seed: int) -> Replica:
    """Build the model for this rank, with the same initial weights for every layout."""
    layout, by = mesh.layout, strategies(options.impl)
    stages = split_model(config, mesh, options) if layout.pp > 1 else {0: whole_model(config)}
    for stage in stages.values():
        if layout.tp > 1:
            by.apply_tensor_parallel(stage, mesh.tensor, options.sequence_parallel)
        cuts = layout.tp if options.sequence_parallel and stage.embedding is None else 1
        if layout.cp > 1:
            apply_context_parallel(stage, mesh.group("cp"), cuts)
        elif cuts > 1:
            supply_positions(stage, cuts)
        mode = options.activation_checkpointing
        apply_activation_checkpointing(stage.blocks, mode, dropout=config.dropout > 0)
        if options.compile:
            for block in stage.blocks.values():
                block.compile()
    calls, switches, policed = zip(
        *[apply_data_axes(stage, mesh, options, seed) for stage in stages.values()], strict=True
    )

    def cast() -> AbstractContextManager:
        return nullcontext() if policed[0] else autocast(options.precision, mesh.device)

    def take(micro_batch: MicroBatch) -> MicroBatch:
        inputs, targets = (local_part(x, mesh.index("cp"), layout.cp) for x in micro_batch)
        return inputs, targets

    mine = take if layout.cp > 1 else as_it_is
    loss, spread = by.tensor_parallel_loss(mesh) if layout.tp > 1 else (loss_and_count, nullcontext)
    if layout.pp == 1:
        passes = OneByOne(calls[0], mesh.device, switches[0], cast, spread, loss)
        return Replica([stages[0]], mesh, passes, mine)
    dtype = DTYPES[options.precision] if policed[0] else torch.float32
    sequence = options.seq_len // layout.cp // (layout.tp if options.sequence_parallel else 1)
    activation = dtype, (options.micro_batch_size, sequence, config.d_model)
    pipeline = by.Pipeline(stages, mesh, options, activation, cast, spread)
    copies = frozenset({"head.weight"} if config.tied else ())
    return Replica(list(stages.values()), mesh, pipeline, mine, copies)


def whole_model(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def supply_positions(stage: GPT, cuts: int) -> None:
    """Tell a stage the positions of its tokens: it would count those of an activation's piece."""
    forward = stage.forward

    def forward_at(x: Tensor) -> Tensor:
        return forward(x, torch.arange(x.shape[1] * cuts, device=x.device))

    stage.forward = forward_at  # type: ignore[method-assign, assignment]


def apply_data_axes(
    stage: GPT, mesh: Mesh, options: Options, seed: int
) -> tuple[nn.Module, Callable[[bool], None], bool]:
    """Shard or replicate a stage and fill it.

    Returns the module to call, the switch that says whether the next backward averages gradients,
    and whether the weights have a precision policy of their own (else it is for autocast).
    """
    layout, by = mesh.layout, strategies(options.impl)
    if layout.dp_shard > 1 and options.zero_stage > 1:
        shards = mesh.data("replicate", "shard")
        assert shards is not None
        keep = options.zero_stage == 2
        switch = by.apply_fsdp(stage, stage.blocks, shards, options.precision, not keep)
        fill(stage, mesh.device, seed)
        return stage, switch, True
    replicas = mesh.data("replicate", "shard")
    if replicas is not None and (layout.pp > 1 or layout.tp > 1):
        switch = apply_replicate(stage, stage.blocks, replicas, options.precision)
        fill(stage, mesh.device, seed)
        return stage, switch, True
    fill(stage, mesh.device, seed)
    if replicas is not None:
        return *by.apply_ddp(stage, replicas, mesh.device), False
    return stage, lambda on: None, False


def fill(model: GPT, device: torch.device, seed: int) -> None:
    """Give a model on the meta device its memory and its initial weights.

    A sharded parameter is made whole on the host, one at a time, and cut: no rank ever holds the
    whole model, and the values are those of a single process.
    """
    model.to_empty(device=device)
    model.tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "head.weight" and model.config.tied:
                name = "embedding.weight"  # a stage that has the head only
            value = initial_value(name, parameter.shape, model.config, seed).to(device)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            parameter.copy_(value)
