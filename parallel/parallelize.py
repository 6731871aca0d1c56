"""From a model and a layout to a replica that trains: the only file that knows the order.

Activation checkpointing comes first (it must see the plain block), then compile (it must see the
checkpoint), then the data axes (their hooks stay outside of the compiled graph).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minigpt.config import ModelConfig
from minigpt.model import GPT, initial_value
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.ddp import apply_ddp
from parallel.fsdp import apply_fsdp
from parallel.layout import Options
from parallel.mesh import Mesh
from parallel.precision import autocast


@dataclass(frozen=True)
class Replica:
    """A model that is ready to train on this rank."""

    model: GPT  # the plain module: its parameters, under their global names
    call: nn.Module  # what to call in its place
    mesh: Mesh
    sync_gradients: Callable[[bool], None]  # thrown before the forward of each micro-batch
    autocast: Callable[[], AbstractContextManager]  # around each forward


def parallelize(config: ModelConfig, mesh: Mesh, options: Options, seed: int) -> Replica:
    """Build the model for this rank, with the same initial weights for every layout."""
    with torch.device("meta"):
        model = GPT(config)
    mode = options.activation_checkpointing
    apply_activation_checkpointing(model.blocks, mode, dropout=config.dropout > 0)
    if options.compile:
        for block in model.blocks.values():
            block.compile()

    if mesh.layout.dp_shard > 1:
        sync_gradients = apply_fsdp(model, model.blocks, mesh, options.precision)
        fill(model, mesh.device, seed)
        return Replica(model, model, mesh, sync_gradients, nullcontext)
    fill(model, mesh.device, seed)

    def cast() -> AbstractContextManager:
        return autocast(options.precision, mesh.device)

    if mesh.layout.dp_replicate > 1:
        replica, sync_gradients = apply_ddp(model, mesh)
        return Replica(model, replica, mesh, sync_gradients, cast)
    return Replica(model, model, mesh, lambda on: None, cast)


def fill(model: GPT, device: torch.device, seed: int) -> None:
    """Give a model on the meta device its memory and its initial weights.

    A sharded parameter is made whole on the host, one at a time, and cut: no rank ever holds the
    whole model, and the values are those of a single process.
    """
    model.to_empty(device=device)
    model.tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, parameter.shape, model.config, seed).to(device)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            parameter.copy_(value)
