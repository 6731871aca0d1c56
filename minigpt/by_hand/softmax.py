"""Softmax over the last dimension, with its backward: p_i = e^x_i / sum_j e^x_j.

e^x overflows fp32 at x = 89, so the largest x is taken off first: that changes no ratio.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Softmax(torch.autograd.Function):
    """x (..., S) to p (..., S). A row that is -inf all over has nothing to choose: it gives 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        largest = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
        p = (x - largest).exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=1)  # the largest adds e^0 = 1, if there is one
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> Tensor:
        """dp_i/dx_j = p_i (1[i = j] - p_j), so dx_j = p_j (dp_j - sum_i p_i dp_i).

        Only p is needed, never x: that is all that forward keeps.
        """
        (p,) = ctx.saved_tensors
        return p * (dp - (p * dp).sum(-1, keepdim=True))


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return Softmax.apply(x)
