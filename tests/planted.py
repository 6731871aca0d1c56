"""Bugs that training in parallel is known for, each of which can be switched on in real ranks.

A plant is a context: inside it the program has the bug. It names the plan that would suffer from
it, for none shows everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import parallel.tensor_parallel as tensor_parallel
import parallel.training as training
from experiments import assemble
from experiments.config import TrainConfig
from experiments.debug.patches import Bug, instead
from experiments.figures.parity import make_config
from minigpt.config import OptimizerConfig
from parallel import context_parallel, experts, passes, pipeline, step, strategies
from parallel.gradients import align_gradients, gradient_norm, local, scale_gradients
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.pipeline import TiedHead
from parallel.step import Trainer

Changes = dict[str, Any]
SMALL: Changes = {"model.n_layer": 2, "model.d_model": 32, "steps": 6}
ACCUMULATE: Changes = {"gradient_accumulation_steps": 2}
CLIP: Changes = {"clip": 0.5}  # below every norm of these runs
DROPOUT: Changes = {"model.dropout": 0.1}
EXPERTS: Changes = {"model.ffn": "moe", "model.n_expert": 4, "model.balance": 0.0}


@dataclass(frozen=True)
class Plant:
    """A bug, and the smallest plan that it hurts."""

    name: str
    bug: Bug
    layout: Layout
    changes: Changes = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        return make_config(self.layout, {**SMALL, **self.changes})


def before_update(factor: Callable[[Trainer], float]) -> Bug:
    """The plant that multiplies the gradients which a step has left."""

    def forward_backward(self: Trainer, micro_batches: Sequence[Any]) -> Tensor:
        totals = FORWARD_BACKWARD(self, micro_batches)
        scale_gradients(self.parameters, factor(self))
        return totals

    return instead(Trainer, "_forward_backward", forward_backward)


# ---- the loss


def mean_of_a_micro_batch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each micro-batch's gradient is of a mean over its own tokens; the loss it says is right."""
    loss, count = TOKEN_LOSS(logits, targets)
    mean = loss / count.clamp(min=1) * targets.numel()
    return loss.detach() + mean - mean.detach(), count


def loss_of_last_micro_batch(self: Trainer, micro_batches: Sequence[Any]) -> Tensor:
    """Gradients of all but the last micro-batch are dropped."""
    totals = FORWARD_BACKWARD(self, micro_batches[:-1])
    self.optimizer.zero_grad()
    return FORWARD_BACKWARD(self, micro_batches[-1:]) + totals


TOKEN_LOSS = passes.token_loss
FORWARD_BACKWARD = Trainer._forward_backward


# ---- gradients


def first_micro_batch_syncs(*args: Any) -> tuple[Any, Callable[[bool], None]]:
    """DDP averages after the first micro-batch instead of after the last."""
    replica, sync = APPLY_DDP(*args)
    return replica, lambda on: sync(not on)


def part_for_the_whole(parameters: Sequence[Tensor]) -> None:
    """Sequence parallelism: a norm's gradient from a part of the sequence is taken for all."""
    align_gradients([p for p in parameters if not is_partial(p.grad)])
    for parameter in parameters:
        if isinstance(parameter, DTensor) and is_partial(parameter.grad):
            mesh, placements = parameter.device_mesh, parameter.placements
            assert parameter.grad is not None
            parameter.grad = DTensor.from_local(local(parameter.grad), mesh, placements)


def is_partial(gradient: Tensor | None) -> bool:
    return isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements)


def head_learns_alone(self: TiedHead) -> None:
    """The embedding gets both gradients, the head on the last stage its own only."""
    own = [local(w.grad).clone() for w in self.weights if w.grad is not None]
    ADD_GRADIENTS(self)
    if dist.get_rank() > 0:
        for weight, gradient in zip(self.weights, own, strict=True):
            weight.grad = gradient


def experts_of_all(weight: Tensor, ranks: int, dtype: torch.dtype | None) -> Tensor:
    """Gradients of experts are the sum over the ranks of their tokens, not the average."""
    return local(weight)


def divided_by_micro_batches(name: str) -> Callable[..., Any]:
    """The schedule divides gradients by the number of micro-batches, as it does if not told."""
    kind = SCHEDULE_CLASS(name)
    return lambda *args, **kwargs: kind(*args, **{**kwargs, "scale_grads": True})


APPLY_DDP = strategies.TORCH.apply_ddp
ADD_GRADIENTS = TiedHead.add_gradients
SCHEDULE_CLASS = pipeline.get_schedule_class


# ---- the norm


def norm_of_a_stage(parameters: Sequence[Tensor], mesh: Mesh, _norms: object) -> Tensor:
    """Each stage of a pipeline clips by its own norm."""
    alone = replace(mesh, layout=replace(mesh.layout, pp=1))
    return gradient_norm(parameters, alone)


def norm_with_copies(parameters: Sequence[Tensor], mesh: Mesh, _norms: object) -> Tensor:
    """What tp holds as copies counts once for each of them (two)."""
    copies = [p for p in parameters if not isinstance(p, DTensor)]
    return torch.hypot(gradient_norm(parameters, mesh), gradient_norm(copies, mesh))


# ---- the update


def one_step_ahead(config: OptimizerConfig, now: int, steps: int) -> float:
    """The learning rate of the next step."""
    return LEARNING_RATE(config, now + 1, steps)


def all_decay(named_parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Vectors decay as matrices do."""
    optimizer = BUILD_OPTIMIZER(named_parameters, config)
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
    return optimizer


LEARNING_RATE = assemble.learning_rate
BUILD_OPTIMIZER = training.build_optimizer


# ---- who sees what


def consecutive(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Positions as if a rank held one run of the sequence, not an early and a late chunk."""
    here = length // size
    return torch.arange(rank * here, (rank + 1) * here, device=device)


@contextmanager
def last_block_forgotten() -> Iterator[None]:
    """The ring's last keys arrive, and nobody attends to them."""
    true, calls = context_parallel.merge, 0

    def merge(*parts: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls % dist.get_world_size():
            true(*parts)

    with patch.object(context_parallel, "merge", merge):
        yield


def masks_apart(config: TrainConfig, mesh: Mesh) -> int:
    """tp ranks draw different masks for what they hold as copies."""
    return DROPOUT_SEED(config, mesh) + mesh.index("tp")


def masks_alike(attend: Callable, rank: int) -> Callable:
    """tp ranks draw the same masks for their heads, which are different ones."""
    return attend


DROPOUT_SEED = assemble.dropout_seed

DDP, SHARDED, TP, PP, CP = (
    Layout(**{axis: 2}) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp")
)
PLANTS = [
    Plant(
        "mean of means",
        instead(passes, "token_loss", mean_of_a_micro_batch),
        DDP,
        {**ACCUMULATE, "data.ragged": True},
    ),
    Plant(
        "last micro-batch only",
        instead(Trainer, "_forward_backward", loss_of_last_micro_batch),
        DDP,
        ACCUMULATE,
    ),
    Plant("loss counted on every tp rank", instead(Mesh, "counts", True), TP),
    Plant(
        "gradients summed over ranks",
        before_update(lambda trainer: trainer.replica.mesh.layout.data_parallel),
        DDP,
    ),
    Plant(
        "gradients of accumulation summed", before_update(lambda t: t.accumulation), DDP, ACCUMULATE
    ),
    Plant("missing factor of cp", before_update(lambda t: 1 / t.replica.mesh.layout.cp), CP),
    Plant(
        "averaged after the first micro-batch",
        instead(strategies, "TORCH", strategies.TORCH._replace(apply_ddp=first_micro_batch_syncs)),
        DDP,
        ACCUMULATE,
    ),
    Plant(
        "norms of sequence parallelism not reduced",
        instead(step, "align_gradients", part_for_the_whole),
        TP,
        {"sequence_parallel": True},
    ),
    Plant(
        "tied gradients not added",
        instead(TiedHead, "add_gradients", lambda self: None),
        PP,
        {**ACCUMULATE, "model.tied": True},
    ),
    Plant(
        "tied head learns alone",
        instead(TiedHead, "add_gradients", head_learns_alone),
        PP,
        {**ACCUMULATE, "model.tied": True},
    ),
    Plant(
        "pipeline divides by micro-batches",
        instead(pipeline, "get_schedule_class", divided_by_micro_batches),
        PP,
        ACCUMULATE,
    ),
    Plant(
        "experts not divided by ep",
        instead(experts, "own_experts", experts_of_all),
        Layout(dp_shard=2, ep=2),
        EXPERTS,
    ),
    Plant("clip per stage", instead(step, "gradient_norm", norm_of_a_stage), PP, ACCUMULATE | CLIP),
    Plant("norm counts copies", instead(step, "gradient_norm", norm_with_copies), TP, CLIP),
    Plant("learning rate off by one", instead(assemble, "learning_rate", one_step_ahead), DDP),
    Plant("vectors decay", instead(training, "build_optimizer", all_decay), SHARDED),
    Plant(
        "zero1 does not broadcast",
        instead(ZeroRedundancyOptimizer, "_sync_params", lambda self: None),
        SHARDED,
        {"zero_stage": 1},
    ),
    Plant("ranks read the same rows", instead(Mesh, "data_rank", 0), SHARDED),
    Plant("wrong positions", instead(context_parallel, "positions", consecutive), CP),
    Plant("ring forgets the last block", last_block_forgotten, CP),
    Plant(
        "different masks for copies", instead(assemble, "dropout_seed", masks_apart), TP, DROPOUT
    ),
    Plant(
        "equal masks for heads",
        instead(tensor_parallel, "with_own_masks", masks_alike),
        TP,
        DROPOUT,
    ),
]
