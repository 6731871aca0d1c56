"""Precision: which dtype the matmuls run in. Master weights, gradients and optimizer stay fp32.

Replicated weights (single, ddp) use autocast; sharded ones (fsdp) use fully_shard's own policy,
which gathers the weights in the low precision and so halves the bytes on the wire.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from parallel.layout import Precision

DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp8: torch.bfloat16,  # of what is no product in a block (parallel/float8.py)
}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context for a forward pass of replicated weights."""
    if precision == Precision.fp32:
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def sharding_policy(precision: Precision) -> MixedPrecisionPolicy:
    """fully_shard's policy: low-precision weights and activations, gradients summed in fp32."""
    if precision == Precision.fp32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16, whose small gradients would flush to zero (Micikevicius 2018).

    A step with a non-finite gradient norm is skipped and halves the scale; `growth_interval` good
    steps in a row double it. The norm is global, so all ranks decide alike without another message.
    """

    scale: float = 2.0**16
    growth_interval: int = 2000
    good_steps: int = 0
    skipped: int = 0

    def update(self, finite: bool) -> None:
        """Call once a step, with whether the gradients were finite."""
        if finite:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2
        else:
            self.good_steps = 0
            self.skipped += 1
            self.scale /= 2
