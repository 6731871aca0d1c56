"""What several strategies need: a labelled shard, a padded row, and two collectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# torch renames both: 2.13 warns of the old names, and 2.11 lacks the new ones
_names = vars(dist)
# whole (n S), part (S), group: every rank's part to every rank
all_gather: Callable = _names.get("all_gather_single") or dist.all_gather_into_tensor
# part (S), whole (n S), group: the sum over the ranks of each part to the rank that it is for
reduce_scatter: Callable = _names.get("reduce_scatter_single") or dist.reduce_scatter_tensor


def shard(weight: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """This rank's part of a weight; where it does not divide, the last ranks have less.

    DTensor is a label: it tells the gradient norm, the initial weights and whoever gathers them
    what is cut. Nothing in by_hand/ computes with it, but with the local tensor.
    """
    parts = weight.detach().split(-(-weight.shape[dim] // mesh.size()), dim)
    rank = mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else weight.detach().narrow(dim, 0, 0)
    part = part.clone(memory_format=torch.contiguous_format)
    shape, stride = weight.shape, weight.stride()
    return nn.Parameter(DTensor.from_local(part, mesh, [Shard(dim)], shape=shape, stride=stride))


def padded(x: Tensor, size: int) -> Tensor:
    """x as a row of `size` numbers: all messages of a collective must be of one length."""
    row = x.flatten()
    return row if len(row) == size else F.pad(row, (0, size - len(row)))
