"""A training loop that shares nothing with the project's own but the model and the rows.

A bug in a part that a single process uses too, as the learning rate of a step, would be on both
sides of a comparison. Here every such part is written out once more, in the shortest way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from experiments.config import TrainConfig
from experiments.figures.parity import Trajectory
from minigpt.config import OptimizerConfig
from minigpt.corpus import prepare
from minigpt.data import Batches
from minigpt.model import GPT


def plain_loop(config: TrainConfig) -> Trajectory:
    """What `config` has to do, on one process and without micro-batches. AdamW and cosine only."""
    model, data = GPT(config.model), config.data
    model.init_weights(config.seed)
    whole = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    chosen = config.optimizer
    groups: list[dict[str, Any]] = [{"params": whole}, {"params": vectors, "weight_decay": 0.0}]
    betas = chosen.beta1, chosen.beta2
    adamw = torch.optim.AdamW(groups, betas=betas, eps=chosen.eps, weight_decay=chosen.weight_decay)
    rows = Batches(prepare(data), config.seq_len, config.batch_size, config.seed, data.ragged)
    done = Trajectory([], [], {})
    for step in range(config.steps):
        inputs, targets = rows.rows(step, 0, config.batch_size)
        adamw.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        done.losses.append(loss.item())
        if config.clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        done.norms.append(float(norm) if config.clip else None)
        if step == 0:
            gradients = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
            done.gradients.update(gradients)
        for group in adamw.param_groups:
            group["lr"] = rate(chosen, step, config.steps)
        adamw.step()
    return done


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Up in a line, whose foot is a step before the first; down in half a cosine to the last."""
    assert config.lr is not None
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (1 + step) / (1 + warmup)
    part = (step - warmup) / (steps - 1 - warmup)
    return config.lr * (1 - (1 - config.min_lr_ratio) * (1 - math.cos(math.pi * part)) / 2)
