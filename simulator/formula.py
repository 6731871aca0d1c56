"""Closed forms of what a step sends: exactly the payloads that a run measures.

P is the number of parameters, n the size of an axis; other letters as in minigpt: B sequences of a
micro-batch, T tokens (of this cp rank), D width.
"""

from __future__ import annotations

import math
from collections import Counter

from minigpt.config import FFN, ModelConfig
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    Precision,
    expert_axes,
    weights_axes,
)
from simulator.step import DTYPE_NAMES, ITEM_BYTES, Step, is_cut, padded_size

Key = tuple[str, str, str]  # collective, axis, dtype
Sent = Counter[Key]


def payload_bytes(step: Step) -> dict[Key, int]:
    """Payload that one rank hands over in one optimiser step, by collective, axis and dtype.

    All of them: what each axis sends, 16 bytes for the sum of losses and the count of tokens, and
    4 for each part of the norm that is added up over an axis.
    """
    names = [axis for axis in MESH_AXES if getattr(step.layout, axis) > 1]
    if not names:
        return {}
    sent: Sent = Counter()
    sent.update(data_bytes(step))
    for stage in step.stages:
        sent.update(tensor_bytes(step, stage))
    sent.update(pipeline_bytes(step))
    sent.update(context_bytes(step))
    sent.update(expert_bytes(step))
    if step.clipped:
        sent.update(norm_bytes(step))
    sent["all_reduce", "*".join(names), "float64"] += 16
    return {key: size for key, size in sent.items() if size}


def data_bytes(step: Step) -> Sent:
    """Weights and gradients over the data axes.

    ddp     all_reduce of every gradient: 4 P (Li et al. 2020, PyTorch Distributed, section 3.2)
    zero 1  the same, and a broadcast of every weight from its owner
    zero 2  all_gather of the weights once a micro-batch, reduce_scatter of the gradients once a
            step (Rajbhandari et al. 2020, ZeRO, section 7)
    zero 3  all_gather of the blocks' weights before each forward and again before each backward
            (Zhao et al. 2023, PyTorch FSDP)
    hsdp    as sharded, and an all_reduce of the scattered gradients between the replicas
    """
    axes, sent = weights_axes(step.layout), Sent()
    (replicas, r), (shards, n) = axes["replicate"], axes["shard"]
    local = [(step.outer(stage), step.blocks(stage)) for stage in step.stages]
    if not step.sharded:
        size = sum(padded_size(outer.values(), 1) for outer, _ in local)
        size += sum(count for _, count in local) * padded_size(step.block.values(), 1)
        if r > 1:
            sent["all_reduce", replicas, "float32"] += 4 * size
        if n > 1:  # zero 1
            sent["all_reduce", shards, "float32"] += 4 * size
            sent["broadcast", shards, "float32"] += 4 * size
        return sent + _expert_data_bytes(step)
    name, item = step.low
    for outer_shapes, count in local:
        outer = padded_size(outer_shapes.values(), n)
        blocks = count * padded_size(step.block.values(), n)
        gathers = gathers_of_a_step(step)
        sent["all_gather", shards, name] += item * (gathers[0] * outer + gathers[1] * blocks)
        sent["reduce_scatter", shards, "float32"] += 4 * (outer + blocks)
        if r > 1:
            sent["all_reduce", replicas, "float32"] += 4 * (outer + blocks) // n
    return sent + _expert_data_bytes(step)


def gathers_of_a_step(step: Step) -> tuple[int, int]:
    """How often a sharded rank gathers what is in no block, and a block.

    A pipeline keeps gathered weights from a backward to the last one; with resharding after forward
    it gathers again for each forward and for each backward that follows one.
    Raises ValueError for a pipeline of several stages a rank that reshards: that follows its order.
    """
    m, keep = step.options.micro_batches, step.options.zero_stage == 2
    if step.layout.pp == 1:
        return m, m if keep else 2 * m
    if keep:
        return 1, 1
    if step.options.pipeline.schedule.value == "gpipe":
        return 1, m + 1
    if step.options.pipeline.schedule.value == "1f1b":
        warm = min(m, step.layout.pp - step.pp_rank)  # forwards before the first backward
        return 1, warm + 1 + (m - warm)
    raise ValueError("zero_stage=3 with several stages a rank has no closed form")


def _expert_data_bytes(step: Step) -> Sent:
    """The same for experts, over what ep has left of the data axes."""
    sent = Sent()
    if step.layout.ep == 1 or step.layout.data_parallel == step.layout.ep:
        return sent
    *outer, (shards, n) = expert_axes(step.layout)
    layers = sum(step.blocks(stage) for stage in step.stages)
    if not step.sharded:
        outer, n = [(shards, n)], 1
    size = layers * padded_size(step.experts.values(), n)
    name, item = step.low
    if n > 1:
        sent["all_gather", shards, name] += item * gathers_of_a_step(step)[1] * size
        sent["reduce_scatter", shards, "float32"] += 4 * size
    for replicas, r in outer:
        if r > 1:
            sent["all_reduce", replicas, "float32"] += 4 * size // n
    return sent


def tensor_bytes(step: Step, stage: int) -> Sent:
    """Activations of one stage over tp (Shoeybi et al. 2019, Megatron-LM, section 3).

    A block all_reduces B T D twice forward and twice backward; embedding forward and head backward
    once. The loss over a cut vocabulary all_reduces a maximum, a sum and the target's logit for
    each token. With sequence parallelism each of a block's and the head's is a reduce_scatter or an
    all_gather forward and the other one backward, and norms all_reduce their gradients (Korthikanti
    et al. 2022, section 4.2.2). Checkpointed blocks repeat all but their last forward message.
    """
    sent, tp, m = Sent(), step.layout.tp, step.options.micro_batches
    if tp == 1:
        return sent
    layers, first, last = step.blocks(stage), stage == 0, stage == step.stage_count - 1
    whole, sequence = m * step.activation, step.options.sequence_parallel
    low, between = step.low, step.between
    again = step.options.activation_checkpointing != ActivationCheckpointing.none
    into, out = ("all_gather", "reduce_scatter") if sequence else ("", "all_reduce")
    ends = [
        (out, low, layers * (2 + again)),  # of attention.out and mlp.down
        (into, between, layers * (2 + 2 * again)),  # what q, k, v and the MLP take
        ("reduce_scatter" if sequence else "all_reduce", between, 2 * layers + last),  # their grads
        ("all_gather" if sequence else "", low, 2 * layers),
        ("all_gather" if sequence else "", between, int(last) + int(first)),
        ("all_reduce", between, int(first)),  # the embedding's rows come from all ranks
    ]
    for collective, (name, item), times in ends:
        if collective:
            sent[collective, "tp", name] += item * times * whole
    if last:
        tokens = whole // step.model.d_model
        sent["all_reduce", "tp", "float32"] += 3 * 4 * tokens
    if sequence:
        norms = {n: s for n, s in step.block.items() if "norm" in n}
        outer = {n: s for n, s in step.outer(stage).items() if n.startswith("norm")}
        size = layers * padded_size(norms.values(), 1) + padded_size(outer.values(), 1)
        # the data axes hand over gradients in the dtype of their policy, accumulated ones in fp32
        name, item = between if m == 1 else ("float32", 4)
        sent["all_reduce", "tp", name] += item * size
    return sent


def pipeline_bytes(step: Step) -> Sent:
    """Activations to the next stage and gradients back, B T D a micro-batch, where the next stage
    is on another rank; a tied head's gradient between first and last rank (Narayanan 2021)."""
    sent, here = Sent(), step.stages
    if step.layout.pp == 1:
        return sent
    cut = step.layout.tp if step.options.sequence_parallel else 1
    name, item = step.between
    size = item * step.options.micro_batches * step.activation // cut
    for stage in here:
        neighbours = [other for other in (stage - 1, stage + 1) if 0 <= other < step.stage_count]
        for other in neighbours:
            if other not in here:
                sent["send", "pp", name] += size
                sent["recv", "pp", name] += size
    ends = {0, step.stage_count - 1}
    if step.model.tied and len(ends & set(here)) == 1:
        n = weights_axes(step.layout)["shard"][1] if step.sharded else 1
        rows, width = step.cut({"embedding.weight": (step.model.vocab_size, step.model.d_model)})[
            "embedding.weight"
        ]
        sent["all_reduce", "pp", "float32"] += 4 * math.ceil(rows / n) * width
    return sent


def context_bytes(step: Step) -> Sent:
    """Keys and values round the ring, n-1 blocks of 2 B T K H forward, and backward again with as
    many of their gradients in fp32 (parallel/context_parallel.py; Liu et al. 2023)."""
    sent, n = Sent(), step.layout.cp
    if n == 1:
        return sent
    model, o = step.model, step.options
    tokens = o.micro_batch_size * o.seq_len // n
    block = 2 * tokens * model.kv_heads * model.head_dim // step.layout.tp
    again = o.activation_checkpointing != ActivationCheckpointing.none
    layers = sum(step.blocks(stage) for stage in step.stages)
    rounds = o.micro_batches * layers * (n - 1)
    name, item = step.low
    for collective in ("send", "recv"):
        sent[collective, "cp", name] += rounds * (2 + again) * block * item
        sent[collective, "cp", "float32"] += rounds * block * 4
    return sent


def expert_bytes(step: Step) -> Sent:
    """The tokens' slots to the ranks of their experts and back, over ep; see
    `expert_payload_bytes`. Without a capacity: on the average of the ranks."""
    if step.layout.ep == 1:
        return Sent()
    o = step.options
    again = o.activation_checkpointing != ActivationCheckpointing.none
    of_layer = expert_payload_bytes(
        step.model, o.micro_batch_size, o.seq_len, o.precision, checkpointed=again
    )
    layers = sum(step.blocks(stage) for stage in step.stages)
    times = o.micro_batches * layers
    return Sent({("all_to_all", "ep", dtype): times * size for dtype, size in of_layer.items()})


def norm_bytes(step: Step) -> Sent:
    """4 bytes for each axis over which the squares of some gradients are added up.

    Weights that are cut alike are one sum; pipeline stages add theirs at the end.
    """
    layout, sent = step.layout, Sent()
    shard = [weights_axes(layout)["shard"][0]] if step.sharded else []
    names = [n for stage in step.stages for n in (*step.block, *step.outer(stage))]
    kinds = {tuple(shard + (["tp"] if layout.tp > 1 and is_cut(n) else [])) for n in names}
    if layout.ep > 1 and layout.ep != layout.dp_shard:  # else the same ranks, and one sum
        rest, n = expert_axes(layout)[-1]
        kinds.add((*([rest] if step.sharded and n > 1 else []), "ep"))
    for kind in kinds:
        for axis in kind:
            sent["all_reduce", axis, "float32"] += 4
    if layout.pp > 1:
        sent["all_reduce", "pp", "float32"] += 4
    return sent


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
    assert model.ffn == FFN.moe
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
