"""The MLP of a block and its backward: GELU (Hendrycks 2016) or SwiGLU (Shazeer 2020).

    GELU     y = down(gelu(up(x)))               gelu(u) = u P(u), P the normal distribution's cdf
    SwiGLU   y = down(silu(gate(x)) * up(x))     silu(g) = g s(g), s the logistic function

Shapes: x, y (..., D); up, gate (F, D); down (D, F); a bias has its weight's first dimension.
Kept for backward are x and what goes into the non-linearity. What comes out of it costs few flops,
and is computed again: F numbers a token (SwiGLU: 2 F) less than autograd keeps. The peak, inside
backward, is higher than torch's all the same: its temporaries have no fused kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = tuple[Tensor, Tensor | None]  # weight, bias


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y = x W^T + b: dx = dy W, dW = dy^T x, db = dy, summed over the tokens."""
    rows = dy.flatten(0, -2)
    return dy @ weight, rows.T @ x.flatten(0, -2), rows.sum(0)


class GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None
    ) -> Tensor:
        u = F.linear(x, up, up_bias)
        ctx.save_for_backward(x, u, up, down)
        return F.linear(u * normal_cdf(u), down, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """gelu'(u) = P(u) + u P'(u), and P' is the normal density."""
        x, u, up, down = ctx.saved_tensors
        cdf, density = normal_cdf(u), (-0.5 * u * u).exp() / math.sqrt(2 * math.pi)
        dhidden, ddown, dbias = linear_backward(dy, u * cdf, down)
        dx, dup, dup_bias = linear_backward(dhidden * (cdf + u * density), x, up)
        return only_needed(ctx, dx, dup, dup_bias, ddown, dbias)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        gate_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        g, u = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
        ctx.save_for_backward(x, g, u, gate, up, down)
        return F.linear(g * g.sigmoid() * u, down, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """silu'(g) = s + g s (1 - s), for s' = s (1 - s). x has two ways to y: both add up."""
        x, g, u, gate, up, down = ctx.saved_tensors
        s = g.sigmoid()
        dhidden, ddown, dbias = linear_backward(dy, g * s * u, down)
        dx_up, dup, dup_bias = linear_backward(dhidden * g * s, x, up)
        slope = s * (1 + g * (1 - s))
        dx_gate, dgate, dgate_bias = linear_backward(dhidden * u * slope, x, gate)
        return only_needed(ctx, dx_gate + dx_up, dgate, dgate_bias, dup, dup_bias, ddown, dbias)


def normal_cdf(u: Tensor) -> Tensor:
    """P(U <= u) of a standard normal U."""
    return 0.5 * (1 + (u / math.sqrt(2)).erf())


def only_needed(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """None for inputs that were None (no bias) or are frozen."""
    pairs = zip(gradients, ctx.needs_input_grad, strict=True)
    return tuple(gradient if needed else None for gradient, needed in pairs)


def mlp(x: Tensor, gate: Linear | None, up: Linear, down: Linear) -> Tensor:
    """(..., D) to (..., D), linear maps as (weight, bias or None); GELU without a gate."""
    if gate is None:
        return GeluMLP.apply(x, *up, *down)
    return SwiGLU.apply(x, *gate, *up, *down)
