"""Closed forms of what a step sends: exactly the messages and payloads that a run measures.

P is the number of parameters, n the size of an axis, m micro-batches; other letters as in minigpt:
B sequences of a micro-batch, T tokens (of this cp rank), D width. Arrays have one entry a plan.
"""

from __future__ import annotations

import numpy as np

from minigpt.config import FFN, ModelConfig
from parallel.layout import Layout, Options
from simulator.data_messages import data_messages, expert_data_messages
from simulator.plans import Array, Plans
from simulator.sending import (
    FLOAT32,
    Key,
    PhaseKey,
    Sending,
    Sent,
    all_axes,
)
from simulator.shapes import Rank, padded, weights_of


def payload_bytes(
    model: ModelConfig, layout: Layout, options: Options, clipped: bool = True, place: int = 0
) -> dict[Key, int]:
    """Payload that pp rank `place` of one plan hands over in one optimiser step."""
    sent = messages(Plans.of(model, layout, options, clipped=clipped), place)
    return {key: int(of.payload_bytes[0]) for key, of in sent.items()}


def calls(
    model: ModelConfig, layout: Layout, options: Options, clipped: bool = True, place: int = 0
) -> dict[Key, int]:
    """The same of the number of messages."""
    sent = messages(Plans.of(model, layout, options, clipped=clipped), place)
    return {key: int(of.calls[0]) for key, of in sent.items()}


def messages(plans: Plans, place: Array | int = 0) -> dict[Key, Sent]:
    """What pp rank `place` of each plan sends in one optimiser step, by collective, axis and dtype.

    All of it: what each axis sends, 16 bytes for the sum of losses and the count of tokens, and 4
    for each part of the norm that is added up over an axis. `exact` says where it is to the byte.
    A key that no plan has is not there.
    """
    summed: dict[Key, Sent] = {}
    for (*key, _), sent in messages_by_phase(Rank(plans, place)).items():
        name: Key = (key[0], key[1], key[2])
        summed[name] = summed[name] + sent if name in summed else sent
    return summed


def messages_by_phase(rank: Rank) -> dict[PhaseKey, Sent]:
    """The same, by the phase of the step as well in which they are sent."""
    to = Sending(rank)
    data_messages(to)
    expert_data_messages(to)
    tensor_messages(to)
    pipeline_messages(to)
    context_messages(to)
    expert_messages(to)
    if rank.plans.clipped:
        norm_messages(to)
    one = np.ones_like(rank.plans.pp)
    to.add(
        "optimizer", "all_reduce", all_axes(rank.plans), [("float64", 8, np.True_)], one, 2 * one
    )
    return to.sent


def exact(plans: Plans) -> Array:
    """Where the closed form is what this program sends, to the byte.

    Not where tokens choose their experts freely, which gives the average of the ranks; nor where
    only other programs go: zero_stage=1 in Megatron-LM's way, weights or gradients in two bytes;
    nor for more than three sharded stages a rank, of which torch's schedules keep three gathered
    and gather the others again and again.
    """
    free = (plans.ep > 1) & (plans.model.capacity_factor is None)
    ours = plans.numerics.weights == plans.numerics.gradients == 4
    rank = Rank(plans)
    crowded = rank.sharded & (rank.local_stages > 3)
    return ~free & ~rank.like_megatron & ~crowded & ours


def tensor_messages(to: Sending) -> None:
    """Activations over tp (Shoeybi et al. 2019, Megatron-LM, section 3).

    A block all_reduces B T D twice forward and twice backward; embedding forward and head backward
    once. The loss over a cut vocabulary all_reduces a maximum, a sum and the target's logit for
    each token. With sequence parallelism each of a block's and the head's is a reduce_scatter or an
    all_gather forward and the other one backward, and norms all_reduce their gradients (Korthikanti
    et al. 2022, section 4.2.2). Checkpointed blocks repeat all but their last forward message.
    """
    plans, rank, tp = to.plans, to.rank, to.one("tp")
    layers, first, last, again = rank.layers, rank.first, rank.last, to.again
    sp = (plans.sequence_parallel & (plans.tp > 1)).astype(np.int64)
    low, between, whole = to.low, to.between, 1 - sp
    sends = [  # phase, collective, dtype, times a micro-batch
        ("forward", "all_reduce", low, whole * 2 * layers),  # of attention.out and mlp.down
        ("forward", "reduce_scatter", low, sp * 2 * layers),
        ("backward", "all_reduce", low, whole * again * layers),
        ("backward", "reduce_scatter", low, sp * again * layers),
        ("forward", "all_gather", between, sp * 2 * layers),  # what q, k, v and the MLP take
        ("backward", "all_gather", between, sp * 2 * again * layers),
        ("backward", "all_reduce", between, whole * (2 * layers + last)),  # their gradients
        ("backward", "reduce_scatter", between, sp * (2 * layers + last)),
        ("backward", "all_gather", low, sp * 2 * layers),
        ("forward", "all_gather", between, sp * last),  # what the head takes
        ("backward", "all_gather", between, sp * first),
        ("forward", "all_reduce", between, first),  # the embedding's rows come from all ranks
    ]
    for phase, collective, dtype, times in sends:
        messages = times * plans.micro_batches
        to.add(phase, collective, tp, dtype, messages, messages * rank.activation)
    tokens = rank.activation // plans.model.d_model
    of_loss = 3 * last * plans.micro_batches
    to.add("forward", "all_reduce", tp, FLOAT32, of_loss, of_loss * tokens)
    _norms_under_sequence_parallelism(to, sp)


def _norms_under_sequence_parallelism(to: Sending, where: Array) -> None:
    """Each rank has the partial sum of a norm's gradient for its part of the sequence.

    The data axes hand over gradients in the dtype of their policy, accumulated ones in fp32.
    """
    plans, rank, one = to.plans, to.rank, np.ones_like(to.plans.pp)
    norms = weights_of({n: s for n, s in plans.model.block_shapes.items() if "norm" in n})
    outer = weights_of({n: s for n, s in plans.model.outer_shapes.items() if n.startswith("norm")})
    numbers = rank.layers * padded(norms, plans, one) + rank.last * padded(outer, plans, one)
    calls = where * rank.scatters * (rank.layers * len(norms) + rank.last * len(outer))
    alone = (plans.micro_batches == 1) | plans.syncs_each
    dtypes = [(name, item, here & alone) for name, item, here in to.between]
    dtypes.append(("float32", 4, ~alone))
    to.add("backward", "all_reduce", to.one("tp"), dtypes, calls, rank.scatters * numbers)


def pipeline_messages(to: Sending) -> None:
    """Activations to the next stage and gradients back, B T D a micro-batch, where the next stage
    is on another rank; a tied head's gradient between first and last rank (Narayanan 2021)."""
    plans, rank, pp = to.plans, to.rank, to.one("pp")
    cut = np.where(plans.sequence_parallel, plans.tp, 1)
    size = plans.micro_batches * rank.activation // cut
    before = rank.local_stages - rank.first - rank.turn  # stages whose predecessor is elsewhere
    after = rank.local_stages - rank.last - rank.turn
    ways = [("forward", "send", after), ("forward", "recv", before)]
    ways += [("backward", "send", before), ("backward", "recv", after)]
    for phase, collective, times in ways:
        calls = times * plans.micro_batches
        to.add(phase, collective, pp, to.between, calls, times * size)
    if plans.model.tied:
        n = rank.weight_shards
        head = weights_of({"embedding.weight": (plans.model.vocab_size, plans.model.d_model)})
        apart = ((rank.first + rank.last) == 1).astype(np.int64)
        to.add("backward", "all_reduce", pp, FLOAT32, apart, padded(head, plans, n) // n)


def context_messages(to: Sending) -> None:
    """Keys and values round the ring, n-1 blocks of 2 B T K H forward, and backward again with as
    many of their gradients in fp32 (parallel/context_parallel.py; Liu et al. 2023)."""
    plans, rank, cp = to.plans, to.rank, to.one("cp")
    tokens = plans.micro_batch_size * plans.seq_len // plans.cp
    block = 2 * tokens * plans.model.kv_heads * plans.model.head_dim // plans.tp
    rounds = plans.micro_batches * rank.layers * (plans.cp - 1)
    back = rounds * (1 + to.again)
    for collective in ("send", "recv"):
        to.add("forward", collective, cp, to.low, rounds, rounds * block)
        to.add("backward", collective, cp, to.low, back, back * block)
        to.add("backward", collective, cp, FLOAT32, rounds, rounds * block)


def expert_messages(to: Sending) -> None:
    """The tokens' slots to the ranks of their experts and back, over ep (Lepikhin et al. 2020,
    GShard, section 3.2): two messages in forward and two in backward, two more where blocks are
    checkpointed.

    Dropless: on the average of the ranks, and the counts of each expert go first, in int64.
    """
    plans, rank, model = to.plans, to.rank, to.plans.model
    if model.ffn != FFN.moe:
        return
    ep, times = to.one("ep"), plans.micro_batches * rank.layers
    size = plans.micro_batch_size * expert_choices(model, plans.seq_len) * model.d_model
    for phase, each in (("forward", 2), ("backward", 2 + 2 * to.again)):
        to.add(phase, "all_to_all", ep, to.low, each * times, each * times * size)
    if model.capacity_factor is None:
        of_counts: list = [("int64", 8, np.True_)]
        for phase, counted in (("forward", times), ("backward", times * to.again)):
            to.add(phase, "all_to_all", ep, of_counts, counted, counted * model.n_expert)


def expert_choices(model: ModelConfig, seq_len: int) -> int:
    """Rows that experts compute for one sequence: its choices, or all slots of a capacity."""
    if model.capacity_factor is None:
        return seq_len * model.experts_per_token
    return model.n_expert * model.expert_slots(seq_len)


def norm_messages(to: Sending) -> None:
    """4 bytes for each axis over which the squares of some gradients are added up.

    Weights that are cut alike are one sum; pipeline stages add theirs at the end.
    """
    plans, rank = to.plans, to.rank
    one, phase = np.ones_like(plans.pp), "optimizer"
    kinds = np.where(plans.tp > 1, 2, 1)  # tp cuts some weights and leaves others whole
    scattered = rank.sharded | rank.like_megatron
    to.add(phase, "all_reduce", to.shards, FLOAT32, scattered * kinds, kinds)
    to.add(phase, "all_reduce", to.one("tp"), FLOAT32, one, one)
    spread = (plans.ep > 1) & (plans.ep != plans.dp_shard)  # else the same ranks, and one sum
    rest = [("dp_shard/ep", rank.expert_rest, plans.dp_shard > 1)]
    to.add(phase, "all_reduce", rest, FLOAT32, spread * scattered, one)
    to.add(phase, "all_reduce", to.one("ep"), FLOAT32, one * spread, one)
    to.add(phase, "all_reduce", to.one("pp"), FLOAT32, one, one)
