"""Activation checkpointing: keep less of the forward pass and compute it again in the backward.

none       keep every intermediate result
selective  keep what projections and attention kernels made, recompute the rest, T x S scores
           included (Korthikanti 2022)
full       keep each block's input only, recompute the block (Chen 2016)
offload    as full, and the input waits in the host's memory (Rajbhandari et al. 2020, ZeRO, 6.1)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from parallel.layout import ActivationCheckpointing

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_matmuls(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(
    blocks: nn.ModuleDict, mode: ActivationCheckpointing, dropout: bool
) -> None:
    """Checkpoint each block. Parameter names stay as they are: only `forward` is replaced.

    `dropout`: whether the blocks draw random numbers, which must then be drawn alike both times.
    """
    if mode == ActivationCheckpointing.none:
        return
    contexts: Callable = noop_context_fn
    if mode == ActivationCheckpointing.selective:
        contexts = partial(create_selective_checkpoint_contexts, _keep_matmuls)
    for block in blocks.values():
        recomputed = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=contexts,
            preserve_rng_state=dropout,
        )
        offload = mode == ActivationCheckpointing.offload
        block.forward = kept_on_host(recomputed) if offload else recomputed


def kept_on_host(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What a checkpoint keeps, the block's input, is copied to the host until backward.

    The memory is pinned where there is a GPU; what is recomputed never leaves the device.
    """

    def offloaded(x: Tensor, *args: Any) -> Tensor:
        with save_on_cpu(pin_memory=x.is_cuda):
            return forward(x, *args)

    return offloaded
