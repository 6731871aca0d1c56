"""FSDP: weights, gradients and optimizer are sharded; a block's weights are gathered to be used.

With dp_replicate as well it is HSDP: shards inside a group, replicas across groups.
Bytes a step: all_gather of the weights in forward and again in backward (the root's stay gathered
between them), reduce_scatter of the gradients (Zhao et al. 2023, PyTorch FSDP; ZeRO stage 3).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import fully_shard

from parallel.layout import Precision
from parallel.mesh import Mesh
from parallel.precision import sharding_policy


def apply_fsdp(
    model: nn.Module, blocks: nn.ModuleDict, mesh: Mesh, precision: Precision
) -> Callable[[bool], None]:
    """Shard `model` in place, block by block; it may still be on the meta device.

    Returns a switch that says whether the next backward reduces gradients.
    """
    hybrid = mesh.layout.dp_replicate > 1
    axes = mesh.sub("dp_replicate", "dp_shard") if hybrid else mesh.sub("dp_shard")
    policy = sharding_policy(precision)
    for block in blocks.values():
        fully_shard(block, mesh=axes, mp_policy=policy)
    root = fully_shard(model, mesh=axes, mp_policy=policy)
    return root.set_requires_gradient_sync
