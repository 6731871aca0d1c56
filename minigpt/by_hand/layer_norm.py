"""LayerNorm: each token's vector is given mean 0 and variance 1 (Ba et al. 2016).

xhat = (x - mean) / sqrt(variance + eps)        y = xhat w + b
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LayerNorm(torch.autograd.Function):
    """x (..., D), weight (D,), bias (D,) or None. Kept: x, and two numbers a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)  # by D, not D - 1
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        y = (x - mean) * rstd * weight
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """x reaches y on three ways: by itself, through the mean, and through the variance.

        With g = dy w, the last two take off what a shift and a stretch of x cannot change:
            dx = rstd (g - mean(g) - xhat mean(g xhat))
        """
        x, weight, mean, rstd = ctx.saved_tensors
        xhat = (x - mean) * rstd
        g = dy * weight
        shift = g.mean(-1, keepdim=True)
        stretch = (g * xhat).mean(-1, keepdim=True)
        tokens = tuple(range(x.ndim - 1))
        dbias = dy.sum(tokens) if ctx.has_bias else None
        return rstd * (g - shift - xhat * stretch), (dy * xhat).sum(tokens), dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return LayerNorm.apply(x, weight, bias, eps)
