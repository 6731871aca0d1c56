"""Who does the work of each strategy: torch's own wrappers, or parallel/by_hand/."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch.distributed.tensor.parallel import loss_parallel

from parallel import ddp, fsdp, pipeline, tensor_parallel, zero1
from parallel.by_hand import ddp as ddp_by_hand
from parallel.by_hand import fsdp as fsdp_by_hand
from parallel.by_hand import pipeline as pipeline_by_hand
from parallel.by_hand import tensor_parallel as tensor_parallel_by_hand
from parallel.by_hand import zero1 as zero1_by_hand
from parallel.by_hand.vocabulary_parallel import vocabulary_parallel_loss
from parallel.layout import Impl
from parallel.mesh import Mesh
from parallel.passes import Context, loss_and_count


class Strategies(NamedTuple):
    """The functions that parallelize() calls, under the names that they have where they are."""

    apply_ddp: Callable[..., Any]
    apply_fsdp: Callable[..., Any]
    apply_tensor_parallel: Callable[..., None]
    # the loss of logits that tp has cut, and the context that it and its backward need
    tensor_parallel_loss: Callable[[Mesh], tuple[Callable, Context]]
    Pipeline: Callable[..., Any]
    sharded_optimizer: Callable[..., Any]


def _loss_of_torch(mesh: Mesh) -> tuple[Callable, Context]:
    return loss_and_count, loss_parallel


def _loss_by_hand(mesh: Mesh) -> tuple[Callable, Context]:
    return partial(vocabulary_parallel_loss, group=mesh.group("tp")), nullcontext


TORCH = Strategies(
    ddp.apply_ddp,
    fsdp.apply_fsdp,
    tensor_parallel.apply_tensor_parallel,
    _loss_of_torch,
    pipeline.Pipeline,
    zero1.sharded_optimizer,
)
BY_HAND = Strategies(
    ddp_by_hand.apply_ddp,
    fsdp_by_hand.apply_fsdp,
    tensor_parallel_by_hand.apply_tensor_parallel,
    _loss_by_hand,
    pipeline_by_hand.Pipeline,
    zero1_by_hand.sharded_optimizer,
)


def strategies(impl: Impl) -> Strategies:
    return BY_HAND if impl == Impl.by_hand else TORCH
