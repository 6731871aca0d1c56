"""How a bug is put into a program from outside: an attribute is exchanged for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from experiments import assemble
from minigpt import model
from minigpt.attention import ATTEND
from minigpt.config import ModelConfig, OptimizerConfig
from minigpt.data import Batches
from minigpt.model import GPT
from parallel import passes, training
from parallel import step as parallel_step
from parallel.mesh import Mesh
from parallel.replica import Replica
from parallel.step import Trainer

Bug = Callable[[], AbstractContextManager]


def instead(target: Any, name: str, bug: Any) -> Bug:
    """Put `bug` in the place of an attribute."""
    return lambda: patch.object(target, name, bug)


def together(*bugs: Bug) -> Bug:
    """Several at once."""

    @contextmanager
    def opened() -> Iterator[None]:
        with ExitStack() as stack:
            for bug in bugs:
                stack.enter_context(bug())
            yield

    return opened


# ---- the loss


def mean_of_a_micro_batch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A mean that says it is the sum of as many tokens as there are places: a step then has the
    mean of the micro-batches' means."""
    loss, count = TOKEN_LOSS(logits, targets)
    places = torch.full_like(count, targets.numel())
    return loss / count.clamp(min=1) * places, places


TOKEN_LOSS = passes.token_loss


# ---- precision


def scale_grown_too_far(after: int) -> Bug:
    """fp16 without a scaler that looks for overflows: when `after` steps went well the loss scale
    grows, as GradScaler's does, but too far; gradients overflow, and the update is made."""

    def launch(self: Any, micro_batches: Any) -> Any:
        self.steps_begun = getattr(self, "steps_begun", 0) + 1
        return LAUNCH(self, micro_batches)

    def scale(self: Any) -> float:
        return FIRST_SCALE * (TOO_FAR if self.steps_begun > after else 1.0)

    return together(
        instead(training, "LossScaler", lambda: None),
        instead(parallel_step, "local_norms", nothing_seen),
        instead(Trainer, "launch", launch),
        instead(Trainer, "_scale", property(scale)),
    )


def nothing_seen(parameters: Any) -> list[Tensor]:
    """Norms of gradients at which nobody has looked."""
    return [torch.zeros((), device=p.device) for p in parameters]


LAUNCH = Trainer.launch
FIRST_SCALE = 2.0**12
TOO_FAR = 2.0**24  # the largest fp16 is below 2^16


# ---- the model


def sees_everything(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention without the causal mask."""
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def without_mask() -> AbstractContextManager:
    return patch.dict(ATTEND, dict.fromkeys(ATTEND, sees_everything))


def merged_without_transpose(y: Tensor) -> Tensor:
    """(B, N, T, H) to (B, T, N H), the right shape with the wrong content."""
    B, N, T, H = y.shape
    return y.reshape(B, T, N * H)


class Scale(nn.Module):
    """What is left of a norm that does not normalise: its weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def large_value(name: str, *rest: Any) -> Tensor:
    """Initial weights that are too large."""
    value = INITIAL_VALUE(name, *rest)
    return value * LARGE if name.startswith("blocks.") and value.ndim > 1 else value


INITIAL_VALUE = model.initial_value
LARGE = 14  # times GPT-2's 0.02, for the weights of a block


def tie_unless_cut(self: GPT) -> None:
    """Tie plain weights only: what tensor parallelism has cut stays apart."""
    if self.embedding is None or not isinstance(self.embedding.weight, DTensor):
        TIE(self)


TIE = GPT.tie


# ---- the learning rate


def never_warms_up(config: OptimizerConfig, step: int, steps: int) -> float:
    """The highest rate from the first step on."""
    assert config.lr is not None
    return config.lr if step < config.warmup_steps else LEARNING_RATE(config, step, steps)


LEARNING_RATE = assemble.learning_rate


# ---- ranks


def weights_of_another_seed(config: ModelConfig, mesh: Mesh, options: Any, seed: int) -> Replica:
    return PARALLELIZE(config, mesh, options, seed + (mesh.rank == 1))


def rows_of_another_seed(corpus: Any, length: int, size: int, seed: int, ragged: bool) -> Batches:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return BATCHES(corpus, length, size, seed + (rank == 1), ragged)


PARALLELIZE, BATCHES = assemble.parallelize, assemble.Batches
