"""Causal attention: torch's fused kernel, and who else can do it (see minigpt/by_hand/).

Shapes: B batch, N query heads, K key-value heads, T queries, S keys, H head width.
Queries are the last T of the S positions: S > T only where earlier keys come from a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.by_hand.attention import attention
from minigpt.by_hand.flash import flash_attention
from minigpt.config import Attention as Kind

SCORES_THAT_FIT = (
    512  # keys up to which bf16 on a CPU holds the scores: measured, docs/results/benchmarks.md
)


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention by torch's kernel, which never holds the T x S scores. (B, N, T, H)."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return low_precision_on_cpu(q, k, v, dropout)
    queries, keys = q.shape[2], k.shape[2]
    mask = None if queries in (keys, 1) else causal_mask(queries, keys, q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=queries == keys,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def low_precision_on_cpu(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The faster way round torch's CPU kernel, whose bf16 backward is slower than fp32's (2.13).

    While the scores are small they are two bf16 matmuls, written out; beyond, the fp32 kernel.
    """
    if k.shape[2] <= SCORES_THAT_FIT:
        return plain(q, k, v, dropout)
    with torch.autocast("cpu", enabled=False):
        return sdpa(q.float(), k.float(), v.float(), dropout).to(q.dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention written out, with torch's own softmax and dropout."""
    return attention(q, k, v, dropout, softmax=softmax_as_it_is, dropout=F.dropout)


def softmax_as_it_is(scores: Tensor) -> Tensor:
    # the dtype is named, for autocast would make it fp32; the kernel sums in fp32 anyway
    return scores.softmax(dim=-1, dtype=scores.dtype)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S), true where a query may look: at itself and at what came before."""
    every = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return every.tril(diagonal=keys - queries)


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v, dropout
ATTEND: dict[Kind, Attend] = {
    Kind.sdpa: sdpa,
    Kind.plain: plain,
    Kind.by_hand_plain: attention,
    Kind.by_hand_flash: flash_attention,
}
