"""Scaled dot-product attention: softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, eq. 1).

Each query takes an average of the values, weighted by how well their keys fit it. The division by
sqrt(H) keeps scores of random vectors at variance 1, where the softmax still has a gradient.

Shapes: B batch, N query heads, K key-value heads, T queries, S keys, H head width.
Queries are the last T of the S positions: S > T only where earlier keys come from a cache.
The scores are N T S numbers: at long sequences they are what fills the memory. See flash.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minigpt.by_hand.dropout import dropout
from minigpt.by_hand.softmax import softmax


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drop: float = 0.0,
    padding: Tensor | None = None,
    softmax: Callable[[Tensor], Tensor] = softmax,
    dropout: Callable[[Tensor, float], Tensor] = dropout,
) -> Tensor:
    """Causal attention. q (B, N, T, H); k, v (B, K, S, H), K a divisor of N; returns q's shape.

    `drop` is the share of weights to drop. `padding` (B, S) is true where a key is no token of the
    text; a query that sees nothing else gets 0. The last two take other implementations.
    """
    if q.shape[1] > k.shape[1]:  # grouped-query attention: several query heads share a key head
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, N, T, S)
    scores = scores + causal_bias(q.shape[2], k.shape[2], q)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    return dropout(softmax(scores), drop) @ v


def causal_bias(queries: int, keys: int, like: Tensor) -> Tensor:
    """(T, S), to be added to the scores: -inf, weight 0, for what comes after a query; 0 else."""
    hidden = torch.full((queries, keys), -math.inf, dtype=like.dtype, device=like.device)
    return hidden.triu(1 + keys - queries)
