"""The update rule, which weights it decays, and the learning rate of each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from minigpt.by_hand.adamw import AdamW
from minigpt.by_hand.schedule import cosine, warm_up
from minigpt.config import OptimizerConfig, OptimizerName, Schedule


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2019) or SGD. Matrices decay; vectors (norms, biases) never do.

    Needs a resolved `config.lr`.
    """
    kind, groups, settings = recipe(named_parameters, config)
    return kind(groups, **settings)


def recipe(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig
) -> tuple[type[torch.optim.Optimizer], list[dict[str, Any]], dict[str, Any]]:
    """Class, parameter groups and settings of the optimizer, for whoever wants to make it."""
    assert config.lr is not None
    parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    # fused kernels refuse a group whose tensors are spread over several meshes, or some over none
    groups: dict[tuple, dict[str, Any]] = {}
    for parameter in parameters:
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        key = decay, getattr(parameter, "device_mesh", None)
        groups.setdefault(key, {"params": [], "weight_decay": decay})["params"].append(parameter)
    split = list(groups.values())
    if config.name == OptimizerName.sgd:
        return torch.optim.SGD, split, {"lr": config.lr, "momentum": config.momentum}
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == OptimizerName.by_hand_adamw:
        return AdamW, split, settings
    # fused: one pass over memory, and no temporaries as large as the model
    return torch.optim.AdamW, split, {**settings, "fused": True}


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of `step`, which counts from 0, in a run of `steps`.

    Linear warm-up, whose first step is already above zero; then half a cosine down to
    min_lr_ratio * lr at the last step (Loshchilov 2017, eq. 5).
    """
    assert config.lr is not None
    if step < config.warmup_steps:
        return warm_up(step, config.warmup_steps, config.lr)
    if config.schedule == Schedule.constant:
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return cosine(progress, config.lr, config.min_lr_ratio * config.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
