"""Whole weights out of any layout, under the names that a single process gives them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole and on the CPU, on rank 0; an empty dict on the others.

    All ranks must call it: a sharded parameter is gathered, one at a time.
    """
    keep = not dist.is_initialized() or dist.get_rank() == 0
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            weights[name] = whole.detach().to("cpu", copy=True)
    return weights
