"""What the data axes send: weights and gradients. Letters as in simulator/communication.py."""

from __future__ import annotations

import math
from dataclasses import astuple
from functools import lru_cache

import numpy as np

from minigpt.config import FFN, ModelConfig
from parallel.layout import PipelineConfig
from simulator.plans import SCHEDULES, Array, distinct
from simulator.schedules import gathers
from simulator.sending import Sending
from simulator.shapes import Rank

DDP_BUCKETS = (2**20, 25 * 2**20)  # bytes of torch's first bucket, and of each other one
ONE_STAGE = np.array([PipelineConfig(schedule).one_stage_a_rank for schedule in SCHEDULES])
GPIPE = [schedule.value for schedule in SCHEDULES].index("gpipe")


def data_messages(to: Sending) -> None:
    """Weights and gradients over the data axes, but for experts that ep has spread.

    ddp     all_reduce of every gradient: 4 P (Li et al. 2020, PyTorch Distributed, section 3.2)
    zero 1  the same, and a broadcast of every weight from its owner. Megatron-LM: reduce_scatter of
            the gradients and all_gather of the weights, once a step
    zero 2  all_gather of the weights once a micro-batch, reduce_scatter of the gradients once a
            step or micro-batch (Rajbhandari et al. 2020, ZeRO, section 7)
    zero 3  all_gather of the blocks' weights before each forward and again before each backward
            (Zhao et al. 2023, PyTorch FSDP)
    hsdp    as sharded, and an all_reduce of the scattered gradients between the replicas
    """
    rank, plans = to.rank, to.plans
    gradients = to.kept(plans.numerics.gradients)
    n = np.where(rank.sharded | rank.like_megatron, rank.shards, 1)
    outer, block = rank.of_outer(n), rank.of_block(n)
    size, modules = outer + rank.layers * block, rank.outer_stages + rank.layers
    # a message for each block and for the rest of a stage, or the wrapper's buckets
    wrapper = ~rank.has_policy & ~rank.like_megatron
    reduced = np.where(wrapper, ddp_buckets(plans.model), modules)
    to.add("backward", "all_reduce", to.replicas, gradients, reduced, size // n)
    _zero1(to, reduced, size)
    forward, backward = block_gathers(rank)
    root = np.where(plans.pp > 1, 1, plans.micro_batches)
    calls, numbers = root * rank.outer_stages + forward, root * outer + forward * block
    to.add("forward", "all_gather", to.shards, to.low, rank.sharded * calls, numbers)
    to.add("backward", "all_gather", to.shards, to.low, rank.sharded * backward, backward * block)
    scattered = rank.sharded * rank.scatters
    size = rank.scatters * size
    to.add("backward", "reduce_scatter", to.shards, gradients, scattered * modules, size)


def _zero1(to: Sending, reduced: Array, size: Array) -> None:
    """The optimizer is sharded: by torch's ZeroRedundancyOptimizer, which hands out whole weights,
    or Megatron-LM's distributed optimizer, whose buckets are of max(40e6, 1e6 ranks) numbers
    (megatron/core/distributed/distributed_data_parallel.py)."""
    rank, plans = to.rank, to.plans
    gradients, weights = to.kept(plans.numerics.gradients), to.kept(plans.numerics.weights)
    plain = rank.zero1 & ~rank.like_megatron
    tensors = plans.model.n_layer * len(plans.model.block_shapes) + len(plans.model.outer_shapes)
    to.add("backward", "all_reduce", to.shards, gradients, plain * reduced, size)
    to.add("optimizer", "broadcast", to.shards, weights, plain * tensors, size)
    bucket = np.maximum(40_000_000, 1_000_000 * rank.shards * rank.replicas)
    calls = rank.like_megatron * -(-size // bucket)
    to.add("backward", "reduce_scatter", to.shards, gradients, calls, size)
    to.add("optimizer", "all_gather", to.shards, weights, calls, size)


def expert_data_messages(to: Sending) -> None:
    """The same for experts that ep has spread, over what it has left of the data axes."""
    rank, plans = to.rank, to.plans
    if plans.model.ffn != FFN.moe:
        return
    gradients = to.kept(plans.numerics.gradients)
    spread = (plans.ep > 1) & (plans.data_parallel > plans.ep)
    scattered = rank.sharded | rank.like_megatron
    n = np.where(scattered, rank.expert_rest, 1)
    size = rank.layers * rank.of_experts(n)
    sharded = plans.dp_shard > 1
    rest = [("dp_shard/ep", rank.expert_rest, sharded)]
    replicas = [
        ("dp_replicate", plans.dp_replicate, sharded),
        ("dp_replicate/ep", rank.expert_rest, ~sharded),
    ]
    calls = spread * rank.layers
    to.add("backward", "all_reduce", replicas, gradients, calls, size // n)
    forward, backward = (spread * rank.sharded * times for times in block_gathers(rank))
    of_block = rank.of_experts(n)
    to.add("forward", "all_gather", rest, to.low, forward, forward * of_block)
    to.add("backward", "all_gather", rest, to.low, backward, backward * of_block)
    times = calls * scattered * rank.scatters
    to.add("backward", "reduce_scatter", rest, gradients, times, rank.scatters * size)
    weights = to.kept(plans.numerics.weights)
    to.add("optimizer", "all_gather", rest, weights, calls * rank.like_megatron, size)


def block_gathers(rank: Rank) -> tuple[Array, Array]:
    """How many times a sharded rank gathers the weights of a block, in forwards and in backwards.

    A pipeline keeps gathered weights from a backward to the last one; with resharding after forward
    (zero 3) it gathers again for each forward and for each backward that follows one.
    """
    plans, m = rank.plans, rank.plans.micro_batches
    gives_up, staged = (plans.zero_stage == 3).astype(np.int64), plans.pp > 1
    warm = np.where(plans.schedule == GPIPE, m, np.minimum(m, plans.pp - rank.place))
    forward = np.where(gives_up == 1, warm, 1)  # of a rank with one stage
    backward = gives_up * (1 + m - warm)
    forward = rank.layers * np.where(staged, forward, m)
    backward = rank.layers * np.where(staged, backward, gives_up * m)
    ordered = staged & rank.sharded & (gives_up == 1) & ~ONE_STAGE[plans.schedule]
    if ordered.any():
        by_order = _gathers_by_order(rank, np.flatnonzero(ordered))
        forward, backward = forward.copy(), backward.copy()
        forward[ordered], backward[ordered] = by_order
    return forward, backward


def _gathers_by_order(rank: Rank, plans: Array) -> tuple[Array, Array]:
    """`block_gathers` where a rank has several stages: their schedule decides."""
    counts = np.zeros((2, len(plans)), dtype=np.int64)
    kinds = rank.pipelines[plans]
    for first, here in zip(*distinct(kinds.T), strict=True):
        schedule, *others = kinds[first].tolist()
        for lap, of_stage in enumerate(gathers(SCHEDULES[schedule], *others)):
            counts[:, here] += np.outer(of_stage, rank.blocks[lap][plans[here]])
    return counts[0], counts[1]


def ddp_buckets(model: ModelConfig) -> int:
    """Messages in which DistributedDataParallel sends the gradients of the whole model.

    It fills buckets in the order in which gradients come, the last layer's first, and closes one
    once it holds its bytes (Li et al. 2020, section 3.2.3; the first is smaller, so that it starts
    early).
    """
    return _ddp_buckets(astuple(model))


@lru_cache(maxsize=256)
def _ddp_buckets(fields: tuple) -> int:
    model = ModelConfig(*fields)
    outer = model.outer_shapes
    last = [shape for name, shape in outer.items() if name.startswith(("head", "norm"))]
    first = [shape for name, shape in outer.items() if not name.startswith(("head", "norm"))]
    block = [shape for _, shape in sorted(model.block_shapes.items(), key=_arrival)]
    filled, count, limit = 0, 0, DDP_BUCKETS[0]
    for shape in [*last[::-1], *block * model.n_layer, *first[::-1]]:
        filled += 4 * math.prod(shape)
        if filled >= limit:
            filled, count, limit = 0, count + 1, DDP_BUCKETS[1]
    return count + (filled > 0)


def _arrival(named: tuple[str, tuple[int, ...]]) -> int:
    """When the gradient of a block's weight comes: what ran last comes first."""
    parts = ("mlp.", "mlp_norm", "attention.out", "attention.", "attention_norm")
    within = ("down", "up", "gate", "router")
    place = next(i for i, part in enumerate(parts) if named[0].startswith(part))
    inner = next((i for i, part in enumerate(within) if part in named[0]), 0)
    return 10 * place + inner
