"""Flash attention: the same result without ever holding the T x S scores (Dao et al. 2022).

Queries and keys are taken in tiles. For each tile of queries the keys pass by, and three numbers
run along, so that no weight must be kept: the largest score so far, the sum of the exponentials,
and the sum of the values weighted by them. When a larger score comes, both sums shrink by
e^(old - new) (Milakov and Gimelshein 2018). Tiles beyond the diagonal are never computed: half.

Backward has no weights to read, so it computes each tile's again, from q, k and the log-sum-exp of
each query. Memory: q, k, v, out and a number a query, O(T); time: five matrix products for two.
It is written for reading: a real kernel keeps its tiles in the cache of one multiprocessor.

Shapes: B batch, N heads (as many key heads as query heads), T queries, S keys, H head width.
Queries are the last T of the S positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE = 128  # queries, and keys, of a tile


def tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1], dtype=exact(q))  # (B, N, T)
        for rows in tiles(q.shape[2], size):
            result = torch.zeros_like(q[:, :, rows], dtype=lse.dtype)
            total = torch.zeros_like(lse[:, :, rows, None])
            largest = torch.full_like(total, -math.inf)
            for cols in tiles(last_key(rows, q, k), size):
                scores = scores_of(q, k, rows, cols)
                new = torch.maximum(largest, scores.amax(-1, keepdim=True))
                shrink, weights = (largest - new).exp(), (scores - new).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                result = result * shrink + weights @ v[:, :, cols].to(weights.dtype)
                largest = new
            out[:, :, rows] = result / total
            lse[:, :, rows] = (largest + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With weights P = softmax(S) and dP = dout v^T:

        dv = P^T dout,  dS = P (dP - delta),  dq = dS k / sqrt(H),  dk = dS^T q / sqrt(H)
        delta = rowsum(P dP) = rowsum(dout out): the sum over keys needs no keys (section B.2).
        """
        q, k, v, out, lse = ctx.saved_tensors
        delta = (dout * out).sum(-1, keepdim=True, dtype=lse.dtype)
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for rows in tiles(q.shape[2], ctx.size):
            q_tile, dout_tile = (x[:, :, rows].to(lse.dtype) for x in (q, dout))
            for cols in tiles(last_key(rows, q, k), ctx.size):
                k_tile, v_tile = (x[:, :, cols].to(lse.dtype) for x in (k, v))
                weights = (scores_of(q, k, rows, cols) - lse[:, :, rows, None]).exp()
                dv[:, :, cols] += weights.mT @ dout_tile
                dweights = dout_tile @ v_tile.mT
                dscores = weights * (dweights - delta[:, :, rows]) * scale
                dq[:, :, rows] += dscores @ k_tile
                dk[:, :, cols] += dscores.mT @ q_tile
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def exact(x: Tensor) -> torch.dtype:
    """What sums are kept in: fp32 for anything lower."""
    return torch.promote_types(x.dtype, torch.float32)


def last_key(rows: slice, q: Tensor, k: Tensor) -> int:
    """How many keys the last query of a tile sees."""
    return rows.stop + k.shape[2] - q.shape[2]


def scores_of(q: Tensor, k: Tensor, rows: slice, cols: slice) -> Tensor:
    """One tile of q k^T / sqrt(H) (B, N, tile, tile), -inf where a key comes after its query."""
    dtype = exact(q)
    scores = (q[:, :, rows].to(dtype) * q.shape[-1] ** -0.5) @ k[:, :, cols].to(dtype).mT
    first_query = rows.start + k.shape[2] - q.shape[2]  # among the keys
    if cols.stop > first_query + 1:  # the diagonal runs through this tile
        hidden = torch.full_like(scores[0, 0], -math.inf).triu(1 + first_query - cols.start)
        scores = scores + hidden
    return scores


def flash_attention(q: Tensor, k: Tensor, v: Tensor, drop: float = 0.0, size: int = TILE) -> Tensor:
    """Causal attention. q (B, N, T, H); k, v (B, K, S, H), K a divisor of N; returns q's shape."""
    assert drop == 0.0, "refused by ModelConfig: no weight is there to be dropped"
    if q.shape[1] > k.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    with torch.autocast(q.device.type, enabled=False):  # the sums of a tile stay exact
        return FlashAttention.apply(q, k, v, size)
