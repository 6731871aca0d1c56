"""Tensor parallelism by hand: every matrix is cut, and all ranks work on every token.

In Y = act(X A) B cut A by columns and B by rows: rank i computes act(X A_i) B_i alone, and the sum
over the ranks is Y (Shoeybi et al. 2019, Megatron-LM, section 3). Attention is such a pair, with
heads as columns, and so is the MLP. Two conjugate operators are all the communication:

    f   at the entrance   forward: nothing       backward: all_reduce
    g   at the exit       forward: all_reduce    backward: nothing

Sequence parallelism also cuts what lies between the pairs (norms, dropout, residuals), along the
sequence: f becomes an all_gather and g a reduce_scatter, each the other's backward, for the same
bytes on the wire as an all_reduce (Korthikanti et al. 2022, section 4.2).
Embedding, head and loss are cut along the vocabulary: no rank ever holds logits of all of it.

Payload of a micro-batch, L layers, fp32:       without          with sequence parallelism
    all_reduce, f and g of activations     4 (4 L + 2) B T D    4 B T D, of the embedding
    all_gather                                                  4 (4 L + 2) B T D
    reduce_scatter                                              4 (4 L + 1) B T D
    all_reduce of the loss                     12 B T           12 B T
    all_reduce of gradients                                     4 a weight of norms, and of biases
                                                                behind g
Full activation checkpointing runs each block's first g again, 4 L B T D more (the second comes
after all that backward needs), and with sequence parallelism both f: 8 L B T D of all_gather.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minigpt.model import GPT
from parallel.by_hand import primitives
from parallel.by_hand.cut_layers import (
    ColumnParallel,
    Operator,
    RowParallel,
    VocabularyParallelEmbedding,
)
from parallel.tensor_parallel import hide_columns, with_own_masks

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


class Conjugate(torch.autograd.Function):
    """One collective forward, and its conjugate on the gradient."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, forward: Collective, backward: Collective, x: Tensor
    ) -> Tensor:
        ctx.conjugate, ctx.group = backward, group
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, ctx.conjugate(gradient, ctx.group)


def nothing(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts (B, T/n, D) of a sequence to the whole; a collective joins the first dimension."""
    part = x.transpose(0, 1).contiguous()
    whole = part.new_empty(len(part) * dist.get_world_size(group), *part.shape[1:])
    primitives.all_gather(whole, part, group=group)
    return whole.transpose(0, 1)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part (B, T/n, D) of the sum over ranks."""
    whole = x.transpose(0, 1).contiguous()
    part = whole.new_empty(len(whole) // dist.get_world_size(group), *whole.shape[1:])
    primitives.reduce_scatter(part, whole, group=group)
    return part.transpose(0, 1)


def own_part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part (B, T/n, D) of what all ranks have."""
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()


def apply_tensor_parallel(model: GPT, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut `model`, which is whole and may be on the meta device, over a mesh of one dimension."""
    conjugate = partial(partial, Conjugate.apply, mesh.get_group())
    f, g = conjugate(nothing, all_reduce), conjugate(all_reduce, nothing)
    enter, leave, of_copy = f, g, as_it_is
    if sequence_parallel:
        enter, leave = conjugate(all_gather, reduce_scatter), conjugate(reduce_scatter, all_gather)
        of_copy = f  # a copy sees a part of the tokens only: f adds its gradients up
        before(model.dropout, conjugate(own_part, all_gather))
        for norm in [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]:
            norm.register_forward_pre_hook(partial(read_through, f))
    gpt: Any = model  # whose layers are exchanged for others of the same names
    for block in gpt.blocks.values():
        for parent, wide, narrow in (
            (block.attention, ("q", "k", "v"), "out"),
            (block.mlp, ("gate", "up"), "down"),
        ):
            before(parent, enter)  # once for all that read it: their gradients are added up first
            for name in wide:
                if getattr(parent, name) is not None:
                    setattr(parent, name, ColumnParallel(getattr(parent, name), mesh))
            setattr(parent, narrow, RowParallel(getattr(parent, narrow), mesh, leave, of_copy))
        if model.config.dropout and not sequence_parallel:
            block.attention.attend = with_own_masks(block.attention.attend, mesh.get_local_rank())
    gpt.embedding = VocabularyParallelEmbedding(gpt.embedding, mesh, g)
    gpt.head = ColumnParallel(gpt.head, mesh)  # its logits stay cut
    before(gpt.head, enter)
    if model.hide_padding is not None:
        model.hide_padding = partial(hide_columns, model.config, mesh.get_local_rank())
    gpt.tie()  # both are cut by rows alike


def as_it_is(x: Tensor) -> Tensor:
    return x


def before(module: nn.Module, operator: Operator) -> None:
    """Apply `operator` to what the module is called with."""
    module.register_forward_pre_hook(lambda _, inputs: (operator(inputs[0]), *inputs[1:]))


def read_through(operator: Operator, module: nn.Module, _inputs: object) -> None:
    """Make the module read its weights through `operator`, this time: an attribute of an instance
    hides the parameter of the same name."""
    for name, weight in module.named_parameters(recurse=False):
        module.__dict__[name] = operator(weight)
