"""Causal attention: torch's fused kernel, and the same written out for reading and checking.

Shapes: B batch, N query heads, K key-value heads, T queries, S keys, H head width.
Queries are the last T of the S positions: S > T only where earlier keys come from a cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_THAT_FIT = (
    512  # keys up to which bf16 on a CPU holds the scores: measured, docs/benchmarks.md
)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (T, H), of the angle of each pair at each position (Su et al. 2021)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * theta ** (-pairs / head_dim)  # (T, H/2)
    angles = torch.cat((angles, angles), dim=-1)  # the halves of a head are the pairs, as in Llama
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x (B, N, T, H) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


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
    """Causal attention written out: softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, eq. 1)."""
    queries, keys = q.shape[2], k.shape[2]
    if q.shape[1] > k.shape[1]:
        group = q.shape[1] // k.shape[1]  # query heads that share a key-value head
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    hidden = torch.full((queries, keys), -math.inf, dtype=q.dtype, device=q.device)
    hidden = hidden.triu(1 + keys - queries)  # what comes after a query
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + hidden  # (B, N, T, S)
    # the dtype is named, for autocast would make it fp32; the kernel sums in fp32 anyway
    weights = F.dropout(scores.softmax(dim=-1, dtype=q.dtype), dropout)
    return weights @ v


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S), true where a query may look: at itself and at what came before."""
    every = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return every.tril(diagonal=keys - queries)
