"""Tensor parallelism: a table from module path to how it is cut (Shoeybi et al. 2019, Megatron-LM).

Projections that widen are cut by columns and those that narrow by rows, so that a block sends twice
forward and twice backward; embedding, head and loss are cut along the vocabulary.
With sequence parallelism, what is between (norms, dropout, residuals) is cut along the sequence,
and each all_reduce becomes a reduce_scatter and an all_gather (Korthikanti et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from minigpt.config import ModelConfig
from minigpt.model import GPT, hide_from

Plan = dict[str, ParallelStyle]


def block_plan(outside: Placement, sequence_parallel: bool) -> Plan:
    """A block's cut. `outside` is how activations lie between attention and MLP.

    The input of q, k and v (and of gate and up) becomes one DTensor first: given to each as a plain
    tensor, its gradient would be reduced once for each of them.
    """
    norm = {name: SequenceParallel() for name in ("attention_norm", "mlp_norm")}
    return {
        **(norm if sequence_parallel else {}),
        "attention": PrepareModuleInput(
            input_layouts=(outside, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "mlp": PrepareModuleInput(input_layouts=outside, desired_input_layouts=Replicate()),
        **{f"attention.{name}": ColwiseParallel() for name in ("q", "k", "v")},
        "attention.out": RowwiseParallel(output_layouts=outside),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=outside),
    }


def outer_plan(outside: Placement, sequence_parallel: bool) -> Plan:
    """What is in no block. Logits stay cut along the vocabulary: the loss is computed on them."""
    split = PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=outside, use_local_output=True
    )
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        **({"dropout": split, "norm": SequenceParallel()} if sequence_parallel else {}),
        "head": ColwiseParallel(
            input_layouts=outside, output_layouts=Shard(-1), use_local_output=False
        ),
    }


def apply_tensor_parallel(model: GPT, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut `model` (which may be a stage, and on the meta device) over a mesh of one dimension."""
    outside: Placement = Shard(1) if sequence_parallel else Replicate()
    parallelize_module(model, mesh, _present(model, outer_plan(outside, sequence_parallel)))
    for block in model.blocks.values():
        parallelize_module(block, mesh, _present(block, block_plan(outside, sequence_parallel)))
        if model.config.dropout and not sequence_parallel:
            attention: Any = block.attention
            attention.attend = with_own_masks(attention.attend, mesh.get_local_rank())
    if model.hide_padding is not None:
        model.hide_padding = partial(hide_columns, model.config, mesh.get_local_rank())
    model.tie()  # parallelize_module drops the tie silently; both are now cut by rows alike


def hide_columns(config: ModelConfig, rank: int, logits: Tensor) -> None:
    """Set the logits of padding ids to -inf where they are among the columns of this tp rank.

    `logits` (..., V/n), a plain tensor or a DTensor, are changed in place.
    """
    local = logits.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    hide_from(max(0, config.vocab_size - rank * local.shape[-1]), local)


def _present(module: torch.nn.Module, plan: Plan) -> Plan:
    """The rows of a table whose module is there: an MLP may have no gate, a stage no head."""
    names = {name for name, _ in module.named_modules()}
    return {name: style for name, style in plan.items() if name in names}


def with_own_masks(attend: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """Dropout inside attention acts on this rank's heads, so its masks must differ along tp.

    Everywhere else activations are copies and their masks must agree: the default stream is the
    same on all tp ranks. The stream for the heads is drawn from it, so that a recomputed forward,
    which gets the default stream's old state back, draws the same masks again.
    """

    def attend_with_own_masks(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        if dropout == 0.0:
            return attend(q, k, v, dropout)
        seed = int(torch.randint(2**31, (), device="cpu")) * 2**16 + rank
        with torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
            torch.manual_seed(seed % 2**63)
            return attend(q, k, v, dropout)

    return attend_with_own_masks
