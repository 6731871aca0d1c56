"""torch's fused attention kernels, called by name, for they give the log-sum-exp of each query.

scaled_dot_product_attention keeps that to itself, but attention in pieces cannot be merged, nor
differentiated piece by piece, without it. No dropout, and as many key-value heads as query heads.

forward(q, k, v, causal) -> out (B, N, T, H), lse (B, N, T) in fp32
backward(grad_out, q, k, v, out, lse, causal) -> dq, dk, dv
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LSE_ALIGNMENT = 32  # queries to whose multiple the memory-efficient kernel pads its lse


class Kernels(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernels_for(q: Tensor) -> Kernels:
    """The kernels of a device and dtype: flash on CUDA has no fp32."""
    if q.device.type == "cpu":
        return Kernels(_cpu_forward, _cpu_backward)
    if q.dtype == torch.float32:
        return Kernels(_efficient_forward, _efficient_backward)
    return Kernels(_flash_forward, _flash_backward)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    # always fp32: the bf16 backward of this kernel is five times slower (torch 2.13)
    q, k, v = q.float(), k.float(), v.float()
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [x.float() for x in (grad, q, k, v, out)]
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, causal)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read without dropout
    # None: no cumulated lengths, for the sequences are not packed. It reads lse without strides
    lengths = (None, None, q.shape[2], k.shape[2])
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, random, random
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out, lse[:, :, : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.empty((), dtype=torch.int64, device=q.device)  # not read without dropout
    padding = (0, -lse.shape[-1] % LSE_ALIGNMENT)
    lse = F.pad(lse, padding, value=math.inf).contiguous()  # no weight: e^-inf
    wanted = [True, True, True, False]  # all but the gradient of a bias, which there is not
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad.contiguous(), q, k, v, None, out, lse, random, random, 0.0, wanted, causal
    )
    return dq, dk, dv
