"""Closed forms of what a step sends: exactly the payloads that a run measures.

No torch: shapes come from minigpt.config. P is the number of parameters, n the size of an axis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from minigpt.config import ModelConfig
from parallel.layout import MESH_AXES, Layout, Precision

ITEM_BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2}
DTYPE_NAMES = {
    Precision.fp32: "float32",
    Precision.bf16: "bfloat16",
    Precision.fp16: "float16",
}
Key = tuple[str, str, str]  # collective, axis, dtype


def payload_bytes(
    model: ModelConfig,
    layout: Layout,
    precision: Precision = Precision.fp32,
    accumulation: int = 1,
    clipped: bool = True,
) -> dict[Key, int]:
    """Payload that one rank hands over in one optimiser step, by collective, axis and dtype.

    ddp     all_reduce of every gradient: 4 P (Li et al. 2020, PyTorch Distributed, section 3.2)
    fsdp    all_gather of the weights before each forward, and of the blocks' before each backward;
            reduce_scatter of the gradients once a step (Zhao et al. 2023, PyTorch FSDP;
            Rajbhandari et al. 2020, ZeRO, section 7.2)
    hsdp    fsdp, and an all_reduce of the scattered gradients between the replicas
    all     16 bytes for the sum of losses and the count of tokens; with `clipped` 4 bytes for the
            norm of gradients that are sharded

    `clipped`: a gradient norm is taken. dp_replicate and dp_shard only, so far.
    """
    sent: Counter[Key] = Counter()
    names = [axis for axis in MESH_AXES if getattr(layout, axis) > 1]
    if not names:
        return {}
    n = layout.dp_shard
    blocks = model.n_layer * padded_size(model.block_shapes.values(), n)
    outer = padded_size(model.outer_shapes.values(), n)
    if n > 1:
        weights = accumulation * (outer + 2 * blocks) * ITEM_BYTES[precision]
        sent["all_gather", "dp_shard", DTYPE_NAMES[precision]] += weights
        sent["reduce_scatter", "dp_shard", "float32"] += 4 * (outer + blocks)
        if clipped:
            sent["all_reduce", "dp_shard", "float32"] += 4
    if layout.dp_replicate > 1:
        sent["all_reduce", "dp_replicate", "float32"] += 4 * (outer + blocks) // n
    sent["all_reduce", "*".join(names), "float64"] += 16
    return dict(sent)


def padded_size(shapes: Iterable[tuple[int, ...]], n: int) -> int:
    """Numbers in parameters of those shapes once fully_shard has cut them n ways.

    It cuts the first dimension, and pads it to a multiple of n.
    """
    return sum(math.ceil(shape[0] / n) * n * math.prod(shape[1:]) for shape in shapes)


def expert_payload_bytes(
    model: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    precision: Precision = Precision.fp32,
    checkpointed: bool = False,
) -> dict[str, int]:
    """Payload of the all_to_alls of one layer and micro-batch, from one rank of ep, by dtype.

    Two of the tokens' slots in forward and two in backward (Lepikhin et al. 2020, GShard, section
    3.2), two more where blocks are `checkpointed`. Dropless: on the average of the ranks, and the
    counts of each expert go first, in int64.
    """
    dropless = model.capacity_factor is None
    of_sequence = (
        seq_len * model.experts_per_token
        if dropless
        else model.n_expert * model.expert_slots(seq_len)
    )
    numbers = (6 if checkpointed else 4) * micro_batch_size * of_sequence * model.d_model
    sent = {DTYPE_NAMES[precision]: numbers * ITEM_BYTES[precision]}
    if dropless:
        sent["int64"] = (2 if checkpointed else 1) * 8 * model.n_expert
    return sent
