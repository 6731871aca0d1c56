"""FSDP: weights, gradients and optimizer are sharded; a block's weights are gathered to be used.

With replicas as well it is HSDP: shards inside a group, replicas across groups.
Bytes a step: all_gather of the weights in forward and, where they are given up in between, again in
backward (the root's stay gathered), reduce_scatter of the gradients (Zhao et al. 2023, PyTorch
FSDP; ZeRO stage 3). Stage 2 keeps the gathered weights from forward to backward. Several
micro-batches scatter gradients once, which keeps whole ones until then, or each its own
(gradient_sync); replicas add up theirs once either way.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from parallel.gradients import local
from parallel.layout import GradientSync, Precision
from parallel.precision import sharding_policy


def apply_fsdp(
    model: nn.Module,
    blocks: nn.ModuleDict,
    mesh: DeviceMesh,
    precision: Precision,
    reshard_after_forward: bool = True,
    leave: frozenset[nn.Parameter] = frozenset(),
    gradient_sync: GradientSync = GradientSync.step,
) -> Callable[[bool], None]:
    """Shard `model` in place, block by block; it may still be on the meta device.

    `mesh`: the ranks that share the weights, with replicas as a first dimension where there are
    some. `leave`: parameters that are not to be sharded. Returns a switch that says whether the
    next backward is the last one, which completes the gradients.
    """
    policy = sharding_policy(precision)
    for block in blocks.values():
        fully_shard(
            block,
            mesh=mesh,
            shard_placement_fn=cut(mesh.size(-1)),
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            ignored_params=set(leave),
        )
    root = fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(leave))
    if gradient_sync == GradientSync.step:
        return root.set_requires_gradient_sync
    return root.set_requires_all_reduce


def cut(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """How `ranks` share a weight: by its first dimension, as fully_shard does by itself.

    It fills that up to a multiple of `ranks`, and gathers what fills: of 8 experts among 64 ranks
    seven eighths. Where experts are fewer than ranks, each is cut across.
    """

    def placement(weight: nn.Parameter) -> Shard | None:
        shape = local(weight).shape
        across = len(shape) == 3 and shape[0] < ranks and shape[1] % ranks == 0
        return Shard(1) if across else None

    return placement
