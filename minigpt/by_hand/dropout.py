"""Dropout: zero each number with probability p, and divide the others by 1 - p.

So the expected value stays what it was, and evaluation has nothing to correct (Srivastava et al.
2014, section 10, "inverted" dropout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Dropout(torch.autograd.Function):
    """x of any shape. The mask is kept for backward, a byte for each number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = torch.rand_like(x) >= p
        ctx.save_for_backward(kept)
        ctx.p = p
        return x * kept / (1 - p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """What was dropped had no part in the loss; what was scaled is scaled again."""
        (kept,) = ctx.saved_tensors
        return dy * kept / (1 - ctx.p), None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with a share `p` dropped while training; x as it is otherwise."""
    return Dropout.apply(x, p) if training and p > 0 else x
