"""Whole tensors out of any layout, under the names that a single process gives them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter; see `gather`."""
    return gather(model.named_parameters(remove_duplicate=False))


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient that is there; see `gather`."""
    named = model.named_parameters()
    return gather((name, p.grad) for name, p in named if p.grad is not None)


@torch.no_grad()
def gather(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Each tensor whole and on the CPU, on rank 0; an empty dict on the others.

    All ranks must call it: a sharded tensor is gathered, one at a time.
    """
    keep = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in named:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole
