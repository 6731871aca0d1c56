"""Whole tensors out of any layout, under the names that a single process gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from minigpt.lora import is_adapter
from parallel.replica import Replica


def full_weights(replica: Replica) -> dict[str, Tensor]:
    """Every parameter, a tied head under both its names; see `gather`."""
    named = [
        pair for stage in replica.stages for pair in stage.named_parameters(remove_duplicate=False)
    ]
    return gather(replica, named)


def full_gradients(replica: Replica) -> dict[str, Tensor]:
    """Every parameter's gradient that is there; see `gather`."""
    named = replica.named_parameters()
    return gather(
        replica,
        [(name, p.grad) for name, p in named if p.grad is not None and name not in replica.copies],
    )


def whole_tensor(tensor: DTensor) -> Tensor:
    """`full_tensor()`, one mesh axis after the other, the last that cut it first.

    In one go torch does the same and warns that it could not do it in one go.
    """
    for axis in range(tensor.device_mesh.ndim):
        placements = list(tensor.placements)
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


@torch.no_grad()
def take_weights(replica: Replica, whole: Callable[[str], Tensor]) -> None:
    """Fill every parameter from `whole(name)`, one at a time; each rank cuts its part out.

    Adapters keep what they have: they are no part of a model's weights.
    """
    for name, parameter in replica.named_parameters():
        if is_adapter(name):
            continue
        value = whole(replica.stored_name(name))
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            where = parameter.device_mesh, parameter.placements
            value = distribute_tensor(value.contiguous(), *where, src_data_rank=None)
        parameter.copy_(value)


@torch.no_grad()
def gather(replica: Replica, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Each tensor whole and on the CPU, on rank 0; an empty dict on the others.

    All ranks must call it: a sharded tensor is gathered, one at a time, and then the stages of the
    first pipeline hand theirs to rank 0.
    """
    mesh = replica.mesh
    first = all(mesh.index(axis) == 0 for axis in mesh.axes if axis != "pp")
    whole = {}
    for name, tensor in named:
        full = whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor
        if first:
            whole[name] = full.detach().to("cpu", copy=True)
    if not first or mesh.layout.pp == 1:
        return whole
    stages: list = [None] * mesh.layout.pp
    group = mesh.group("pp")
    dist.gather_object(whole, stages if mesh.rank == 0 else None, group=group, group_dst=0)
    if mesh.rank:
        return {}
    return {name: tensor for stage in stages for name, tensor in stage.items()}
