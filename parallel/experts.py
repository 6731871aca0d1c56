"""Expert parallelism: the experts of a layer are spread over ranks that read different sequences.

Each rank routes its own tokens, sends each to the rank of its expert, and gets the result back
(Lepikhin et al. 2020, GShard, section 3.2). What a rank's experts learn is from the tokens of all
ep ranks: their gradients are divided by ep as they arise, so that they are averages over those
ranks, and the data axes have to average over the other ranks only.

Payload bytes of a layer and micro-batch, all of it all_to_all over ep, from one rank of n
(shape letters as in minigpt/experts.py):
capacity   4 B E C D itemsize: dispatch and combine, and each again in backward
dropless   4 B T k D itemsize on the average of the ranks: what a rank hands over is its own
           B T k rows in dispatch and, in combine, as many as came to its experts. And 8 E of
           counts, once
Checkpointed blocks dispatch and combine again in backward: 6 in the place of 4, counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from minigpt.experts import Experts, moe_layers, on_host, place
from parallel.fsdp import cut
from parallel.gradients import local
from parallel.layout import Options
from parallel.mesh import Mesh
from parallel.precision import DTYPES, sharding_policy

Splits = list[int] | None  # rows for each rank of the group; None: equal parts


def apply_expert_parallel(
    model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None
) -> None:
    """Leave each of the `mesh`'s n ranks 1/n of every layer's experts, and let tokens travel.

    `mesh` has one axis. The model may be on the meta device; if it is not, its weights must be
    equal on all ranks. Parameters keep their names: the experts' become DTensors, Shard(0).

    `dtype`: what the experts compute in, where neither autocast nor a policy of fully_shard says
    so. All n ranks must run each forward and backward together, with equal B and T under a
    capacity.
    """
    exchange = Exchange(mesh.get_group(), mesh.size())
    for moe in moe_layers(model):
        experts, ranks = moe.config.n_expert, mesh.size()
        if experts % ranks:
            raise ValueError(
                f"model.n_expert={experts} % layout.ep={ranks} = {experts % ranks}: "
                "the experts must divide by the ranks"
            )
        for name, weight in list(moe.experts.named_parameters()):
            # no rank sends: each cuts its part out of its own copy
            sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            moe.experts.register_parameter(name, nn.Parameter(sharded, weight.requires_grad))
        moe.experts.read = partial(own_experts, ranks=mesh.size(), dtype=dtype)
        moe.exchange = exchange


def experts_dtype(mesh: Mesh, options: Options) -> torch.dtype | None:
    """Experts that no data axis takes have no policy that would cast them."""
    return DTYPES[options.precision] if mesh.expert_data() is None else None


def apply_data_axes_to_experts(
    stage: nn.Module, mesh: Mesh, options: Options
) -> frozenset[nn.Parameter]:
    """Shard or replicate experts over the data ranks that ep has left, as the rest will be.

    Returns their parameters where ep has left none: they are whole as they are.
    """
    experts = [module for module in stage.modules() if isinstance(module, Experts)]
    rest = mesh.expert_data()
    if rest is None:
        return frozenset(p for module in experts for p in module.parameters())
    policy = sharding_policy(options.precision)
    for module in experts:
        if mesh.layout.dp_shard > mesh.layout.ep:
            keep = options.zero_stage == 2
            fully_shard(
                module,
                mesh=rest,
                shard_placement_fn=cut(rest.size(-1)),
                mp_policy=policy,
                reshard_after_forward=not keep,
            )
        else:
            replicate(module, mesh=rest, mp_policy=policy)
    return frozenset()


def own_experts(weight: Tensor, ranks: int, dtype: torch.dtype | None) -> Tensor:
    """This rank's part of a weight, whose gradient is averaged over the ranks of the tokens."""
    part = AverageGradient.apply(local(weight), ranks)
    return part if dtype is None else part.to(dtype)


class AverageGradient(torch.autograd.Function):
    """x as it is, and its gradient divided by `ranks`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


@dataclass(frozen=True)
class Exchange:
    """Has rows computed by the ranks of their experts; rank i holds E/n experts from i E/n on."""

    group: dist.ProcessGroup
    ranks: int  # n

    def __call__(self, experts: Experts, x: Tensor, counts: Tensor | None) -> Tensor:
        """What Experts.forward would give if it had all the experts."""
        if counts is None:
            return self._equal(experts, x)
        return self._uneven(experts, x, counts)

    def _equal(self, experts: Experts, slots: Tensor) -> Tensor:
        """Slots (E, R, D): every rank sends every other as many, and nobody must ask."""
        E, R, D = slots.shape
        mine = E // self.ranks
        arrived = all_to_all(slots, None, None, self.group).view(self.ranks, mine, R, D)
        done = experts(arrived.transpose(0, 1).reshape(mine, self.ranks * R, D))
        back = done.view(mine, self.ranks, R, D).transpose(0, 1).reshape(E, R, D)
        return all_to_all(back, None, None, self.group)

    def _uneven(self, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (N, D) sorted by expert, `counts` (E,): the counts go first, then what they say."""
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        arriving = arriving.view(self.ranks, -1)  # (n, E/n): from each rank, for each of my experts
        sent = on_host(counts.view(self.ranks, -1).sum(1), len(rows))
        received = on_host(arriving.sum(1), len(rows))
        arrived = all_to_all(rows, sent, received, self.group)
        # they come sorted by rank, then by expert; the experts want all ranks' of one together
        mine = torch.arange(arriving.shape[1], device=rows.device).repeat(self.ranks)
        expert = mine.repeat_interleave(arriving.flatten(), output_size=sum(received))
        slot = place(expert[None])[0]
        sorted_rows = torch.empty_like(arrived).index_copy(0, slot, arrived)
        done = experts(sorted_rows, arriving.sum(0)).index_select(0, slot)
        return all_to_all(done, received, sent, self.group)


def all_to_all(x: Tensor, sent: Splits, received: Splits, group: dist.ProcessGroup) -> Tensor:
    """`sent[i]` rows of x go to rank i, `received[i]` come from it, in the order of the ranks."""
    return AllToAll.apply(x, sent, received, group)


class AllToAll(torch.autograd.Function):
    """all_to_all_single, whose gradients go back the way that the rows came."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: Splits, received: Splits, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way_back = (received, sent, group)
        rows = len(x) if received is None else sum(received)
        out = x.new_empty(rows, *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(gradient, *ctx.way_back), None, None, None
