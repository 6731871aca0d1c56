"""Multi-head attention: N attentions side by side, each in H = D / N dimensions of its own.

Shapes: B batch, T sequence, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, N H) to (B, N, T, H): the heads become a batch dimension.

    -1, not N: under tensor parallelism a rank holds only some of the heads.
    """
    B, T, _ = x.shape
    return x.view(B, T, -1, head_dim).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """(B, N, T, H) to (B, T, N H): each token gets its own results of all heads, side by side.

    Without the transpose the shape is the same and the content is not: a row would hold one head's
    results for several tokens, later ones among them.
    """
    B, _, T, _ = y.shape
    return y.transpose(1, 2).reshape(B, T, -1)


def multi_head_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    heads: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """x (B, T, D) to (B, T, D), with weights (D, D) (Vaswani et al. 2017, section 3.2.2)."""
    head_dim = x.shape[-1] // heads
    parts = (split_heads(F.linear(x, weight), head_dim) for weight in (q, k, v))
    return F.linear(merge_heads(attend(*parts)), out)
