"""Context parallelism: each rank holds a part of every sequence; K and V travel round a ring.

Ring attention (Liu et al. 2023): in round i a rank attends to the keys of the rank i places before
it, while those of the next round are on their way; the parts are merged by their log-sum-exps.
A sequence is cut in 2n chunks and rank r holds chunks r and 2n-1-r, an early and a late one (Llama
3, section 3.3.2), so that causal masking leaves every rank the same work:
    keys of its own      all queries, causal: the two chunks are in ascending order
    of an earlier rank   all queries see the first half of the keys, and none of the second
    of a later rank      the second half of the queries see all keys, and the first half none
Nothing else in the model mixes positions, so embeddings, MLPs and norms need only `positions`.

Bytes: a block is the K and V of one rank, 2 B T/n K H numbers. A rank sends, per layer and
micro-batch, in messages of one block each,
    forward    (n-1) blocks of K and V, in their own dtype
    backward   (n-1) blocks of K and V, in their own dtype, and (n-1) of dK and dV, in fp32
dK and dV need no n-th message, for a block leaves home without a gradient: its owner adds its own
share to what comes back. Activation checkpointing, full or selective, sends the forward's again.

Shapes: B batch, N query heads, K key-value heads, H head width; T tokens of the whole sequence,
T/n of which are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minigpt.model import GPT
from parallel.attention_kernels import kernels_for


def local_part(x: Tensor, rank: int, size: int, dim: int = 1) -> Tensor:
    """The part of a whole (B, T) tensor that `rank` of `size` holds: chunks r and 2n-1-r of 2n."""
    if x.shape[dim] % (2 * size):
        raise ValueError(f"{x.shape[dim]} tokens: layout.cp={size} needs a multiple of {2 * size}")
    chunks = x.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def positions(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """(T/n,): where in a sequence of `length` tokens those of `rank` stand, in the order held."""
    return local_part(torch.arange(length, device=device), rank, size, dim=0)


def apply_context_parallel(model: GPT, group: dist.ProcessGroup, cuts: int = 1) -> None:
    """Make `model`, in place, take this rank's part of each sequence and give that part's logits.

    Parameters and their names stay as they are. `cuts`: in how many pieces sequence parallelism has
    cut what a pipeline stage takes, which is then shorter than this rank's part.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole, own = model.forward, partial(positions, rank=rank, size=size)

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        return ring_attention(q, k, v, group, dropout)

    def forward(x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = own(x.shape[1] * cuts * size, device=x.device)
        return whole(x, positions)

    for block in model.blocks.values():
        block.attention.attend = attend  # type: ignore[union-attr]
    model.forward = forward  # type: ignore[method-assign, assignment]


@torch.compiler.disable  # a compiled block breaks here: messages are no part of a graph
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, dropout: float = 0.0
) -> Tensor:
    """Causal attention of the queries here (B, N, T/n, H) to the keys (B, K, T/n, H) of all ranks.

    Every rank of `group` must call it, with equal shapes, and run its backward if any does.
    """
    if dropout:
        raise ValueError(f"model.dropout={dropout}: context parallelism has no attention dropout")
    return RingAttention.apply(q, torch.stack((k, v)), group)


class RingAttention(torch.autograd.Function):
    """K and V come stacked, (2, B, K, T/n, H): one message a round, and one tensor to keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, group: dist.ProcessGroup) -> Tensor:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        kernels, own_kv = kernels_for(q), kv
        # so far no key was seen: a sum of no exponentials. fp32 in any precision
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
        for step in range(size):
            next_kv = pass_on(kv, group) if step < size - 1 else None
            source = (rank - step) % size
            queries, keys = who_sees_what(rank, source, q.shape[2])
            part = kernels.forward(
                q[:, :, queries], *repeat_heads(kv[:, :, :, keys], q.shape[1]), source == rank
            )
            merge(out[:, :, queries], lse[:, :, queries], *part)
            if next_kv:
                kv = next_kv()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, own_kv, result, lse)
        ctx.group = group
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The same ring again, with gradients one round behind the K and V that they are of."""
        q, kv, out, lse = ctx.saved_tensors
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        kernels = kernels_for(q)
        dq, own_dkv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, kv))
        travelling: Callable[[], Tensor] | None = None
        for step in range(size):
            next_kv = pass_on(kv, ctx.group) if step < size - 1 else None
            source = (rank - step) % size
            queries, keys = who_sees_what(rank, source, q.shape[2])
            # out and lse are those of all keys: they make each part's weights the final ones
            dq_part, *dkv_part = kernels.backward(
                grad[:, :, queries],
                q[:, :, queries],
                *repeat_heads(kv[:, :, :, keys], q.shape[1]),
                out[:, :, queries],
                lse[:, :, queries],
                source == rank,
            )
            dq[:, :, queries] += dq_part
            dkv = own_dkv if source == rank else torch.zeros_like(own_dkv)
            dkv[:, :, :, keys] = sum_heads(dkv_part, kv.shape[2])
            if source != rank:
                if travelling:
                    dkv += travelling()
                travelling = pass_on(dkv, ctx.group)
            if next_kv:
                kv = next_kv()
        if travelling:
            own_dkv += travelling()
        return dq.to(q.dtype), own_dkv.to(kv.dtype), None


def who_sees_what(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which of the `length` queries of `rank` see keys of `source`, and which keys those are."""
    every, half = slice(0, length), length // 2
    if source < rank:
        return every, slice(0, half)
    return (slice(half, length) if source > rank else every), every


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add attention to more keys, in place: averages weighted by their sums of exponentials.

    out, part (B, N, T, H); lse, part_lse (B, N, T), natural logarithms. (Dao et al. 2022.)
    """
    share = torch.sigmoid(part_lse - lse).unsqueeze(-1)  # e^part_lse / (e^lse + e^part_lse)
    out.lerp_(part.to(out.dtype), share)
    lse.copy_(torch.logaddexp(lse, part_lse))


def repeat_heads(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """K and V with one head for each query head, here only: the wire carries the few."""
    group = heads // kv.shape[2]
    k, v = kv if group == 1 else kv.repeat_interleave(group, dim=2)
    return k, v


def sum_heads(dkv: list[Tensor], heads: int) -> Tensor:
    """The gradient of `repeat_heads`, (2, B, K, T/n, H), summed in fp32."""
    return torch.stack([x.unflatten(1, (heads, -1)).sum(2, dtype=torch.float32) for x in dkv])


def pass_on(block: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send `block` to the next rank. The result waits, and gives what the rank before sent.

    Until then `block` must not change.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    arriving = torch.empty_like(block)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size),
        ]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return arriving

    return wait
