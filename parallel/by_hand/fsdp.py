"""FSDP by hand: each rank keeps 1/n of every weight, and a block is whole only while it computes.

    forward    all_gather a block's weights, compute, free them
    backward   all_gather them again, compute, free them, reduce_scatter their gradients

so that beside its shards of weights, gradients and optimizer state a rank holds one whole block
(Zhao et al. 2023, PyTorch FSDP; ZeRO stage 3, Rajbhandari et al. 2020, section 5.3). What is in no
block (embedding, last norm, head) is used first and last, and stays gathered.

Bytes, in weights padded to a multiple of n in the first dimension: all_gather 4 (2 blocks + rest)
each micro-batch, or 4 (blocks + rest) where blocks stay gathered (`reshard_after_forward=False`);
reduce_scatter 4 (blocks + rest) once a step. A ring sends (n-1)/n of each.
Not shown: the next block's all_gather while this one computes, which hides the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.by_hand.primitives import all_gather, padded, reduce_scatter, shard
from parallel.gradients import local
from parallel.layout import Precision


def apply_fsdp(
    model: nn.Module,
    blocks: nn.ModuleDict,
    mesh: DeviceMesh,
    precision: Precision,
    reshard_after_forward: bool = True,
) -> Callable[[bool], None]:
    """Shard `model` in place, block by block; it may still be on the meta device.

    Returns a switch that says whether the next backward reduces gradients.
    """
    units = [Unit(block, mesh, keep=not reshard_after_forward) for block in blocks.values()]
    units.append(Unit(model, mesh, keep=True))  # takes what no block has taken

    def sync_gradients(on: bool) -> None:
        for unit in units:
            unit.sync = on

    return sync_gradients


class Unit:
    """Weights that are gathered and freed together."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh, keep: bool) -> None:
        self.group, self.ranks, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.keep, self.sync = keep, True
        self.pending: list[Tensor] = []  # whole gradients of micro-batches that did not reduce
        self.places = unsharded(module)
        self.lengths: list[int] = []  # of each weight's first dimension
        self.buffers: list[Tensor] = []  # each weight whole and padded; without memory when free
        for places in self.places:
            weight = shard(getattr(*places[0]), mesh, 0)  # which still says the whole's shape
            for owner, name in places:
                owner.register_parameter(name, weight)
            self.lengths.append(len(weight))
            rows = -(-len(weight) // self.ranks) * self.ranks
            self.buffers.append(torch.empty(rows, *weight.shape[1:], device=mesh.device_type))
        self.sizes = [buffer.numel() // self.ranks for buffer in self.buffers]  # of shards
        self.free()
        module.register_forward_pre_hook(self.before_forward)
        module.register_forward_hook(self.after_forward)

    def shards(self) -> list[Tensor]:
        """This rank's part of each weight, of `sizes` numbers at most."""
        return [local(owner._parameters[name]) for (owner, name), *_ in self.places]  # type: ignore

    def before_forward(self, *_: object) -> None:
        """Put whole weights where the modules look for them.

        An attribute of an instance hides the parameter of the same name: optimizer and checkpoints
        go on seeing shards. It stays after forward, without memory, for recomputation to find.
        """
        for places, weight in zip(self.places, Gather.apply(self, *self.shards()), strict=True):
            for owner, name in places:
                owner.__dict__[name] = weight

    def after_forward(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        if self.keep and torch.is_grad_enabled():
            return
        self.free()
        if output.requires_grad:
            output.register_hook(self.refill)  # before the first operator of the block's backward

    def refill(self, _gradient: Tensor | None = None) -> None:
        """all_gather into the storages that autograd remembers: what it saved is right again."""
        flat = self.buffers[0].new_empty(self.ranks * sum(self.sizes))
        rows = flat.view(self.ranks, -1)  # one from each rank; this rank's is there already
        torch.cat(list(map(padded, self.shards(), self.sizes)), out=rows[self.rank])
        all_gather(flat, rows[self.rank], group=self.group)
        for buffer, parts in zip(self.buffers, rows.split(self.sizes, dim=1), strict=True):
            buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
            buffer.view(self.ranks, -1).copy_(parts)

    def free(self) -> None:
        """Give the memory of the whole weights back."""
        for buffer in self.buffers:
            buffer.untyped_storage().resize_(0)

    def reduce(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """reduce_scatter: the mean over the ranks of this rank's shard of each gradient."""
        if self.pending:
            gradients = torch._foreach_add(gradients, self.pending)  # type: ignore[assignment]
        self.pending = [] if self.sync else gradients
        if not self.sync:
            return [None] * len(gradients)
        whole = [buffer.numel() for buffer in self.buffers]
        rows = [part.view(self.ranks, -1) for part in map(padded, gradients, whole)]
        flat = torch.cat(rows, dim=1).div_(self.ranks).flatten()  # row i is for rank i
        mine = flat.new_empty(sum(self.sizes))
        reduce_scatter(mine, flat, group=self.group)
        parts = zip(mine.split(self.sizes), self.shards(), strict=True)
        return [part[: own.numel()].view_as(own) for part, own in parts]


class Gather(torch.autograd.Function):
    """Shards to whole weights; backward, once a block has all its gradients, the way back."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        unit.refill()
        # .data: with a version of its own, or autograd would take the refill for a change
        weights = zip(unit.buffers, unit.lengths, strict=True)
        return tuple(buffer.data[:length] for buffer, length in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        ctx.unit.free()
        return None, *ctx.unit.reduce(list(gradients))


def unsharded(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places (module, name) of each parameter that is not yet sharded; a tied one has two."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                places.setdefault(parameter, []).append((module, name))
    return list(places.values())
