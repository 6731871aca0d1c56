"""The kernels of a GPU in a trace, where a CPU's program is another one.

Attention runs in the dtype of the products, and keeps no mask of its dropout. An RMSNorm is one
kernel that keeps its input and a number a token (torch's _fused_rms_norm, which only GPUs have; on
a CPU it is made of operators in fp32, which keep three times as much in bf16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Partial

import minigpt.attention
import parallel.context_parallel
from parallel.attention_kernels import Kernels

aten = torch.ops.aten


# (..., D): what it gives, and one number for each of the rows, in fp32; and gradients of x and of
# the weight. No kernels: of tensors without numbers only the shapes are asked for
torch.library.define(
    "worldsize::rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)"
)
torch.library.define(
    "worldsize::rms_norm_backward",
    "(Tensor gradient, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
)
rms_norm, rms_norm_backward = torch.ops.worldsize.rms_norm, torch.ops.worldsize.rms_norm_backward


@torch.library.register_fake("worldsize::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("worldsize::rms_norm_backward")
def _(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _back(ctx: Any, gradient: Tensor, _scale: Tensor) -> tuple:
    return *rms_norm_backward(gradient, *ctx.saved_tensors), None


torch.library.register_autograd("worldsize::rms_norm", _back, setup_context=_keep)


# rows may be cut, and the weight's gradient is then a sum over those who have them
@register_sharding(rms_norm.default)
def _forward_shardings(x: Any, _weight: Any, _eps: float) -> list:
    whole = ([Replicate()] * 2, [Replicate(), Replicate(), None])
    cut = [([Shard(d)] * 2, [Shard(d), Replicate(), None]) for d in range(x.ndim - 1)]
    return [whole, *cut]


@register_sharding(rms_norm_backward.default)
def _backward_shardings(_gradient: Any, x: Any, _weight: Any, _scale: Any) -> list:
    whole = ([Replicate()] * 2, [Replicate()] * 4)
    cut = [
        ([Shard(d), Partial()], [Shard(d), Shard(d), Replicate(), Shard(d)])
        for d in range(x.ndim - 1)
    ]
    return [whole, *cut]


def patches() -> Iterator[tuple[Any, str, Callable]]:
    """What to put in the place of the CPU's: (owner, name, function)."""
    composite, sdpa = nn.RMSNorm.forward, F.scaled_dot_product_attention

    def norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # made of operators on a GPU too
            return composite(self, x)
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)[0]

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return sdpa(*args, **kwargs)

    def low(q: Tensor, k: Tensor, v: Tensor, _dropout: float) -> Tensor:
        return sdpa(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    yield nn.RMSNorm, "forward", norm
    yield F, "scaled_dot_product_attention", attention
    yield minigpt.attention, "low_precision_on_cpu", low
    yield parallel.context_parallel, "kernels_for", lambda _q: IN_PIECES


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad, q, k, v, out)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, causal)


IN_PIECES = Kernels(_forward, _backward)  # of the ring of context parallelism
