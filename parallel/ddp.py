"""DDP: every rank holds the whole model and a share of the batch; gradients are averaged.

Bytes a step: one all_reduce of every gradient, 4 P in fp32 (Li et al. 2020, PyTorch Distributed).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from parallel.layout import Precision
from parallel.precision import sharding_policy


def apply_ddp(
    model: nn.Module, mesh: DeviceMesh, device: torch.device
) -> tuple[nn.Module, Callable[[bool], None]]:
    """Wrap `model` over a mesh; its weights must be filled, plain, and equal on all ranks.

    Returns the module to call, and a switch that says whether the next backward averages gradients.
    The gradients are views of the buckets, so that they exist once.
    """
    replica = DistributedDataParallel(
        model,
        process_group=mesh.get_group(),
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )

    def sync_gradients(on: bool) -> None:
        # no_sync() as a switch. It must be thrown before the forward: DDP decides there.
        replica.require_backward_grad_sync = on

    return replica, sync_gradients


def apply_replicate(
    model: nn.Module,
    blocks: nn.ModuleDict,
    mesh: DeviceMesh,
    precision: Precision,
    leave: frozenset[nn.Parameter] = frozenset(),
) -> Callable[[bool], None]:
    """The same for weights that tp has cut, and for stages of a pipeline: in place, block by block.

    The DDP wrapper is wrong there: it takes the local part of a DTensor for the whole, and most
    pipeline schedules run into an assertion of its reducer. `leave`: parameters that are not to be
    averaged. Returns the same switch.
    """
    policy = sharding_policy(precision)
    for block in blocks.values():
        replicate(block, mesh=mesh, mp_policy=policy, ignored_params=set(leave))
    root = replicate(model, mesh=mesh, mp_policy=policy, ignored_params=set(leave))
    return root.set_requires_gradient_sync
