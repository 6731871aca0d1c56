"""Causal attention: torch's fused kernel, and the same written out for reading and checking.

Shapes: B batch, N query heads, K key-value heads, T queries, S keys, H head width.
Queries are the last T of the S positions: S > T only where earlier keys come from a cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Causal attention by torch's kernel, which never holds the T x S scores. (B, N, T, H).

    On a CPU torch's low-precision backward is five times slower than its fp32 one (2.13), so that
    there only the projections around it run in low precision.
    """
    if q.device.type == "cpu" and q.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), dropout).to(q.dtype)
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


def plain(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention written out: softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, eq. 1)."""
    group = q.shape[1] // k.shape[1]  # query heads that share a key-value head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, N, T, S)
    hidden = ~causal_mask(q.shape[2], k.shape[2], q.device)
    weights = scores.float().masked_fill(hidden, -math.inf).softmax(dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S), true where a query may look: at itself and at what came before."""
    every = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return every.tril(diagonal=keys - queries)
