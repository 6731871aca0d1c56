"""Closed forms of what a step sends: exactly the messages and payloads that a run measures.

P is the number of parameters, n the size of an axis, m micro-batches; other letters as in minigpt:
B sequences of a micro-batch, T tokens (of this cp rank), D width. Arrays have one entry a plan.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from minigpt.config import ModelConfig
from parallel.layout import Layout, Options
from simulator.block_messages import (
    BlockMessage,
    context_messages,
    expert_messages,
    norm_gradients,
    recomputes,
    stage_numel,
    tensor_messages,
    tied_numel,
)
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
from simulator.shapes import Rank


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
    again = recomputes(rank.plans)
    blocks_messages(to, tensor_messages(to, again, again))
    sequence_norms(to)
    pipeline_messages(to)
    blocks_messages(to, context_messages(to, again))
    blocks_messages(to, expert_messages(to, again))
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


def blocks_messages(to: Sending, messages: Iterable[BlockMessage]) -> None:
    """Add what the micro-batches of a step send block by block and at the model's ends."""
    plans, rank = to.plans, to.rank
    for one in messages:
        times = rank.layers * one.block + rank.first * one.first + rank.last * one.last
        calls = times * plans.micro_batches
        ring = ("send", "recv") if one.collective == "send" else (one.collective,)
        for collective in ring:
            to.add(one.phase, collective, to.one(one.axis), one.dtypes, calls, calls * one.numel)


def sequence_norms(to: Sending) -> None:
    """Add the gradients of norms under sequence parallelism, once for each scatter of gradients."""
    rank, one = to.rank, norm_gradients(to)
    calls = rank.scatters * (rank.layers * one.block + rank.last * one.last)
    to.add(one.phase, one.collective, to.one(one.axis), one.dtypes, calls, calls * one.numel)


def pipeline_messages(to: Sending) -> None:
    """Activations to the next stage and gradients back, B T D a micro-batch, where the next stage
    is on another rank; a tied head's gradient between first and last rank (Narayanan 2021)."""
    plans, rank, pp = to.plans, to.rank, to.one("pp")
    size = plans.micro_batches * stage_numel(to)
    before = rank.local_stages - rank.first - rank.turn  # stages whose predecessor is elsewhere
    after = rank.local_stages - rank.last - rank.turn
    ways = [("forward", "send", after), ("forward", "recv", before)]
    ways += [("backward", "send", before), ("backward", "recv", after)]
    for phase, collective, times in ways:
        calls = times * plans.micro_batches
        to.add(phase, collective, pp, to.between, calls, times * size)
    if plans.model.tied:
        apart = ((rank.first + rank.last) == 1).astype(np.int64)
        to.add("backward", "all_reduce", pp, FLOAT32, apart, tied_numel(to))


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
