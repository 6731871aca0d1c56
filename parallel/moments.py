"""What an optimizer keeps for each weight, whoever keeps it: plain, ZeRO's first stage, by hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Moments = dict[Tensor, dict[str, Tensor]]


def inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that does this rank's work: ZeroRedundancyOptimizer keeps it as `optim`."""
    return getattr(optimizer, "optim", optimizer)


def owned(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The weights for which this rank keeps something."""
    for group in inner(optimizer).param_groups:
        yield from group["flat"].weights if "flat" in group else group["params"]


def moments_of(optimizer: torch.optim.Optimizer) -> Moments:
    """By weight, each tensor as the weight is laid out. All ranks call it."""
    moments: Moments = {}
    for group in inner(optimizer).param_groups:
        for parameter in group["params"]:
            state = inner(optimizer).state.get(parameter, {})
            kept = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            if "flat" in group:
                moments |= group["flat"].apart(kept)
            else:
                moments[parameter] = kept
    return moments


def take_moments(optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """The way back: give the optimizer what `moments_of` gave, for the weights of `owned`."""
    state = inner(optimizer).state
    for group in inner(optimizer).param_groups:
        for parameter in group["params"]:
            kept = group["flat"].joined(moments) if "flat" in group else moments[parameter]
            if kept:
                state[parameter] = kept
