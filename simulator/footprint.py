"""Bytes that the fullest rank holds at the peak of a step, for programs other than this one.

States follow ZeRO (Rajbhandari et al. 2020, section 3), activations Korthikanti et al. 2022,
section 4, table 2, counted tensor by tensor so that swiglu and grouped queries have theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minigpt.config import FFN
from parallel.layout import PipelineSchedule
from simulator.block_products import Block
from simulator.hardware import DTYPES
from simulator.plans import NONE, SCHEDULES, SELECTIVE, Array, Plans
from simulator.work import Work

GPIPE = SCHEDULES.index(PipelineSchedule("gpipe"))
GATHERED_BLOCKS = 2.0  # whole at a time: the one that computes and the one prefetched


@dataclass(frozen=True)
class MemoryHabits:
    """What a program keeps, and what its memory figure means."""

    fused: bool = True  # as Megatron-LM: sequence parallelism keeps its part only and gathers it
    # again, swiglu is one operator, products in fp8 keep what they took in fp8
    recomputed_blocks: float = 0.0  # share of the blocks that keep their input only
    every_second_product: bool = False  # is what `selective` keeps (torchtitan)
    logit_bytes: float = 8.0  # of a logit at the peak
    context_bytes: float = 0.0  # of the process besides tensors, where the figure has them
    spare: float = 1.0  # reserved over allocated, where the figure is of reserved memory


def peak_bytes(plans: Plans, work: Work, habits: MemoryHabits) -> Array:
    """Peak of the first or the last pp rank, whichever is fuller."""
    block, kept = block_activations(plans, work, habits)
    m, p, v = plans.micro_batches, plans.pp, work.local_stages
    # 1F1B's first rank has p micro-batches under way, interleaved 1 + (p-1)/(p v) times that
    # (Korthikanti et al. 2022, section 4.2.3), the last one
    first = np.minimum(m, p * np.where(v > 1, 1 + (p - 1) / (p * v), 1.0))
    first = np.where(plans.schedule == GPIPE, m, first)  # all of them
    logits = habits.logit_bytes * work.tokens * work.vocabulary
    front = work.layers * kept * first + np.maximum(block - kept, (p == 1) * logits)
    back = work.last_layers * kept + np.maximum(block - kept, logits)
    tensors = state_bytes(plans, work) + np.maximum(front, back)
    return habits.spare * tensors + habits.context_bytes


def state_bytes(plans: Plans, work: Work) -> Array:
    """Weights, gradients and the optimizer's state.

    Sharded weights are whole while they compute: two blocks at a time, all of them and their
    gradients where a pipeline holds on to them.
    """
    kept, n = plans.numerics, work.shards
    cut_weights = np.where(plans.zero_stage >= 3, n, 1)

    def spread(ranks: Array) -> Array:
        cut = [np.where(plans.zero_stage >= least, ranks, 1) for least in (3, 2, 0)]
        return kept.weights / cut[0] + kept.gradients / cut[1] + kept.optimizer / cut[2]

    block = np.sum(work.count * work.inner * work.columns, axis=1)
    all_of_it = work.parameters + work.experts
    whole = np.where(plans.pp > 1, all_of_it, GATHERED_BLOCKS * block)
    whole = whole * (work.weight_bytes + work.gradient_bytes)
    held = work.parameters * spread(n) + work.experts * spread(work.expert_shards)
    return held + np.where(cut_weights > 1, whole, 0.0)


def block_activations(plans: Plans, work: Work, habits: MemoryHabits) -> tuple[Array, Array]:
    """Bytes of one block and micro-batch: all of them, and those kept until the backward."""
    model, tp, item, tokens = plans.model, plans.tp, work.item, work.tokens
    block = Block(plans, tokens, work.expert_tp)
    d, f, gelu = model.d_model, block.wide, model.ffn == FFN.gelu
    cut = np.where(plans.sequence_parallel, tp, 1)
    fed = np.where(habits.fused & (work.dtype >= DTYPES.index("fp8")), 1, item)
    # inputs of both norms; of q k v and of the MLP
    whole = tokens * d * (2 * item / cut + 2 * fed / (cut if habits.fused else 1))
    dropped = 2 * tokens * d / cut * (gelu and model.dropout > 0)
    # what latent attention makes q, k and v from, before its norm and after; the experts' input
    whole = whole + tokens * block.latent * (item + fed) + block.routed_rows * d * fed
    # q, k, v; what the activation function takes; what it and attention give, inputs of products
    taken = 1 if gelu else (2 if habits.fused else 3)
    heads = block.query + block.keys_and_values
    inner = tokens * (item * (heads + taken * f) + fed * (block.values + f)) / tp
    scores = item * work.score_heads * work.queries * work.keys
    everything = whole + dropped + inner + scores
    entrance = item * tokens * d / cut
    outputs = item * tokens * (2 * d + heads + (1 if gelu else 2) * f) / tp
    second = entrance + item * tokens * d / tp + outputs / 2
    selective = second if habits.every_second_product else everything - scores
    share = habits.recomputed_blocks
    some = share * entrance + (1 - share) * everything
    kept = np.where(plans.checkpointing == NONE, some, entrance)
    return everything, np.where(plans.checkpointing == SELECTIVE, selective, kept)
