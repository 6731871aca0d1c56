"""What one block asks of a rank, plan by plan: fields of simulator.work.Work.

Letters as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minigpt.config import Positions
from simulator.block_messages import (
    BlockMessage,
    call_bytes,
    every_message,
    recomputes,
    stage_numel,
    tied_numel,
)
from simulator.block_products import ROUTED_PASSES, ROUTED_PASSES_ONCE, Block
from simulator.habits import Habits
from simulator.plans import NONE, SELECTIVE, Array
from simulator.sending import LOW_BYTES, Sending
from simulator.shapes import Rank

# Passes over an activation B T D of a block's two residuals: each reads both and writes. Norms and
# rotations in one kernel read and write
RESIDUAL_PASSES = 2 * 3
# the same under autocast, which keeps them and what norms give in fp32: low and wide read, wide
# written; and a norm's number read and written wide, then cast
WIDE_RESIDUAL_BYTES, WIDE_NORM_BYTES = 2 * 10, 14
# Bytes of a number that a norm moves in fp32, operator by operator: cast (6), squared (8), mean
# (4), scaled (8), cast (6), multiplied by its weight (4); of one that is rotated: cast (6), turned
# (8), cast (6)
SEPARATE_NORM, SEPARATE_ROTATION = 36, 20
OPERATORS = 20  # launched by the forward of a block: products, norms, rotations, residuals
SCORE_OPERATORS = 10  # more where attention is not one kernel: scale, mask, softmax, dropout


def of_block(block: Block, habits: Habits, narrow: Array) -> dict[str, Any]:
    """Products and element-wise bytes of a block's forward (Shoeybi et al. 2019, section 3)."""
    plans, tp, tokens = block.plans, block.plans.tp, block.tokens
    d, shape = block.model.d_model, np.shape(block.plans.tp)
    sides = [
        np.stack([np.broadcast_to(v, shape) for v in side], 1)
        for side in zip(*block.products(), strict=True)
    ]
    item = LOW_BYTES[plans.precision]
    # q, k, v rotated or laid out anew: read and write; the activation function reads what up (and
    # gate) wrote
    mlp = (block.matrices + 1) * block.wide
    norm, turn = (SEPARATE_NORM, SEPARATE_ROTATION) if habits.separate else (2 * item, 2 * item)
    autocast = (item == 2) & ~Rank(plans).has_policy
    norm = np.where(autocast & (not habits.separate), WIDE_NORM_BYTES, norm)
    residuals = np.where(autocast, WIDE_RESIDUAL_BYTES, RESIDUAL_PASSES * item)
    rewritten = habits.lays_out_heads or block.model.positions == Positions.rotary
    heads = rewritten * (block.query + block.keys_and_values)
    numbers = d + block.latent / 2
    routed = block.routed_rows * d * item
    many = OPERATORS + 2 * block.matrices + block.operators
    if habits.graphs and block.moe:
        many = 0
    return {
        **dict(zip(("rows", "inner", "columns", "count"), sides, strict=True)),
        "whole_bytes": tokens * (2 * numbers * norm + residuals * d),
        "cut_bytes": tokens / tp * (turn * heads + item * mlp)
        + (ROUTED_PASSES_ONCE if habits.sends_once else ROUTED_PASSES) * routed,
        "operators": habits.launches
        * (many + block.launched_each(narrow) + (0 if plans.flash else SCORE_OPERATORS)),
        "expert_tp": block.expert_tp,
    }


def of_attention(block: Block) -> dict[str, Any]:
    """The flops of scores and values, halved by the causal mask where a flash kernel skips what it
    hides (Dao 2023, FlashAttention-2, section 3.1.1)."""
    plans, model = block.plans, block.model
    return {
        "flash_flops": block.score_flops / 2 if plans.flash else 0,
        "score_heads": 0 if plans.flash else plans.micro_batch_size * model.n_head / plans.tp,
        "queries": plans.seq_len / plans.cp,
        "keys": plans.seq_len,
        "head_dim": model.head_dim,
    }


def of_backward(block: Block, share: float | None, stops_early: bool) -> dict[str, Any]:
    """What of the forward runs again: a `share` of it, or what the plans' checkpointing says.

    stops_early: without the last product.
    """
    plans, stops = block.plans, stops_early and share is None
    selective = (plans.checkpointing == SELECTIVE) & (share is None)
    recomputed = (plans.checkpointing != NONE) & ~selective if share is None else share
    sides = block.repeated(recomputed, selective, stops)
    return {
        "recomputed": recomputed,
        "selective": selective,
        "repeated": np.stack([np.broadcast_to(n, np.shape(plans.tp)) for n in sides], 1),
    }


def of_messages(block: Block, share: float | None, habits: Habits) -> dict[str, Any]:
    """The collectives of a micro-batch, as simulator.block_messages has them: bytes of a call, and
    calls, of each kind. `share`: of the blocks that run again, as above."""
    plans, to = block.plans, Sending(Rank(block.plans))
    again = recomputes(plans) if share is None else share * np.ones_like(plans.pp)
    stops = habits.stops_early and share is None
    sent = every_message(to, again, again if stops else 2 * again)
    if not habits.sends_as_torch:
        sent = [_as_others(message, to) for message in sent]
    if block.more:
        sent = [_described(message, block) for message in sent]
    shape = np.shape(plans.tp)

    def column(values: list[Any]) -> Array:
        return np.stack([np.broadcast_to(v, shape) for v in values], 1)

    cut = 1 if habits.sends_as_torch else plans.tp / np.where(plans.sequence_parallel, plans.tp, 1)
    between = BlockMessage("", "", "", to.between, stage_numel(to), 0 * plans.tp)
    return {
        "sent_bytes": column([call_bytes(m) for m in sent]),
        "sent_block": column([m.block for m in sent]),
        "sent_first": column([m.first for m in sent]),
        "sent_last": column([m.last for m in sent]),
        "choices": block.chosen,
        "stage_bytes": call_bytes(between) / cut,
        "tied_bytes": 4 * tied_numel(to),
    }


def _as_others(message: BlockMessage, to: Sending) -> BlockMessage:
    """Published programs send the ring's gradients as low as its keys and values, and no message of
    its own for a norm, a loss or counts of experts is known of them."""
    if message.axis == "cp":
        return message._replace(dtypes=to.low)
    return message._replace(block=0, first=0, last=0) if message.small else message


def _described(message: BlockMessage, block: Block) -> BlockMessage:
    """Attention and experts of a published model are none of minigpt's."""
    if message.axis == "cp":
        return message._replace(numel=block.tokens * block.keys_and_values / block.plans.tp)
    if message.axis == "ep" and not message.small:
        return message._replace(numel=block.routed_rows * block.model.d_model)
    return message
