"""Messages that each micro-batch sends over tp, cp and ep, block by block and at the model's ends.

Bytes (simulator/communication.py) and seconds (simulator/estimate.py) are both taken from these, so
that they cannot disagree. Letters as in simulator/communication.py.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from minigpt.config import FFN, ModelConfig
from parallel.layout import Layout, Options
from simulator.plans import NONE, SELECTIVE, Array, Plans
from simulator.sending import FLOAT32, Choices, Sending
from simulator.shapes import Rank, padded, weights_of

INT64: Choices = [("int64", 8, np.True_)]


class BlockMessage(NamedTuple):
    """One kind of collective. Arrays have one entry a plan; counts are those of one micro-batch."""

    phase: str
    collective: str  # of a ring's send the recv is not listed apart
    axis: str
    dtypes: Choices
    numel: Array  # of one call, by NCCL's convention (costs/ledger.py)
    block: Array | int  # calls of one block
    first: Array | int = 0  # calls of the first stage besides
    last: Array | int = 0  # calls of the last stage besides
    small: bool = False  # a few numbers, or one a token: other programs send none apart


def recomputes(plans: Plans) -> Array:
    """Return 1 where the blocks of this program run again in backward and repeat their messages.

    Selective checkpointing keeps what matmuls give but repeats messages; where attention keeps its
    T x T matrix it is Korthikanti's, which runs attention alone again, and repeats none.
    """
    attention_only = (plans.checkpointing == SELECTIVE) & (not plans.flash)
    return ((plans.checkpointing != NONE) & ~attention_only).astype(np.int64)


def tensor_messages(to: Sending, again: Array, reduced_again: Array) -> list[BlockMessage]:
    """Return the messages of activations over tp (Shoeybi et al. 2019, Megatron-LM, section 3).

    A block all_reduces B T D twice forward and twice backward; embedding forward and head backward
    once. The loss over a split vocabulary all_reduces a maximum, a sum and the target's logit for
    each token. With sequence parallelism each of a block's and the head's is a reduce_scatter or an
    all_gather forward and the other one backward (Korthikanti et al. 2022, section 4.2.2). A
    recomputed block (`again`) repeats its all_gathers and `reduced_again` of its two reductions:
    the last one is spared where recomputing stops early.
    """
    plans, size, one = to.plans, to.rank.activation, np.ones_like(to.plans.pp)
    sp = (plans.sequence_parallel & (plans.tp > 1)).astype(np.int64)
    low, between, whole = to.low, to.between, 1 - sp
    tokens = size // plans.model.d_model

    def sent(
        phase: str,
        name: str,
        dtypes: Choices,
        block: Array,
        first: Array | int = 0,
        last: Array | int = 0,
    ) -> BlockMessage:
        return BlockMessage(phase, name, "tp", dtypes, size, block, first, last)

    return [
        sent("forward", "all_reduce", low, whole * 2),  # of attention.out and mlp.down
        sent("forward", "reduce_scatter", low, sp * 2),
        sent("backward", "all_reduce", low, whole * reduced_again),
        sent("backward", "reduce_scatter", low, sp * reduced_again),
        sent("forward", "all_gather", between, sp * 2, last=sp),  # what q, k, v, MLP, head take
        sent("backward", "all_gather", between, sp * 2 * again, first=sp),
        sent("backward", "all_reduce", between, whole * 2, last=whole),  # their gradients
        sent("backward", "reduce_scatter", between, sp * 2, last=sp),
        sent("backward", "all_gather", low, sp * 2),
        # the embedding's rows come from all ranks
        sent("forward", "all_reduce", between, 0 * one, first=one),
        BlockMessage("forward", "all_reduce", "tp", FLOAT32, tokens, 0 * one, 0, 3 * one, True),
    ]


def context_messages(to: Sending, again: Array) -> list[BlockMessage]:
    """Return what goes round the ring of cp: keys and values, n-1 blocks of 2 B T K H forward and
    backward again, with as many of their gradients in fp32 (parallel/context_parallel.py; Liu et
    al. 2023)."""
    plans = to.plans
    tokens = plans.micro_batch_size * plans.seq_len // plans.cp
    size = 2 * tokens * plans.model.kv_heads * plans.model.head_dim // plans.tp
    rounds = plans.cp - 1
    return [
        BlockMessage("forward", "send", "cp", to.low, size, rounds),
        BlockMessage("backward", "send", "cp", to.low, size, rounds * (1 + again)),
        BlockMessage("backward", "send", "cp", FLOAT32, size, rounds),
    ]


def expert_messages(to: Sending, again: Array) -> list[BlockMessage]:
    """Return the messages of tokens' slots to the ranks of their experts and back, over ep
    (Lepikhin et al. 2020, GShard, section 3.2): two forward and two backward, two more in blocks
    that are recomputed.

    Dropless: the average of the ranks, and the counts of each expert go first, in int64.
    """
    plans, model = to.plans, to.plans.model
    there = np.full_like(plans.pp, model.ffn == FFN.moe)
    counted = there * (model.capacity_factor is None)
    size = plans.micro_batch_size * expert_choices(model, plans.seq_len) * model.d_model
    experts = model.n_expert * np.ones_like(plans.pp)
    return [
        BlockMessage("forward", "all_to_all", "ep", to.low, size, 2 * there),
        BlockMessage("backward", "all_to_all", "ep", to.low, size, (2 + 2 * again) * there),
        BlockMessage("forward", "all_to_all", "ep", INT64, experts, counted, small=True),
        BlockMessage("backward", "all_to_all", "ep", INT64, experts, again * counted, small=True),
    ]


def norm_gradients(to: Sending) -> BlockMessage:
    """Return the gradients of norms under sequence parallelism, which each rank has of its part of
    the sequence alone. Calls are those of one scatter of gradients, not of a micro-batch; `numel`
    is that of one norm.

    The data axes hand over gradients in the dtype of their policy, accumulated ones in fp32.
    """
    plans, one = to.plans, np.ones_like(to.plans.pp)
    sp = (plans.sequence_parallel & (plans.tp > 1)).astype(np.int64)
    norms = weights_of({n: s for n, s in plans.model.block_shapes.items() if "norm" in n})
    outer = weights_of({n: s for n, s in plans.model.outer_shapes.items() if n.startswith("norm")})
    each = padded(norms, plans, one) // len(norms)
    alone = (plans.micro_batches == 1) | plans.syncs_each
    dtypes = [(name, item, here & alone) for name, item, here in to.between]
    dtypes.append(("float32", 4, ~alone))
    return BlockMessage(
        "backward", "all_reduce", "tp", dtypes, each, sp * len(norms), 0, sp * len(outer), True
    )


def every_message(to: Sending, again: Array, reduced_again: Array) -> list[BlockMessage]:
    """Return the messages of all three axes; their kinds and their order are the same for every
    model and plan. The last is `norm_gradients`, with the calls of a step spread over its
    micro-batches."""
    norms = norm_gradients(to)
    each = to.rank.scatters / to.plans.micro_batches
    return [
        *tensor_messages(to, again, reduced_again),
        *context_messages(to, again),
        *expert_messages(to, again),
        norms._replace(block=norms.block * each, last=norms.last * each),
    ]


@cache
def message_kinds() -> tuple[tuple[str, str, str], ...]:
    """Return phase, collective and axis of each of `every_message`."""
    to = Sending(Rank(Plans.of(ModelConfig(), Layout(), Options())))
    one = np.ones(1, dtype=np.int64)
    return tuple((m.phase, m.collective, m.axis) for m in every_message(to, one, one))


def call_bytes(message: BlockMessage) -> Array:
    """Return the payload of one call, plan by plan."""
    parts = [np.where(here, item * message.numel, 0) for _, item, here in message.dtypes]
    return np.sum(parts, axis=0)


def stage_numel(to: Sending) -> Array:
    """Return the numel of one micro-batch's activations between two stages, in `to.between`: each
    tp rank sends its part of the sequence, or all of it without sequence parallelism."""
    return to.rank.activation // np.where(to.plans.sequence_parallel, to.plans.tp, 1)


def tied_numel(to: Sending) -> Array:
    """Return the numel of the gradient that the first and the last stage of a tied model add up: 0
    where one rank has both."""
    n, model = to.rank.weight_shards, to.plans.model
    head = weights_of({"embedding.weight": (model.vocab_rows, model.d_model)})
    apart = model.tied & (to.plans.pp > 1) & ~to.rank.v_shaped
    return apart * padded(head, to.plans, n) // n


def expert_choices(model: ModelConfig, seq_len: int) -> int:
    """Return the rows that experts compute for one sequence: its choices, or all slots of a
    capacity."""
    if model.capacity_factor is None:
        return seq_len * model.experts_per_token
    return model.n_expert * model.expert_slots(seq_len)
